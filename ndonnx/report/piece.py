"""One piece of a partitioned teacher, as a document or a drawing tells it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from ndonnx.partition import FrozenWidth

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
    macs: int | None
    """Multiply-accumulates for one sample; None where they cannot be told."""
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
    removable: int | None = None
    """Parameters that the smallest student is without; None for a method whose students are not known beforehand."""
    student_of: str | None = None
    """The neighbourhood with the same weights whose student stands here too; None: its own."""
