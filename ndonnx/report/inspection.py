"""A partition as people and programs look at it: the document of `inspect --json`, and a drawing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias
from xml.sax.saxutils import escape

from ndonnx.graph import cost_of
from ndonnx.partition import Neighbourhood, Partition
from ndonnx.rundir import atomic_write

Status: TypeAlias = Literal["distillable", "kept"]

_WIDTH = 760
"""Pixels of the whole drawing."""
_LEFT = 24
_BOX = 300
"""Pixels of the widest box, the one with most parameters."""
_ROW = 40
_GAP = 14
_HEAD = 64
_LONGEST = 46
"""Letters of a label, beyond which its middle is left out."""
_COLOURS: dict[Status, str] = {"distillable": "#4c9f70", "kept": "#b8bcc2"}
_INK = "#24292f"


@dataclass(frozen=True)
class Piece:
    """One neighbourhood, or a piece of the teacher that is kept."""

    name: str
    input: str | None
    """The stream value that it reads; None where there is none."""
    context: list[str]
    output: str | None
    nodes: int
    parameters: int
    macs: int
    """Multiply-accumulates per sample."""
    widths: list[int]
    """Units of each channel group that can be shrunk."""
    status: Status
    reason: str | None
    """Why it is kept."""


@dataclass(frozen=True)
class Coverage:
    """Part of the whole, 0 to 1, that lies in distillable neighbourhoods."""

    parameters: float
    macs: float


@dataclass(frozen=True)
class Inspection:
    """A model and its neighbourhoods, in order."""

    model: str
    opset: int
    parameters: int
    macs: int
    neighbourhoods: list[Piece]
    coverage: Coverage

    @classmethod
    def of(cls, model: str, parts: Partition) -> Inspection:
        """Look at a partition; `model` is the name to show."""
        cost = cost_of(parts.model.graph)
        opsets = parts.model.opset_imports
        return cls(
            model=model,
            opset=opsets[""] if "" in opsets else opsets["ai.onnx"],
            parameters=cost.parameters,
            macs=cost.macs,
            neighbourhoods=[_piece(n) for n in parts.neighbourhoods],
            coverage=Coverage(*parts.coverage()),
        )

    def to_json(self) -> dict[str, Any]:
        """As one JSON document."""
        return asdict(self)

    def to_svg(self) -> str:
        """The neighbourhoods from top to bottom; the width of a box is its share of the parameters."""
        height = _HEAD + (_ROW + _GAP) * len(self.neighbourhoods)
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
                f'viewBox="0 0 {_WIDTH} {height}" role="img" font-family="sans-serif" font-size="12" fill="{_INK}">',
                f"<title>{_xml(f'Neighbourhoods of {self.model}')}</title>",
                f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
                *self._head(),
                *self._boxes(),
                "</svg>\n",
            ]
        )

    def write_svg(self, path: Path) -> None:
        """Write the drawing, whole or not at all.

        Raises:
            RunDirError: it cannot be written there.
        """
        atomic_write(path, self.to_svg().encode("utf-8"))

    def _head(self) -> Iterator[str]:
        yield _text(_LEFT, 24, f"{_short(self.model)}: opset {self.opset}, {self.parameters:,} parameters", "bold")
        x = _LEFT
        for status, share in (("distillable", self.coverage.parameters), ("kept", 1 - self.coverage.parameters)):
            yield f'<rect x="{x}" y="36" width="12" height="12" fill="{_COLOURS[status]}"/>'  # type: ignore[index]
            yield _text(x + 18, 46, f"{status}: {share:.1%} of the parameters")
            x += 250

    def _boxes(self) -> Iterator[str]:
        most = max((piece.parameters for piece in self.neighbourhoods), default=0)
        for i, piece in enumerate(self.neighbourhoods):
            y = _HEAD + i * (_ROW + _GAP)
            width = max(4.0, _BOX * piece.parameters / most) if most else 4.0
            follows = i > 0 and piece.input is not None and piece.input == self.neighbourhoods[i - 1].output
            if follows:
                yield f'<path d="M{_LEFT + 2} {y - _GAP}v{_GAP}" stroke="{_INK}" fill="none"/>'
            yield "<g>"
            yield f"<title>{_xml(_details(piece))}</title>"
            colour = _COLOURS[piece.status]
            yield f'<rect x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_ROW}" rx="2" fill="{colour}"/>'
            x = _LEFT + _BOX + 16
            yield _text(x, y + 16, f"{piece.name}  {_short(piece.output or '-')}", "bold")
            yield _text(x, y + 32, f"{piece.nodes} nodes, {piece.parameters:,} parameters, {piece.macs:,} MACs")
            yield "</g>"


def _piece(neighbourhood: Neighbourhood) -> Piece:
    cost = neighbourhood.cost
    return Piece(
        name=neighbourhood.name,
        input=neighbourhood.entry.name if neighbourhood.entry is not None else None,
        context=[value.name or "" for value in neighbourhood.context],
        output=neighbourhood.exit.name if neighbourhood.exit is not None else None,
        nodes=len(neighbourhood.nodes),
        parameters=cost.parameters,
        macs=cost.macs,
        widths=neighbourhood.widths,
        status="distillable" if neighbourhood.distillable else "kept",
        reason=neighbourhood.reason,
    )


def _details(piece: Piece) -> str:
    context = f", context {', '.join(piece.context)}" if piece.context else ""
    widths = f", widths {', '.join(map(str, piece.widths))}" if piece.widths else ""
    why = f": {piece.reason}" if piece.reason else ""
    return f"{piece.name}: {piece.input or '-'} → {piece.output or '-'}{context}{widths}; {piece.status}{why}"


def _text(x: int, y: int, text: str, weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" font-weight="{weight}">{_xml(text)}</text>'


def _xml(text: str) -> str:
    """Escaped for XML, which knows no control characters and no lone surrogates, escaped or not."""
    return escape("".join(c if c.isprintable() else "\ufffd" for c in text))


def _short(text: str) -> str:
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[: half - 1]}…{text[-half:]}"
