"""Starting weights of a student."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import numpy as np
import onnx_ir as ir

from ndonnx.graph.costs import is_weight

Init = Literal["teacher", "least-squares", "random"]


def randomise(model: ir.Model, rng: np.random.Generator, held: Collection[str] = ()) -> ir.Model:
    """Draw the weights of linear operators anew (He et al. 2015); biases, scales, slopes and `held` weights stay."""
    copy = model.clone()
    drawn = {value for name, value in copy.graph.initializers.items() if name in held}
    for node in copy.graph:
        value = node.inputs[1] if node.op_type in _LINEAR_OPS and len(node.inputs) > 1 else None
        if value is None or value in drawn or not is_weight(value) or value.const_value is None:
            continue
        drawn.add(value)
        shape = tuple(int(d) for d in value.const_value.shape.numpy())
        array = rng.normal(0.0, np.sqrt(2.0 / _fan_in(node, shape)), shape)
        value.const_value = ir.tensor(array.astype(value.const_value.dtype.numpy()), name=value.name)
    return copy


_LINEAR_OPS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


def _fan_in(node: ir.Node, shape: tuple[int, ...]) -> int:
    """Inputs that one output of a linear operator sums over."""
    if node.op_type == "Conv":
        return int(np.prod(shape[1:]))
    if node.op_type == "ConvTranspose":
        return int(shape[0] * np.prod(shape[2:]))
    transposed = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int() == 1
    return shape[-1] if transposed else shape[-2] if len(shape) > 1 else shape[0]
