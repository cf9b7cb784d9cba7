"""Which values can be the ends of a neighbourhood: those that the model has, with samples that can be told apart."""

from __future__ import annotations

import onnx_ir as ir

from ndonnx.graph.interface import NOWHERE, sample_axis
from ndonnx.graph.passes.fused_writer import is_inside_fused


def can_be_boundary(value: ir.Value) -> bool:
    """Whether a value of a working copy can be captured, and a student can read or make it, as far as is known."""
    is_tensor = isinstance(value.type, ir.TensorType)  # no sequence, no map, and nothing whose type nobody knows
    return is_tensor and not is_inside_fused(value) and sample_axis(value) != NOWHERE
