"""Scales and shifts in front of linear operators into their weights, also past operators that let a scale through.

A convolution that pads sees zeros around its data, so that it can take a scale but no shift. What is multiplied by s
and then shifted by t is shifted by t/s and then multiplied: that way round the scale moves on, and the shift stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import onnx_ir as ir

from ndonnx.graph.passes.simplification.affine import Affine, affine_of, channels_of
from ndonnx.graph.passes.simplification.editor import Array, Editor, least_rank
from ndonnx.graph.passes.simplification.fusable import is_gelu, is_part_of_norm
from ndonnx.graph.passes.simplification.linear import LINEAR, Linear, is_data_input, linear_of

Change = Callable[[], None]

_LET_PASS = {
    "AveragePool", "Flatten", "GlobalAveragePool", "ReduceMean", "ReduceSum", "Reshape", "Squeeze", "Transpose",
    "Unsqueeze",
}  # fmt: skip
"""Operators of which a multiple of the data gives the same multiple of the output."""
_LET_POSITIVE_PASS = {"GlobalMaxPool", "LeakyRelu", "MaxPool", "PRelu", "ReduceMax", "Relu"}
"""The same for multiples above 0."""
_FARTHEST = 32
"""Nodes that a scale is followed through."""


def fold_ahead(editor: Editor) -> bool:
    """Fold what stands in front of linear operators into them; whether anything did. In place."""
    changed = False
    for node in editor.nodes("Add", "Div", "Mul", "Sub"):
        step = affine_of(editor, node)
        if step is None or editor.shares(node) or is_part_of_norm(step.data) or is_gelu(step.data.producer()):
            continue
        if step.is_scale:
            changed |= _fold_scale(editor, step)
        elif step.is_shift:
            changed |= _fold_shift(editor, step)
    return changed


def _fold_shift(editor: Editor, step: Affine) -> bool:
    """A shift whose readers are all linear operators with a bias that can take it."""
    changes: list[Change] = []
    for node in editor.readers(step.output) or ():
        linear = linear_of(editor, node) if is_linear_reader(node, step.output) else None
        shift = None if linear is None else _per_channel(linear, step.shift)
        change = None if linear is None or shift is None else _shifted(editor, linear, shift)
        if change is None:
            return False
        changes.append(change)
    return _apply(editor, step, changes)


def _shifted(editor: Editor, linear: Linear, shift: Array) -> Change | None:
    """How an operator takes a constant on its data."""
    if linear.node.op_type == "MatMul":
        reader = editor.only_reader(linear.node.outputs[0])
        sum_ = affine_of(editor, reader) if reader is not None else None
        if sum_ is None or not sum_.is_shift or sum_.node.op_type != "Add" or editor.own_weight(sum_.held) is None:
            return None
        bias = channels_of(sum_.shift, linear.rank, -1, linear.outputs)
        answer = linear.answer_to(shift)
        if bias is None or answer is None or not _fits(bias + answer):
            return None
        return partial(_move_shift, editor, linear.node.outputs[0], sum_.held, bias + answer)
    bias, factor, answer = linear.bias(), linear.bias_factor, None
    if bias is not None and factor and linear.own_bias == linear.outputs:
        answer = linear.answer_to(shift)
    if bias is None or answer is None or not _fits(bias + answer / factor):
        return None
    return partial(linear.set_bias, bias + answer / factor)


def _move_shift(editor: Editor, product: ir.Value, held: ir.Value, bias: Array) -> None:
    """Let the sum behind a matrix product add what its data is no longer shifted by."""
    editor.rewrite(held, bias)
    editor.rename(product, "unshifted")


def _fold_scale(editor: Editor, step: Affine) -> bool:
    """A scale of which everything that it reaches ends in linear operators that can take it."""
    if not step.scale.all() or (step.scale.size == 1 and step.scale.ndim > least_rank(step.data)):
        return False
    journey = _Journey(editor, step.scale)
    return journey.follow(step.output) and _apply(editor, step, journey.changes)


def _apply(editor: Editor, step: Affine, changes: list[Change]) -> bool:
    if not changes:
        return False
    for change in changes:
        change()
    editor.skip(step.node)
    return True


@dataclass
class _Journey:
    """The way of a scale through the graph, and what would have to change on it."""

    editor: Editor
    scale: Array
    changes: list[Change] = field(default_factory=list)
    seen: set[ir.Node] = field(default_factory=set)

    def follow(self, value: ir.Value) -> bool:
        """Whether all that reads a value can do with it unscaled."""
        readers = self.editor.readers(value)
        return readers is not None and all(self._passes(node, value) for node in readers)

    def _passes(self, node: ir.Node, value: ir.Value) -> bool:
        if node in self.seen or len(self.seen) >= _FARTHEST:
            return False
        self.seen.add(node)
        if node.op_type in LINEAR:
            return self._ends_in(node, value)
        if self.scale.size != 1 or is_gelu(node) or not self._lets_pass(node, value):
            return False
        self.changes.append(partial(self.editor.rename, node.outputs[0], "unscaled"))
        return self.follow(node.outputs[0])

    def _ends_in(self, node: ir.Node, value: ir.Value) -> bool:
        linear = linear_of(self.editor, node) if is_linear_reader(node, value) else None
        scale = None if linear is None else _per_channel(linear, self.scale)
        if linear is None or scale is None:
            return False
        weight = linear.scaled_inputs(scale)
        self.changes.append(partial(self.editor.rewrite, linear.weight, weight))
        return _fits(weight)

    def _lets_pass(self, node: ir.Node, value: ir.Value) -> bool:
        """Whether a multiple of the data makes the same multiple of what a node computes, its constant changed."""
        op, factor = node.op_type, float(self.scale.reshape(-1)[0])
        if op in ("Add", "Sub"):
            step = affine_of(self.editor, node)
            shift = None if step is None else step.shift / factor
            if step is None or shift is None or not _fits(shift):
                return False
            self.changes.append(partial(self._shift, step, shift))
            return True
        first = node.inputs[0] is value and value not in node.inputs[1:]
        if op in _LET_PASS or (op in _LET_POSITIVE_PASS and factor > 0) or op == "Div":
            return first
        return op == "Mul"

    def _shift(self, step: Affine, shift: Array) -> None:
        """Give a sum or difference another constant."""
        place = next(at for at, value in enumerate(step.node.inputs) if value is step.held)
        sign = -1 if step.node.op_type == "Sub" and place == 1 else 1
        new = self.editor.constant(step.held.name or "", sign * shift, like=step.held)
        step.node.replace_input_with(place, new)
        self.editor.drop_unread([step.held])


def is_linear_reader(node: ir.Node, value: ir.Value) -> bool:
    """Whether a node is a linear operator that reads a value as its data."""
    return node.op_type in LINEAR and is_data_input(node, value)


def _per_channel(linear: Linear, numbers: Array) -> Array | None:
    """Numbers for the channels that an operator reads; the data has as many axes as the output."""
    return channels_of(numbers, linear.rank, linear.axis, linear.inputs)


def _fits(numbers: Array) -> bool:
    return bool((np.abs(numbers) <= np.finfo(np.float32).max).all())
