"""Activations that exporters spell in several operators, as the one that torch computes in a single pass.

A hard swish in four operators is a fifth of a training step of a mobile network: each of them reads and writes
the whole feature map, forwards and again for the gradient.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from ndonnx.graph.costs import constant_of

_SHIFT, _RANGE = 3.0, 6.0
"""Of the hard sigmoid min(max(x + 3, 0), 6) / 6 that mobile networks have."""
_CLOSE = 1e-6
"""Relative difference of a constant in a file from what is meant."""


def fuse_activations(graph: ir.Graph) -> None:
    """Put `HardSigmoid` and `HardSwish` in the place of what computes them from sums, clips and products. In place."""
    for node in list(graph):
        if node.graph is graph:
            _fuse_sigmoid(graph, node)
    for node in list(graph):
        if node.graph is graph:
            _fuse_swish(graph, node)


def _fuse_sigmoid(graph: ir.Graph, node: ir.Node) -> None:
    """clip(x + 3, 0, 6) divided by 6, at once or behind a product with x: `HardSigmoid`."""
    clipped = _shifted(node)
    if clipped is None or (reader := _only_reader(node)) is None:
        return
    if _divides(reader, node.outputs[0]):
        _replace(graph, reader, "HardSigmoid", [clipped], [node, node.inputs[0]])
        return
    if reader.op_type != "Mul" or _other(reader, node.outputs[0]) is not clipped:
        return
    end = _only_reader(reader)
    if end is not None and _divides(end, reader.outputs[0]):
        _replace(graph, end, "HardSwish", [clipped], [reader, node, node.inputs[0]])


def _fuse_swish(graph: ir.Graph, node: ir.Node) -> None:
    """x times its `HardSigmoid`: `HardSwish`."""
    if node.op_type != "HardSigmoid" or not _is_mobile(node) or (reader := _only_reader(node)) is None:
        return
    data = node.inputs[0]
    if data is not None and reader.op_type == "Mul" and _other(reader, node.outputs[0]) is data:
        _replace(graph, reader, "HardSwish", [data], [node])


def _shifted(node: ir.Node) -> ir.Value | None:
    """The x of a node that computes clip(x + 3, 0, 6); None of any other."""
    if node.op_type != "Clip" or not _are(_bounds(node), (0.0, _RANGE)):
        return None
    before = node.inputs[0].producer() if node.inputs[0] is not None else None
    if before is None or before.op_type != "Add" or _only_reader(before) is not node:
        return None
    for value, other in (before.inputs, reversed(before.inputs)):
        if value is not None and _are((_scalar(other),), (_SHIFT,)):
            return value
    return None


def _bounds(node: ir.Node) -> tuple[float | None, float | None]:
    if len(node.inputs) == 1:  # before opset 11
        found = [node.attributes[name].as_float() if name in node.attributes else None for name in ("min", "max")]
    else:
        found = [_scalar(value) for value in (*node.inputs[1:], None)]
    return found[0], found[1]


def _divides(node: ir.Node, value: ir.Value) -> bool:
    """Whether a node is the value divided by 6."""
    if node.op_type == "Div":
        return node.inputs[0] is value and _are((_scalar(node.inputs[1]),), (_RANGE,))
    return node.op_type == "Mul" and _are((_scalar(_other(node, value)),), (1 / _RANGE,))


def _is_mobile(node: ir.Node) -> bool:
    slope, offset = (node.attributes.get_float(name, default) for name, default in (("alpha", 0.2), ("beta", 0.5)))
    return _are((slope, offset), (1 / _RANGE, _SHIFT / _RANGE))


def _are(found: tuple[float | None, ...], meant: tuple[float, ...]) -> bool:
    return all(a is not None and math.isclose(a, b, rel_tol=_CLOSE) for a, b in zip(found, meant, strict=True))


def _scalar(value: ir.Value | None) -> float | None:
    tensor = constant_of(value)
    return float(tensor.numpy().reshape(())) if tensor is not None and tensor.size == 1 else None


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The input of a node with two that is not this one."""
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _only_reader(node: ir.Node | None) -> ir.Node | None:
    """The one node that reads a node's output once; None where there are more, or it is an output of the graph."""
    if node is None or len(node.outputs) != 1 or node.outputs[0].is_graph_output():
        return None
    uses = list(node.outputs[0].uses())
    return uses[0].node if len(uses) == 1 else None


def _replace(
    graph: ir.Graph, end: ir.Node, kind: str, inputs: list[ir.Value], before: list[ir.Node | ir.Value | None]
) -> None:
    """Put one operator in the place of the last of several, under its output's name; the others go."""
    attributes = {"alpha": 1 / _RANGE, "beta": _SHIFT / _RANGE} if kind == "HardSigmoid" else {}
    made = ir.node(kind, inputs, attributes=attributes)
    old, new = end.outputs[0], made.outputs[0]
    new.name, new.type, new.shape = old.name, old.type, old.shape
    old.name = None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.insert_before(end, made)
    nodes = [each if isinstance(each, ir.Node) else each.producer() for each in before if each is not None]
    graph.remove([end, *(node for node in nodes if node is not None)], safe=True)
