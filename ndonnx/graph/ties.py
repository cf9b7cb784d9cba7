"""Weights that are one, though a graph reads them under several names: by `Identity`, transposed, or in another shape.

Exporters tie an output layer to an embedding, or a decoder to its encoder, by an operator on the weight. Folded like
any other constant, the result would be a second weight that knows nothing of the first.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import onnx_ir as ir

_DOMAINS = ("", "ai.onnx")
VIEWS = {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
"""Operators whose output holds the very numbers of their first input."""
_RESHAPING = {"Flatten", "Reshape", "Squeeze", "Unsqueeze"}
"""Those that keep the order of the numbers."""
_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}


def unite_views(graph: ir.Graph) -> None:
    """Let equal views of a constant be one, and an `Identity` of it the constant itself. In place, at the top level.

    An `Identity` of what nothing else reads stays: folding gives the constant its name.
    """
    while _unite_once(graph):
        pass


def _unite_once(graph: ir.Graph) -> bool:
    """One pass; whether anything was united, so that more may be equal now."""
    found: dict[Hashable, ir.Value] = {}
    changed = False
    for node in list(graph):
        source, value = node.inputs[0] if _is_view(node) else None, node.outputs[0]
        if source is None or not _is_constant(origin_of(source)) or value.is_graph_output():
            continue
        if (before := _reshaped_from(node)) is not None:
            node.replace_input_with(0, before)
            source, changed = before, True
        same = found.setdefault(_signature(node), value)
        if (node.op_type == "Identity" and _is_shared(source)) or _keeps_shape(node):
            same = source
        if same is not value:
            value.replace_all_uses_with(same)
            graph.remove(node, safe=True)
            changed = True
    return changed


def _reshaped_from(node: ir.Node) -> ir.Value | None:
    """What a `Reshape` of something reshaped could read as well: what that was made of. None for anything else."""
    shape = _sizes(node)
    before = node.inputs[0].producer() if shape is not None and node.inputs[0] is not None else None
    if shape is None or 0 in shape or before is None or before.op_type not in _RESHAPING or not _is_view(before):
        return None
    return before.inputs[0]


def _keeps_shape(node: ir.Node) -> bool:
    """Whether a `Reshape` of an initializer, or of a transpose of one, gives the shape that it has."""
    found, shape = transposed(node.inputs[0]), _sizes(node)
    if found is None or shape is None:
        return False
    weight, axes = found
    assert weight.const_value is not None
    sizes = weight.const_value.shape.numpy()
    same = len(shape) == len(axes) and all(n in (-1, sizes[axis]) for n, axis in zip(shape, axes, strict=True))
    return same and _is_shared(weight)


def _sizes(node: ir.Node) -> tuple[int, ...] | None:
    """The constant shape that a `Reshape` gives; None for anything else."""
    if node.op_type != "Reshape" or not _is_view(node) or len(node.inputs) < 2:  # before opset 5 it is an attribute
        return None
    tensor = _tensor(node.inputs[1]) if node.inputs[1] is not None else None
    return None if tensor is None else tuple(int(size) for size in tensor.numpy().reshape(-1))


def is_tie(node: ir.Node) -> bool:
    """Whether a node is a view of a matrix that something else reads too: it is recomputed, never folded.

    Views of vectors (a bias that is reshaped) are folded all the same: they weigh next to nothing.
    """
    if not _is_view(node) or node.outputs[0].is_graph_output():
        return False
    source = node.inputs[0]
    if source is None or not _is_shared(source):
        return False
    tensor = _tensor(source)
    dtype, shape = (tensor.dtype, tensor.shape) if tensor is not None else (source.dtype, source.shape)
    if dtype not in _FLOATS or shape is None:
        return False
    return sum(size != 1 for size in shape) > 1


def _is_shared(value: ir.Value) -> bool:
    """Whether more than one reads a value, an output of the model among them."""
    return len(value.uses()) + value.is_graph_output() > 1


def origin_of(value: ir.Value) -> ir.Value:
    """The constant that a value is a view of; the value itself where it is none."""
    origin = value
    while (node := origin.producer()) is not None and _is_view(node) and node.inputs[0] is not None:
        origin = node.inputs[0]
    return origin if _is_constant(origin) else value


def transposed(value: ir.Value | None) -> tuple[ir.Value, tuple[int, ...]] | None:
    """The initializer that a value is or is a transpose of, and for each axis of the value the initializer's axis.

    None for anything else.
    """
    moves: list[ir.Attr | None] = []
    while value is not None and not value.is_initializer():
        node = value.producer()
        if node is None or node.op_type != "Transpose" or node.domain not in _DOMAINS or not node.inputs:
            return None
        moves.append(node.attributes.get("perm"))
        value = node.inputs[0]
    if value is None or value.const_value is None:
        return None
    axes = tuple(range(len(value.const_value.shape)))
    for move in reversed(moves):
        order = tuple(reversed(range(len(axes)))) if move is None else move.value
        if not isinstance(order, tuple) or sorted(order) != list(range(len(axes))):
            return None
        axes = tuple(axes[axis] for axis in order)
    return value, axes


def _is_view(node: ir.Node) -> bool:
    if node.op_type not in VIEWS or node.domain not in _DOMAINS or not node.inputs:
        return False
    return all(value is None or _is_constant(value) for value in node.inputs[1:])


def _is_constant(value: ir.Value) -> bool:
    return _tensor(value) is not None


def _tensor(value: ir.Value) -> ir.TensorProtocol | None:
    try:
        return value.const_value if value.is_initializer() else ir.convenience.get_const_tensor(value)
    except (TypeError, ValueError):  # a `Constant` that holds none, of a graph that nobody has checked
        return None


def _signature(node: ir.Node) -> Hashable:
    """Equal for nodes that compute the same."""
    further: list[Hashable] = []
    for value in node.inputs[1:]:
        tensor = _tensor(value) if value is not None else None
        further.append(None if tensor is None else (str(tensor.dtype), np.asarray(tensor.numpy()).tobytes()))
    attributes = tuple(sorted((name, repr(attribute.value)) for name, attribute in node.attributes.items()))
    return node.op_type, node.inputs[0], tuple(further), attributes
