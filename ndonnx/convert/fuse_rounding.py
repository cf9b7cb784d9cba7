"""A pair of `QuantizeLinear` and `DequantizeLinear` as the one operator that torch rounds with in a single pass."""

from __future__ import annotations

import onnx_ir as ir

from ndonnx.convert.operators.rounding import ROUNDED
from ndonnx.graph.costs import constant_of


def fuse_rounding(graph: ir.Graph) -> None:
    """Put `QuantizeDequantize` in the place of each pair with one constant scale and zero point. In place."""
    for node in list(graph):
        if node.op_type == "DequantizeLinear" and (first := _other_half(node)) is not None:
            made = ir.node(ROUNDED, [first.inputs[0], *node.inputs[1:3]])
            old, new = node.outputs[0], made.outputs[0]
            new.name, new.type, new.shape = old.name, old.type, old.shape
            old.name = None
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            graph.insert_before(node, made)
            graph.remove([node, first], safe=True)


def _other_half(node: ir.Node) -> ir.Node | None:
    """The `QuantizeLinear` before a node, where nothing else reads it and both have the same parameters."""
    maker = None if node.inputs[0] is None else node.inputs[0].producer()
    if maker is None or maker.op_type != "QuantizeLinear" or len(list(maker.outputs[0].uses())) != 1:
        return None
    if len(node.inputs) < 3 or maker.outputs[0].is_graph_output():
        return None
    tensors = [constant_of(value) for value in node.inputs[1:3]]
    same = list(maker.inputs[1:3]) == list(node.inputs[1:3])
    return maker if same and all(tensor is not None and tensor.size == 1 for tensor in tensors) else None
