"""An inspection drawn as SVG: the neighbourhoods from top to bottom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from ndonnx.report.piece import Piece, Status

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


def draw(name: str, title: str, share: float, pieces: Sequence[Piece]) -> str:
    """A whole SVG document; the width of a box is its share of the parameters.

    Args:
        name: what a reader's software calls the drawing.
        title: its first line.
        share: part of the parameters, 0 to 1, that lies in distillable pieces.
        pieces: from top to bottom.
    """
    height = _HEAD + (_ROW + _GAP) * len(pieces)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
            f'viewBox="0 0 {_WIDTH} {height}" role="img" font-family="sans-serif" font-size="12" fill="{_INK}">',
            f"<title>{_xml(name)}</title>",
            f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
            *_head(title, share),
            *_boxes(pieces),
            "</svg>\n",
        ]
    )


def shorten(text: str, longest: int = _LONGEST) -> str:
    """The text, with its middle left out where it is longer; names of values tell most at their ends."""
    if len(text) <= longest:
        return text
    tail = longest * 2 // 3
    return f"{text[: longest - tail - 1]}…{text[-tail:]}"


def _head(title: str, share: float) -> Iterator[str]:
    yield _text(_LEFT, 24, title, "bold")
    legend: list[tuple[Status, float]] = [("distillable", share), ("kept", 1 - share)]
    for i, (status, part) in enumerate(legend):
        x = _LEFT + 250 * i
        yield f'<rect x="{x}" y="36" width="12" height="12" fill="{_COLOURS[status]}"/>'
        yield _text(x + 18, 46, f"{status}: {part:.1%} of the parameters")


def _boxes(pieces: Sequence[Piece]) -> Iterator[str]:
    most = max((piece.parameters for piece in pieces), default=0)
    for i, piece in enumerate(pieces):
        y = _HEAD + i * (_ROW + _GAP)
        width = max(4.0, _BOX * piece.parameters / most) if most else 4.0
        follows = i > 0 and piece.input is not None and piece.input == pieces[i - 1].output
        if follows:
            yield f'<path d="M{_LEFT + 2} {y - _GAP}v{_GAP}" stroke="{_INK}" fill="none"/>'
        yield "<g>"
        yield f"<title>{_xml(_details(piece))}</title>"
        colour = _COLOURS[piece.status]
        yield f'<rect x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_ROW}" rx="2" fill="{colour}"/>'
        x = _LEFT + _BOX + 16
        macs = "" if piece.macs is None else f", {piece.macs:,} MACs"
        yield _text(x, y + 16, f"{piece.name}  {shorten(piece.output or '-')}", "bold")
        yield _text(x, y + 32, f"{piece.nodes} nodes, {piece.parameters:,} parameters{macs}")
        yield "</g>"


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
