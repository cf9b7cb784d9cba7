"""Lengths of axes as numbers in the graph: what reads them, from which value, and along which axes."""

from __future__ import annotations

import onnx_ir as ir

from ndonnx.graph.costs import constant_of

Axes = frozenset[int] | None
"""Axes of a value, counted from the front; None where its rank is not known, and it may be any of them."""


def lengths_read(node: ir.Node) -> tuple[ir.Value, Axes] | None:
    """The value whose lengths a node answers with, and along which axes; None where it answers with anything else.

    `Shape` and `Size`, and what picks from a `Shape` at once (`Gather`, `Slice`).
    """
    source = node if node.op_type in ("Shape", "Size") else _picked_from(node)
    value = source.inputs[0] if source is not None else None
    if value is None:
        return None
    return value, None if value.shape is None else frozenset(_positions(node, len(value.shape)))


def axes_measured(node: ir.Node) -> Axes:
    """Axes whose lengths are read by way of a `Shape` or a `Size`."""
    whole = lengths_read(node)
    if whole is None or node.outputs[0].is_graph_output():
        return None
    axes: frozenset[int] = frozenset()
    for user in node.outputs[0].consumers():
        read = lengths_read(user)
        if read is None or read[0] is not whole[0] or read[1] is None:
            return whole[1]
        axes |= read[1]
    return axes


def is_whole_shape(node: ir.Node) -> bool:
    """Whether a node is a `Shape` of all axes: onnxruntime writes down that it starts with the first."""
    start = node.attributes.get("start")
    return node.op_type == "Shape" and "end" not in node.attributes and (start is None or start.as_int() == 0)


def _picked_from(node: ir.Node) -> ir.Node | None:
    """The whole `Shape` that a `Gather` or a `Slice` picks numbers from."""
    if node.op_type not in ("Gather", "Slice") or node.inputs[0] is None:
        return None
    source = node.inputs[0].producer()
    return source if source is not None and is_whole_shape(source) else None


def _positions(node: ir.Node, rank: int) -> range | list[int]:
    """Which of a shape's numbers a node passes on; all of them where that is not known."""
    axes = range(rank)
    if node.op_type == "Gather" and (index := constant_of(node.inputs[1])) is not None:
        return [axes[int(i)] for i in index.numpy().reshape(-1)]
    if node.op_type == "Slice" and (len(node.inputs) < 5 or node.inputs[4] is None):
        starts, ends = _bound(node, "starts", 1), _bound(node, "ends", 2)
        if starts is not None and ends is not None:
            return axes[starts:ends]
    return axes


def _bound(node: ir.Node, name: str, position: int) -> int | None:
    """The one number of an attribute (before opset 10) or of a constant input."""
    if name in node.attributes:
        return int(node.attributes[name].as_ints()[0])
    tensor = constant_of(node.inputs[position]) if position < len(node.inputs) else None
    return int(tensor.numpy().reshape(-1)[0]) if tensor is not None else None
