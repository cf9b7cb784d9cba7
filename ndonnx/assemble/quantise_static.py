"""A model in 8 bits with ranges known beforehand: a `QuantizeLinear` and a `DequantizeLinear` around its operators.

Every value that an integer operator reads or makes is quantised once, for all its readers. onnxruntime merges the pairs
and the operators between them. An operator that is to stay in float has no pair of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ndonnx.assemble.quantise_numbers import (
    Weights,
    activation_scale,
    least_scales,
    quantise_activation,
    quantise_bias,
)
from ndonnx.assemble.quantise_ranges import Range

LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
ACTIVATIONS = frozenset({"Relu", "Clip"})
"""What the range of the value behind stands for: the value before needs none."""
MOVING = frozenset({
    "Flatten", "Gather", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip
"""Operators that hand integers on: what they make has the scale of what they read."""
FURTHER = frozenset({
    "Add", "AveragePool", "Concat", "GlobalAveragePool", "LeakyRelu", "Mul", "Sigmoid", "Softmax",
})  # fmt: skip
"""Other operators that onnxruntime computes with integers."""
_FLOATS = (ir.DataType.FLOAT,)
_FLOAT_ENDS = frozenset({"Gemm", "MatMul"})
"""Operators on integers that may answer in float."""

Parameters = tuple[np.float32, np.uint8]


class StaticQuantiser:
    """Quantises a model in place."""

    def __init__(
        self, model: ir.Model, range_of: Callable[[str], Range | None], weights: Weights, narrow: bool
    ) -> None:
        """Take a model to be changed, the ranges of its values by name, and where weights in 8 bits are kept."""
        self._model = model
        self._graph = model.graph
        self._range_of = range_of
        self._weights = weights
        self._narrow = narrow
        self._scales: dict[ir.Value, Parameters] = {}
        """Of the values that are quantised."""
        self._nodes: dict[ir.Node, None] = {}
        """Operators on integers, in the order of the graph: the same student is the same bytes."""

    def run(self, types: Collection[str], kept: Collection[str]) -> None:
        """Quantise the operators of these types but for the nodes of these names."""
        self._mark_all(types, kept)
        for node in self._nodes:
            if node.op_type in LINEAR:
                self._write_weights(node)
            else:
                self._write_constants(node)
        self._write_pairs()

    def round_values(self, types: Collection[str], kept: Collection[str]) -> dict[str, int]:
        """Quantise what the same operators read and make, and leave their weights as they are.

        Returns:
            The weights that `run` has in integers, by name, with the axis of their output channels.
        """
        self._mark_all(types, kept)
        weights = {node: node.inputs[1] for node in self._nodes if node.op_type in LINEAR}
        self._write_pairs()
        return {
            value.name or "": _channel_axis(node)
            for node, value in weights.items()
            if value is not None and _is_constant(value)
        }

    def _mark_all(self, types: Collection[str], kept: Collection[str]) -> None:
        for node in list(self._graph):
            if node.domain == "" and node.op_type in types and node.name not in kept:
                self._mark(node)
        for value in list(self._scales):
            if self._is_merged(value):
                del self._scales[value]

    def _write_pairs(self) -> None:
        for value, parameters in self._scales.items():
            self._write_pair(value, parameters)

    def _mark(self, node: ir.Node) -> None:
        """Note which values have to be integers for this operator; none, where it cannot have them."""
        read = [v for v in node.inputs[: _reads(node)] if v is not None and v.dtype in _FLOATS]
        computed = [value for value in read if not _is_constant(value)]
        known = any(value in self._scales for value in computed)
        if not computed or node.outputs[0].dtype not in _FLOATS or not (known or node.op_type in LINEAR):
            return
        shared = self._scales[computed[0]] if node.op_type in MOVING else None
        new = {value: self._scales.get(value) or self._parameters(value) for value in computed}
        new |= {value: shared or self._parameters(value) for value in node.outputs if value.name}
        if any(parameters is None for parameters in new.values()):
            return
        self._scales |= {value: parameters for value, parameters in new.items() if parameters is not None}
        self._nodes[node] = None

    def _parameters(self, value: ir.Value) -> Parameters | None:
        ends = self._range_of(value.name or "")
        return None if ends is None else activation_scale(ends)

    def _is_merged(self, value: ir.Value) -> bool:
        """Whether a value of an integer operator needs no scale: an activation follows at once, or the model ends."""
        maker, readers = value.producer(), [use.node for use in value.uses()]
        if maker not in self._nodes or maker is None:
            return False
        if value.is_graph_output():
            return maker.op_type in _FLOAT_ENDS and not readers
        activation = len(readers) == 1 and readers[0].op_type in ACTIVATIONS and readers[0] in self._nodes
        return activation and maker.op_type in LINEAR | {"Add"}

    def _write_weights(self, node: ir.Node) -> None:
        """Let a linear operator read integer weights and, where its input has a scale, an integer bias."""
        weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
        if weight is None or not _is_constant(weight):
            self._write_constants(node)
            return
        axis, numbers = _channel_axis(node), _numbers(weight)
        read = None if node.inputs[0] is None else self._scales.get(node.inputs[0])
        shift = self._bias_of(node, bias, numbers.shape[axis])
        least = 0.0 if shift is None or read is None else least_scales(shift, read[0])
        integers, scales = self._weights.of(weight.name or "", numbers, axis, self._narrow, least)
        zeros = np.zeros(scales.shape, np.int8)
        name = f"{node.name}/{weight.name}"
        node.replace_input_with(1, self._constant(name, integers, scales, zeros, axis, node))
        if shift is not None and read is not None:
            steps = (read[0] * scales).astype(np.float32)
            integers_of_bias = quantise_bias(shift, steps)
            zeros_of_bias = np.zeros(steps.shape, np.int32)
            found = self._constant(f"{node.name}/bias", integers_of_bias, steps, zeros_of_bias, 0, node)
            node.replace_input_with(2, found)

    def _bias_of(self, node: ir.Node, bias: ir.Value | None, channels: int) -> NDArray[np.float32] | None:
        """The bias of a layer, (channels,), where it can be an integer."""
        if bias is None or not _is_constant(bias):
            return None
        plain = all(_factor(node, name) == 1 for name in ("alpha", "beta"))
        numbers = _numbers(bias)
        return numbers if plain and numbers.shape == (channels,) else None

    def _write_constants(self, node: ir.Node) -> None:
        """Let an operator read its floating-point constants as integers too."""
        for place, value in enumerate(node.inputs[: _reads(node)]):
            if value is not None and value.dtype in _FLOATS and _is_constant(value):
                integers, scale, zero = quantise_activation(_numbers(value))
                name = f"{node.name}/{value.name}"
                found = self._constant(name, integers, np.asarray(scale), np.asarray(zero), None, node)
                node.replace_input_with(place, found)

    def _constant(
        self,
        name: str,
        integers: NDArray[np.generic],
        scales: NDArray[np.float32],
        zeros: NDArray[np.generic],
        axis: int | None,
        before: ir.Node,
    ) -> ir.Value:
        """A quantised constant, as a float value for one node."""
        held = [
            self._initializer(f"{name}/{what}", array)
            for what, array in (("quantised", integers), ("scale", scales), ("zero_point", zeros))
        ]
        attributes = {} if axis is None or not scales.shape else {"axis": axis}
        node = ir.node("DequantizeLinear", held, attributes, name=f"{name}/dequantise")
        node.outputs[0].name = f"{name}/dequantised"
        self._graph.insert_before(before, node)
        return node.outputs[0]

    def _initializer(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        tensor = ir.tensor(np.asarray(array), name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        self._graph.register_initializer(value)
        return value

    def _write_pair(self, value: ir.Value, parameters: Parameters) -> None:
        """Let the readers of a value read it as it is in 8 bits."""
        name, maker = value.name or "", value.producer()
        made = maker in self._nodes
        uses = [use for use in value.uses() if made or use.node in self._nodes]
        is_end = made and value.is_graph_output()
        if not uses and not is_end:
            return
        scale, zero = (
            self._initializer(f"{name}/{what}", np.asarray(number))
            for what, number in zip(("scale", "zero_point"), parameters, strict=True)
        )
        quantise = ir.node("QuantizeLinear", [value, scale, zero], name=f"{name}/quantise")
        dequantise = ir.node("DequantizeLinear", [quantise.outputs[0], scale, zero], name=f"{name}/dequantise")
        quantise.outputs[0].name, dequantise.outputs[0].name = f"{name}/quantised", f"{name}/dequantised"
        for use in uses:
            use.node.replace_input_with(use.idx, dequantise.outputs[0])
        if maker is None:
            self._graph.insert_before(next(iter(self._graph)), [quantise, dequantise])
        else:
            self._graph.insert_after(maker, [quantise, dequantise])
        if is_end:
            self._end_with(dequantise.outputs[0], value, name)

    def _end_with(self, new: ir.Value, old: ir.Value, name: str) -> None:
        for place, output in enumerate(self._graph.outputs):
            if output is old:
                self._graph.outputs[place] = new
        new.type, new.shape = old.type, old.shape
        old.name, new.name = f"{name}/float", name


def _reads(node: ir.Node) -> int:
    """How many of its inputs are what an operator computes with; the rest says how."""
    if node.op_type in LINEAR:
        return 2
    return 1 if node.op_type in MOVING | ACTIVATIONS else len(node.inputs)


def _is_constant(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is not None


def _numbers(value: ir.Value) -> NDArray[np.float32]:
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy(), np.float32)


def _factor(node: ir.Node, name: str) -> float:
    attribute = node.attributes.get(name)
    return 1.0 if attribute is None else attribute.as_float()


def _channel_axis(node: ir.Node) -> int:
    """Axis of a weight along which its output channels lie; of `ConvTranspose` with groups those of one group."""
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    if node.op_type == "MatMul":
        return len(weight.const_value.shape) - 1
    if node.op_type == "Gemm":
        turned = node.attributes.get("transB")
        return 0 if turned is not None and turned.as_int() else 1
    return 0 if node.op_type == "Conv" else 1
