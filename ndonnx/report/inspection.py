"""A partition as people and programs look at it: the document of `inspect --json`, and a drawing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ndonnx.graph import cost_of
from ndonnx.partition import FrozenWidth, Neighbourhood, Partition
from ndonnx.partition.reasons import partly_frozen
from ndonnx.report.drawing import draw
from ndonnx.rundir import atomic_write

Status: TypeAlias = Literal["distillable", "kept"]


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
    parity: float | None = None
    """Largest error of the slice in torch, relative to its output's scale; None where it was not checked."""
    frozen: list[FrozenWidth] = field(default_factory=list)
    """Widths inside that have to stay whole, with the operator that does not let them be followed."""
    note: str | None = None
    """Which operators hold on to channels of a neighbourhood that can be distilled."""


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
    def of(cls, model: str, parts: Partition, parity: Mapping[str, float] | None = None) -> Inspection:
        """Look at a partition; `model` is the name to show, `parity` what a check has found, by neighbourhood."""
        cost = cost_of(parts.model.graph)
        opsets = parts.model.opset_imports
        return cls(
            model=model,
            opset=opsets[""] if "" in opsets else opsets["ai.onnx"],
            parameters=cost.parameters,
            macs=cost.macs,
            neighbourhoods=[_piece(n, (parity or {}).get(n.name)) for n in parts.neighbourhoods],
            coverage=Coverage(*parts.coverage()),
        )

    def to_json(self) -> dict[str, Any]:
        """As one JSON document."""
        return asdict(self)

    def to_svg(self) -> str:
        """The neighbourhoods from top to bottom; the width of a box is its share of the parameters."""
        return draw(self)

    def write_svg(self, path: Path) -> None:
        """Write the drawing, whole or not at all.

        Raises:
            RunDirError: it cannot be written there.
        """
        atomic_write(path, self.to_svg().encode("utf-8"))


def _piece(neighbourhood: Neighbourhood, parity: float | None) -> Piece:
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
        frozen=neighbourhood.frozen,
        note=partly_frozen(neighbourhood.frozen) if neighbourhood.distillable else None,
        parity=parity,
    )
