"""Groups of nodes that runtimes fuse into one operator when they meet them whole: nothing is taken out of them."""

from __future__ import annotations

import onnx_ir as ir

from ndonnx.graph.costs import constant_of

_ROOTS = {"Pow", "Reciprocal", "Sqrt"}
_CURVES = {"Erf", "Tanh"}
_GAIN_AND_BIAS = 2


def is_part_of_norm(value: ir.Value) -> bool:
    """Whether a value is divided by a root of its own moments, with a gain and a bias behind it or without."""
    for _ in range(_GAIN_AND_BIAS + 1):
        node = value.producer()
        if node is None or node.op_type not in ("Add", "Div", "Mul"):
            return False
        computed = [side for side in node.inputs if side is not None and constant_of(side) is None]
        if len(computed) > 1:
            return any(_made_by(side, _ROOTS) is not None for side in computed)
        if not computed:
            return False
        value = computed[0]
    return False


def is_gelu(node: ir.Node | None) -> bool:
    """Whether a node multiplies by 1 plus an error function or a hyperbolic tangent."""
    if node is None or node.op_type != "Mul":
        return False
    sums = [made for side in node.inputs if (made := _made_by(side, {"Add", "Mul"})) is not None]
    return any(_made_by(side, _CURVES) is not None for made in sums for side in made.inputs)


def _made_by(value: ir.Value | None, operators: set[str]) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in operators else None
