"""Writes ONNX's own operators in the place of one that onnxruntime fused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

_INSIDE = "ndonnx.inside_fused"
"""Key of a value's metadata."""
AXES_INPUTS_SINCE = 13
"""Opset from which `Unsqueeze` and `ReduceSum` take their axes as an input."""
_LAYER_NORM_SINCE, _REDUCTION_INPUTS_SINCE = 17, 18
"""Opsets."""
_PART = "ndonnx.part_of"
"""Key of a value's metadata: the weight that it is a part of, and which."""

Outputs = tuple[ir.Value | None, ...] | None
"""By the fused operator's outputs; None where its form is not known."""


def is_inside_fused(value: ir.Value) -> bool:
    """Whether a value of the working copy lies inside an operator of the model, which does not have it by itself."""
    return bool(value.meta.get(_INSIDE, False))


@dataclass(eq=False)
class Writer:
    """Writes operators in front of the fused one."""

    graph: ir.Graph
    node: ir.Node
    opset: int
    count: int = 0
    made: list[ir.Node] = field(default_factory=list)

    def op(
        self,
        op: str,
        *inputs: ir.Value | None,
        dtype: ir.DataType = ir.DataType.FLOAT,
        **attributes: float | int | str | Sequence[int],
    ) -> ir.Value:
        """One operator with one output."""
        made = ir.node(op, list(inputs), attributes=attributes, name=self._name())
        value = made.outputs[0]
        value.name, value.meta[_INSIDE] = made.name, True
        value.type = ir.TensorType(dtype)
        self.graph.insert_before(self.node, made)
        self.made.append(made)
        return value

    def number(self, number: float) -> ir.Value:
        """A scalar."""
        return self.constant(np.array(number, np.float32))

    def ints(self, *numbers: int) -> ir.Value:
        """A list of 64-bit integers."""
        return self.constant(np.array(numbers, np.int64))

    def constant(self, array: np.ndarray) -> ir.Value:
        """An initializer."""
        name = self._name()
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        self.graph.register_initializer(value)
        return value

    def part(self, whole: ir.Value, position: int, array: np.ndarray) -> ir.Value:
        """A part of a weight as an initializer; one for all operators that read the weight."""
        name, key = f"{whole.name}/part{position}", (whole.name, position)
        held = self.graph.initializers.get(name)
        if held is None or held.meta.get(_PART) != key or held.const_value is None:
            held = self.constant(array)
            if name not in self.graph.initializers:
                held.name = name
            held.meta[_PART] = key
        return held

    def unsqueezed(self, x: ir.Value, *axes: int, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """New axes of size 1."""
        if self.opset < AXES_INPUTS_SINCE:
            return self.op("Unsqueeze", x, axes=axes, dtype=dtype)
        return self.op("Unsqueeze", x, self.ints(*axes), dtype=dtype)

    def length(self, x: ir.Value, axis: int) -> ir.Value:
        """Length of an axis, a scalar."""
        whole = self.op("Shape", x, dtype=ir.DataType.INT64)
        return self.op("Gather", whole, self.constant(np.array(axis, np.int64)), dtype=ir.DataType.INT64)

    def layer_norm(self, x: ir.Value, scale: ir.Value | None, shift: ir.Value | None, epsilon: float) -> ir.Value:
        """A layer normalisation over the last axis, in the form that onnxruntime fuses where ONNX does not have it."""
        if self.opset >= _LAYER_NORM_SINCE:
            sides = [scale] if shift is None else [scale, shift]
            return self.op("LayerNormalization", x, *sides, axis=-1, epsilon=epsilon)
        out = self.scaled(self.op("Sub", x, self.mean(x)), scale, epsilon)
        return out if shift is None else self.op("Add", out, shift)

    def scaled(self, x: ir.Value, scale: ir.Value | None, epsilon: float) -> ir.Value:
        """x over the root of its mean square along the last axis, times a scale."""
        root = self.op("Sqrt", self.op("Add", self.mean(self.op("Pow", x, self.number(2))), self.number(epsilon)))
        return self.op("Mul", self.op("Div", x, root), scale)

    def mean(self, x: ir.Value) -> ir.Value:
        """Along the last axis."""
        if self.opset < _REDUCTION_INPUTS_SINCE:
            return self.op("ReduceMean", x, axes=[-1], keepdims=1)
        return self.op("ReduceMean", x, self.ints(-1), keepdims=1)

    def finish(self, outputs: Sequence[ir.Value | None]) -> None:
        """Give the new values the names and the readers of the fused operator's outputs, and remove it."""
        for old, new in zip(self.node.outputs, outputs, strict=False):
            if new is not None and (old.uses() or old.is_graph_output()):
                name, new.type, new.shape = old.name, old.type or new.type, old.shape or new.shape
                old.name, new.name = f"{name}/fused", name
                old.replace_all_uses_with(new, replace_graph_outputs=True)
                new.meta[_INSIDE] = False
        self.graph.remove(self.node, safe=True)

    def discard(self) -> None:
        """Take back what was written: the operator's form is not known after all."""
        for made in reversed(self.made):
            self.graph.remove(made, safe=True)

    def _name(self) -> str:
        self.count += 1
        return f"{next(value.name for value in self.node.outputs if value.name)}/part{self.count}"


def input_of(node: ir.Node, position: int) -> ir.Value | None:
    """An input; None where it is left out."""
    return node.inputs[position] if position < len(node.inputs) else None


def number_of(node: ir.Node, name: str, default: float) -> float:
    """An attribute that is a number."""
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)


def is_read(node: ir.Node, position: int) -> bool:
    """Whether anything reads an output."""
    value = node.outputs[position] if position < len(node.outputs) else None
    return value is not None and bool(value.uses() or value.is_graph_output())
