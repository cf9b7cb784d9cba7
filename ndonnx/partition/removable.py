"""What can go: the weights that the smallest student of a neighbourhood is without, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from ndonnx.graph.costs import is_weight
from ndonnx.graph.dataflow import reads
from ndonnx.partition.channels.group import ChannelGroups, stays

_ROUNDED_FROM = 64
"""Widths from which a kept width is rounded by default."""
_ROUND_TO = 8
_INTEGER_STEP = 16
"""Multiple to which such widths are rounded where 8 bits follow: products of integers come in larger blocks."""


def kept_width(width: int, keep: float, round_to: int | None) -> int:
    """How many of `width` units are kept: `keep * width`, rounded to a multiple of `round_to`, at least one."""
    multiple = round_to if round_to is not None else (_ROUND_TO if width >= _ROUNDED_FROM else 1)
    multiple = min(multiple, width)
    return min(width, max(multiple, round(keep * width / multiple) * multiple))


def step_of_integers(widths: Sequence[int]) -> int | None:
    """What kept widths are rounded to where 8 bits follow; None, the usual, where a width is too small for more."""
    return _INTEGER_STEP if min(widths, default=0) >= _ROUNDED_FROM else None


def removed_by_width(
    nodes: Iterable[ir.Node], groups: ChannelGroups | None, keep: float, round_to: int | None = None
) -> dict[str, int]:
    """Elements that each weight of a slice loses when every channel group keeps the part `keep` of its units.

    Which units go makes no difference to how many elements go with them: those of a group are of equal standing.

    Args:
        nodes: of the slice.
        groups: its channel groups; None where it has none.
        keep: part of the units, above 0 to 1.
        round_to: kept widths become multiples of this, see `kept_width`.
    """
    if groups is None or not groups.groups:
        return {}
    kept = np.zeros(groups.units, dtype=bool)
    for group in groups.groups:
        kept[group.start : group.start + kept_width(group.width, keep, round_to)] = True
    sizes = {value.name or "": _shape(value) for node in nodes for value in reads(node) if is_weight(value)}
    left = {name: list(sizes[name]) for name in groups.weights() if name in sizes}
    for axis in groups.axes:
        if axis.initializer in left:
            rows = stays(axis.units, kept).reshape(-1, axis.units.shape[-1])
            left[axis.initializer][axis.axis] = int(rows[0].sum())
    counts = {name: math.prod(shape) for name, shape in left.items()}
    # A single number is no parameter.
    return {name: math.prod(sizes[name]) - (count if count > 1 else 0) for name, count in counts.items()}


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return tuple(int(size) for size in value.const_value.shape.numpy())
