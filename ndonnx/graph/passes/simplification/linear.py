"""Linear operators: which axis of the weight makes a channel, which one reads one, and where the bias stands."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from ndonnx.graph.passes.fused_writer import input_of, number_of
from ndonnx.graph.passes.simplification.editor import Array, Editor, rank_of

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_MATRIX = 2
"""Axes of a matrix."""


@dataclass(frozen=True)
class Linear:
    """A linear operator whose weight it alone reads."""

    editor: Editor
    node: ir.Node
    weight: ir.Value
    shape: tuple[int, ...]
    """Of the weight."""

    @cached_property
    def numbers(self) -> Array:
        """The weight; read when it is asked for, since it may be large."""
        assert self.weight.const_value is not None
        return self.weight.const_value.numpy().astype(np.float64)

    @property
    def is_conv(self) -> bool:
        """Whether channels lie along the second axis of the data."""
        return self.node.op_type in ("Conv", "ConvTranspose")

    @property
    def _turned(self) -> bool:
        return self.node.op_type == "Gemm" and bool(number_of(self.node, "transB", 0))

    @property
    def groups(self) -> int:
        """Groups of a convolution."""
        return int(number_of(self.node, "group", 1)) if self.is_conv else 1

    @property
    def axis(self) -> int:
        """Axis of the channels in the data and in the output, counted from the end."""
        return 1 - len(self.shape) if self.is_conv else -1

    @property
    def rank(self) -> int | None:
        """Axes of the output; None where that is not known."""
        if self.node.op_type == "MatMul":
            return rank_of(self.node.outputs[0])
        return len(self.shape)

    @property
    def outputs(self) -> int:
        """Channels that it makes."""
        if self.node.op_type == "ConvTranspose":
            return self.shape[1] * self.groups
        return self.shape[0 if self.node.op_type == "Conv" or self._turned else 1]

    @property
    def inputs(self) -> int:
        """Channels that it reads."""
        if self.node.op_type == "Conv":
            return self.shape[1] * self.groups
        return self.shape[1 if self._turned else 0]

    def scaled_outputs(self, scale: Array) -> Array:
        """The weight that makes each channel so many times as large; `scale` is () or (channels,)."""
        if not scale.ndim:
            return self.numbers * scale
        if self.node.op_type == "ConvTranspose":
            grouped = self.numbers.reshape(self.groups, -1, *self.numbers.shape[1:])
            return self._beside(grouped, scale.reshape(self.groups, 1, -1)).reshape(self.numbers.shape)
        return self._along(0 if self.node.op_type == "Conv" or self._turned else 1, scale)

    def scaled_inputs(self, scale: Array) -> Array:
        """The weight that takes each channel so many times as large; `scale` is () or (channels,)."""
        if not scale.ndim:
            return self.numbers * scale
        if self.node.op_type == "Conv":
            grouped = self.numbers.reshape(self.groups, -1, *self.numbers.shape[1:])
            return self._beside(grouped, scale.reshape(self.groups, 1, -1)).reshape(self.numbers.shape)
        return self._along(1 if self._turned else 0, scale)

    def answer_to(self, shift: Array) -> Array | None:
        """What a constant on the data, () or (channels,), adds to the output; None where that is not one constant."""
        node = self.node
        per_channel = np.broadcast_to(shift, (self.inputs,))
        if node.op_type == "Conv":
            if _pads(node):
                return None
            taps = self.numbers.reshape(self.groups, -1, self.numbers.shape[1], *self.numbers.shape[2:])
            summed = taps.sum(axis=tuple(range(3, taps.ndim)))
            found: Array = np.einsum("goi,gi->go", summed, per_channel.reshape(self.groups, -1)).reshape(-1)
            return found
        if node.op_type == "ConvTranspose":
            return None
        matrix = self.numbers.T if self._turned else self.numbers
        factor = number_of(node, "alpha", 1.0) if node.op_type == "Gemm" else 1.0
        return np.asarray(factor * (per_channel @ matrix))

    def bias(self) -> Array | None:
        """The bias as () or (channels,), zero where there is none; None where it cannot be changed."""
        held = None if self.node.op_type == "MatMul" else input_of(self.node, 2)
        if held is None:
            return np.zeros(())
        numbers = self.editor.numbers(held)
        if numbers is None or numbers.ndim > _MATRIX:
            return None
        rows = numbers.shape[0] if numbers.ndim == _MATRIX else 1
        if rows != 1 or numbers.size not in (1, self.outputs):
            return None
        return numbers.reshape(() if numbers.size == 1 and self.outputs != 1 else -1)

    @property
    def own_bias(self) -> int:
        """Elements of a bias that it alone reads."""
        held = None if self.node.op_type == "MatMul" else input_of(self.node, 2)
        tensor = self.editor.own_weight(held)
        return 0 if tensor is None else int(tensor.size)

    @property
    def shares_bias(self) -> bool:
        """Whether something else reads its bias, of which a copy would be one weight more."""
        return input_of(self.node, 2) is not None and not self.own_bias

    def set_bias(self, numbers: Array) -> None:
        """Give it another bias, (channels,) or ()."""
        held = input_of(self.node, 2)
        full = np.broadcast_to(numbers, (self.outputs,)).copy()
        if held is not None and self.editor.own_weight(held) is not None:
            self.editor.rewrite(held, full)
            return
        new = self.editor.constant(f"{self.weight.name}/bias", full, like=self.weight)
        while len(self.node.inputs) <= _MATRIX:
            self.node.resize_inputs(len(self.node.inputs) + 1)
        self.node.replace_input_with(_MATRIX, new)
        if held is not None:
            self.editor.drop_unread([held])

    @property
    def bias_factor(self) -> float:
        """What the operator multiplies its bias by."""
        return number_of(self.node, "beta", 1.0) if self.node.op_type == "Gemm" else 1.0

    def _along(self, axis: int, scale: Array) -> Array:
        shape = [1] * self.numbers.ndim
        shape[axis] = -1
        return self.numbers * scale.reshape(shape)

    @staticmethod
    def _beside(grouped: Array, scale: Array) -> Array:
        """Grouped weights times numbers for their first three axes."""
        return grouped * scale.reshape(*scale.shape, *[1] * (grouped.ndim - scale.ndim))


def linear_of(editor: Editor, node: ir.Node) -> Linear | None:
    """A linear operator that may be given other weights; None for anything else."""
    if node.op_type not in LINEAR or len(node.inputs) < 2:
        return None
    weight = node.inputs[1]
    tensor = editor.own_weight(weight)
    if weight is None or tensor is None or not tensor.size or node.inputs[0] is weight:
        return None
    shape = tuple(int(size) for size in tensor.shape.numpy())
    if node.op_type in ("Gemm", "MatMul") and len(shape) != _MATRIX:
        return None
    return Linear(editor, node, weight, shape)


def is_data_input(node: ir.Node, value: ir.Value) -> bool:
    """Whether a linear operator reads a value as its data, and channel by channel along the usual axis."""
    others = node.inputs[1:]
    return node.inputs[0] is value and value not in others and not number_of(node, "transA", 0)


def _pads(node: ir.Node) -> bool:
    """Whether a convolution sees zeros around its data."""
    auto = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    pads = node.attributes["pads"].as_ints() if "pads" in node.attributes else ()
    return auto not in ("NOTSET", "VALID") or (auto == "NOTSET" and any(pads))
