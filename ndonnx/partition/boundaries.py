"""Which values can be the ends of a neighbourhood: those that the model has, with the samples along the first axis."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from ndonnx.graph.dataflow import Dataflow
from ndonnx.graph.fused import is_inside_fused
from ndonnx.graph.sizes import factors


def batch_names(flow: Dataflow) -> frozenset[str]:
    """Names of the first axes of the stream inputs; empty where the model fixes its batch."""
    firsts = (value.shape[0] for value in flow.graph.inputs if value.name in flow.stream_inputs and value.shape)
    return frozenset(size.value for size in firsts if isinstance(size, ir.SymbolicDim) and size.value is not None)


def can_be_boundary(value: ir.Value, batch: Collection[str]) -> bool:
    """Whether a value can be captured, and a student can read or make it, as far as the graph tells.

    Args:
        value: of a working copy.
        batch: see `batch_names`.
    """
    return not is_inside_fused(value) and not _stands_elsewhere(value, batch)


def _stands_elsewhere(value: ir.Value, batch: Collection[str]) -> bool:
    """Whether the samples lie along another axis than the first, as the shape tells (steps first, say)."""
    if value.shape is None or not batch:
        return False
    holding = [_holds(size if isinstance(size, int) else size.value, batch) for size in value.shape]
    return True in holding[1:] and holding[0] is False


def _holds(size: int | str | None, batch: Collection[str]) -> bool | None:
    """Whether a size is the batch's or a multiple of it; None where it is unknown."""
    return None if size is None else any(name in batch for name in factors(size)[1])
