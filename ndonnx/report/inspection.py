"""A partition as people and programs look at it: the document of `inspect --json`, and a drawing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ndonnx.config.recipe import Recipe
from ndonnx.metrics.looks import DataLook
from ndonnx.partition import Neighbourhood, Partition
from ndonnx.partition.reasons import partly_frozen
from ndonnx.partition.removable import removed_by_width
from ndonnx.report.drawing import draw, shorten
from ndonnx.report.piece import Piece
from ndonnx.runtime.atomic import atomic_write


@dataclass(frozen=True)
class Coverage:
    """Part of the whole, 0 to 1, that lies in distillable neighbourhoods, and the part of it that can go.

    A weight that several neighbourhoods read counts once.
    """

    parameters: float
    macs: float | None
    """None where MACs cannot be told."""
    removable: float | None = None
    """Part of all parameters that the smallest students are without together."""


@dataclass(frozen=True)
class Inspection:
    """A model and its neighbourhoods, in order."""

    model: str
    opset: int
    parameters: int
    macs: int | None
    """Multiply-accumulates for one sample; None where they depend on a size that nothing states."""
    neighbourhoods: list[Piece]
    coverage: Coverage
    smallest: str | None = None
    """The student that `removable` counts, as `width 0.1`."""
    shapes: dict[str, list[int]] | None = None
    """Shape of each input in the run that MACs are told for."""
    open_sizes: list[str] = field(default_factory=list)
    """Sizes that nothing states, as `x[2] (height)`, for want of which MACs are not told."""
    data: DataLook | None = None
    """The first samples of the data and the model's answers to them; None without data."""

    @classmethod
    def of(
        cls, model: str, parts: Partition, parity: Mapping[str, float] | None = None, recipe: Recipe | None = None
    ) -> Inspection:
        """Look at a partition.

        Args:
            model: the name to show.
            parts: its partition.
            parity: what a check has found, by neighbourhood.
            recipe: the method whose smallest student says what can go.
        """
        cost, shapes = parts.whole, parts.shapes.inputs
        opsets = parts.model.opset_imports
        smallest = _Smallest.of(recipe or Recipe())
        removed = {n.name: smallest.removed(n) for n in parts.distillable} if smallest is not None else None
        return cls(
            model=model,
            opset=opsets[""] if "" in opsets else opsets["ai.onnx"],
            parameters=cost.parameters,
            macs=cost.macs,
            neighbourhoods=[_piece(n, parts, (parity or {}).get(n.name), removed) for n in parts.neighbourhoods],
            coverage=Coverage(*parts.coverage(), _part_of(removed, cost.parameters)),
            smallest=None if smallest is None else smallest.name,
            shapes=None if shapes is None else {name: list(shape) for name, shape in shapes.items()},
            open_sizes=list(parts.shapes.open),
        )

    def to_json(self) -> dict[str, Any]:
        """As one JSON document."""
        return asdict(self)

    def to_svg(self) -> str:
        """The neighbourhoods from top to bottom; the width of a box is its share of the parameters."""
        title = f"{shorten(self.model)}: opset {self.opset}, {self.parameters:,} parameters"
        return draw(f"Neighbourhoods of {self.model}", title, self.coverage.parameters, self.neighbourhoods)

    def write_svg(self, path: Path) -> None:
        """Write the drawing, whole or not at all.

        Raises:
            RunDirError: it cannot be written there.
        """
        atomic_write(path, self.to_svg().encode("utf-8"))


@dataclass(frozen=True)
class _Smallest:
    """The smallest student that a search tries by default, by the recipe's method."""

    keep: float
    round_to: int | None

    @classmethod
    def of(cls, recipe: Recipe) -> _Smallest | None:
        """None where it takes the data, or the student itself, to tell what goes."""
        return cls(min(_SMALLEST, recipe.part_kept), recipe.round_to) if recipe.method == "width" else None

    @property
    def name(self) -> str:
        return f"width {self.keep:g}"

    def removed(self, neighbourhood: Neighbourhood) -> dict[str, int]:
        return removed_by_width(neighbourhood.nodes, neighbourhood.groups, self.keep, self.round_to)


_SMALLEST = 0.1
"""The smallest multiplier of the paper's candidates."""


def _part_of(removed: Mapping[str, Mapping[str, int]] | None, whole: int) -> float | None:
    """Part of all parameters that goes; of a weight in several neighbourhoods the most that one of them loses."""
    if removed is None:
        return None
    once: dict[str, int] = {}
    for weights in removed.values():
        for name, count in weights.items():
            once[name] = max(count, once.get(name, 0))
    return sum(once.values()) / max(1, whole)


def _piece(
    neighbourhood: Neighbourhood,
    parts: Partition,
    parity: float | None,
    removed: Mapping[str, Mapping[str, int]] | None,
) -> Piece:
    cost = parts.cost(neighbourhood)
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
        removable=None if removed is None else sum(removed.get(neighbourhood.name, {}).values()),
        student_of=neighbourhood.first,
    )
