"""Factors and shifts behind a convolution, moved into its weights: what onnxruntime does when it opens a float model.

Once the weights are integers onnxruntime no longer does it, so it is done before a model is quantised.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[np.float32]
Double = NDArray[np.float64]

_DEFAULT_EPSILON = 1e-5


def fold_scales(model: ir.Model) -> ir.Model:
    """Fold batch norms, and products and sums with a constant per channel, into the `Conv` before them.

    Works in place on the main graph of a model whose constants are initializers, and returns it. What is folded is read
    by nothing else. The names of the values behind stay.
    """
    for node in list(model.graph):
        while node.op_type == "Conv" and node.domain == "" and _fold_next(model.graph, node):
            pass
    return model


def _fold_next(graph: ir.Graph, conv: ir.Node) -> bool:
    """Fold the one reader of a convolution into it; whether that could be done."""
    output = conv.outputs[0]
    readers = list(output.uses())
    if len(readers) != 1 or output.is_graph_output():
        return False
    weight = _numbers(conv.inputs[1])
    if weight is None:
        return False
    reader = readers[0].node
    found = _affine(reader, output, len(weight), weight.ndim)
    bias = np.zeros(len(weight), np.float32)
    if len(conv.inputs) > 2 and conv.inputs[2] is not None:
        given = _numbers(conv.inputs[2])
        if given is None:
            return False
        bias = given
    if found is None or reader.graph is not graph:
        return False
    factor, shift = found
    scaled = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
    _write(graph, conv, reader, scaled.astype(np.float32), (bias * factor + shift).astype(np.float32))
    return True


def _affine(node: ir.Node, read: ir.Value, channels: int, rank: int) -> tuple[Double, Double] | None:
    """Factor and shift of each channel, float64 (channels,), that a node makes of a value; None where it does not."""
    if node.domain != "" or len(node.outputs) != 1:
        return None
    if node.op_type == "BatchNormalization" and node.inputs[0] is read:
        return _of_norm(node)
    if node.op_type not in ("Mul", "Add") or len(node.inputs) != 2:
        return None
    other = node.inputs[1] if node.inputs[0] is read else node.inputs[0]
    numbers = None if other is read else _numbers(other)
    each = None if numbers is None else _by_channel(numbers, channels, rank)
    if each is None:
        return None
    return (each, np.zeros_like(each)) if node.op_type == "Mul" else (np.ones_like(each), each)


def _of_norm(node: ir.Node) -> tuple[Double, Double] | None:
    training = node.attributes.get("training_mode")
    given = [_numbers(value) for value in node.inputs[1:5]]
    if (training is not None and training.as_int()) or len(given) < 4 or any(each is None for each in given):
        return None
    scale, bias, mean, variance = (each.astype(np.float64) for each in given if each is not None)
    epsilon = node.attributes.get("epsilon")
    factor = scale / np.sqrt(variance + (_DEFAULT_EPSILON if epsilon is None else epsilon.as_float()))
    return factor, bias - mean * factor


def _by_channel(numbers: Array, channels: int, rank: int) -> Double | None:
    """Constants that are broadcast over all but the channels, as one for each channel."""
    if numbers.ndim > rank:
        return None
    shape = (1,) * (rank - numbers.ndim) + numbers.shape
    if shape[1] not in (1, channels) or any(size != 1 for axis, size in enumerate(shape) if axis != 1):
        return None
    return np.broadcast_to(numbers.reshape(-1), (channels,)).astype(np.float64)


def _numbers(value: ir.Value | None) -> Array | None:
    """The float32 numbers of an initializer."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return value.const_value.numpy() if value.const_value.dtype is ir.DataType.FLOAT else None


def _write(graph: ir.Graph, conv: ir.Node, reader: ir.Node, weight: Array, bias: Array) -> None:
    """Give a convolution other numbers, and the output of what it took in."""
    output, name = reader.outputs[0], reader.outputs[0].name or ""
    for place, (numbers, what) in enumerate(((weight, "weight"), (bias, "bias")), start=1):
        value = ir.Value(name=f"{name}/{what}", const_value=ir.tensor(numbers, name=f"{name}/{what}"))
        value.shape, value.dtype = ir.Shape(numbers.shape), ir.DataType.FLOAT
        graph.initializers.pop(value.name or "", None)
        graph.register_initializer(value)
        if place < len(conv.inputs):
            conv.replace_input_with(place, value)
        else:
            conv.resize_inputs(place + 1)
            conv.replace_input_with(place, value)
    inner = conv.outputs[0]
    output.replace_all_uses_with(inner, replace_graph_outputs=True)
    inner.type, inner.shape = output.type, output.shape
    graph.remove(reader, safe=True)
    inner.name = name
