"""Nodes that multiply by constants and add constants, as numbers that can be reckoned with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ndonnx.graph.costs import constant_of
from ndonnx.graph.passes.fused_writer import number_of
from ndonnx.graph.passes.simplification.editor import Array, Editor, data_of

ONE, ZERO = np.ones(()), np.zeros(())


@dataclass(frozen=True)
class Affine:
    """`data * scale + shift`, both broadcast against the data as numpy does."""

    node: ir.Node
    data: ir.Value
    scale: Array
    shift: Array
    held: ir.Value
    """A constant of the node: of the data's own type."""

    @property
    def output(self) -> ir.Value:
        """What it computes."""
        return self.node.outputs[0]

    @property
    def is_scale(self) -> bool:
        """Whether it adds nothing."""
        return not self.shift.any()

    @property
    def is_shift(self) -> bool:
        """Whether it multiplies by nothing but 1."""
        return bool((self.scale == 1).all())


def affine_of(editor: Editor, node: ir.Node) -> Affine | None:
    """A node as what it multiplies by and adds; None where it does anything else, or no number is finite."""
    if node.op_type not in _OPERATORS or len(node.inputs) != 2:
        return None
    data = data_of(node)
    held = next((value for value in node.inputs if value is not data), None)
    numbers = editor.numbers(held)
    if data is None or held is None or numbers is None or numbers.size == 0 or not np.isfinite(numbers).all():
        return None
    first = node.inputs[0] is data
    if node.op_type == "Mul":
        return Affine(node, data, numbers, ZERO, held)
    if node.op_type == "Div":
        return Affine(node, data, 1 / numbers, ZERO, held) if first and numbers.all() else None
    if node.op_type == "Sub":
        sign, shift = (ONE, -numbers) if first else (-ONE, numbers)
        return Affine(node, data, sign, shift, held)
    return Affine(node, data, ONE, numbers, held)


_OPERATORS = {"Add", "Div", "Mul", "Sub"}


def chain_from(editor: Editor, value: ir.Value) -> list[Affine]:
    """The affine steps behind a value, one after the other, as far as each alone reads what the one before makes."""
    steps: list[Affine] = []
    while (node := editor.only_reader(value)) is not None and (step := affine_of(editor, node)) is not None:
        steps.append(step)
        value = step.output
    return steps


def norm_of(editor: Editor, node: ir.Node) -> tuple[Array, Array] | None:
    """A batch normalisation at inference as (scale, shift), each (channels,); None for anything else."""
    if node.op_type != "BatchNormalization" or len(node.inputs) != 5 or not is_inference(node):
        return None
    found = [editor.numbers(value) for value in node.inputs[1:]]
    gain, bias, mean, variance = found
    if gain is None or bias is None or mean is None or variance is None:
        return None
    root = np.sqrt(variance + number_of(node, "epsilon", 1e-5))
    if not root.all() or not np.isfinite(root).all():
        return None
    return gain / root, bias - mean * gain / root


def is_inference(node: ir.Node) -> bool:
    """Whether a batch normalisation goes by the statistics that it holds, channel by channel."""
    trains = number_of(node, "training_mode", 0) or not number_of(node, "spatial", 1)
    return not trains and not any(value.uses() or value.is_graph_output() for value in node.outputs[1:])


def channels_of(numbers: Array, rank: int | None, axis: int, size: int) -> Array | None:
    """Numbers as one, (), or as one for each channel, (size,); None where they are neither or would widen the data.

    Args:
        numbers: that are broadcast against the data.
        rank: of the data; None where it is only known to have the axis.
        axis: of the channels, counted from the end: -1 is the last one.
        size: number of channels.
    """
    if numbers.ndim > (-axis if rank is None else rank):
        return None
    if numbers.size == 1:
        return numbers.reshape(())
    own = numbers.ndim + axis
    if own < 0 or numbers.size != size or numbers.shape[own] != size:
        return None
    return numbers.reshape(size)


def is_float(value: ir.Value | None) -> bool:
    """Whether a constant is of a floating-point type."""
    tensor = constant_of(value)
    return tensor is not None and tensor.dtype.is_floating_point()
