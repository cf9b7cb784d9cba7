"""Scales and shifts behind a linear operator, batch normalisations among them, into its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ndonnx.graph.passes.simplification.affine import ONE, ZERO, Affine, affine_of, channels_of, is_inference, norm_of
from ndonnx.graph.passes.simplification.editor import Array, Editor, rank_of
from ndonnx.graph.passes.simplification.linear import LINEAR, Linear, linear_of


@dataclass(frozen=True)
class _Total:
    """Steps behind an operator, all together: `output * scale + shift`, each () or (channels,)."""

    steps: Sequence[ir.Node]
    scale: Array
    shift: Array
    held: Affine | None
    """The first step that adds a constant."""

    def then(self, step: ir.Node, scale: Array, shift: Array, affine: Affine | None) -> _Total:
        held = self.held or (affine if affine is not None and not affine.is_scale else None)
        return _Total([*self.steps, step], self.scale * scale, self.shift * scale + shift, held)


def fold_behind(editor: Editor) -> bool:
    """Fold what stands behind linear operators and batch normalisations into them; whether anything did. In place."""
    folded = [_fold_linear(editor, node) for node in editor.nodes(*LINEAR)]
    folded += [_fold_norm(editor, node) for node in editor.nodes("BatchNormalization")]
    return any(folded)


def _fold_linear(editor: Editor, node: ir.Node) -> bool:
    linear = linear_of(editor, node)
    if linear is None:
        return False
    total = _steps(editor, node, linear.rank, linear.axis, linear.outputs)
    if not total.steps:
        return False
    if node.op_type == "MatMul":
        return _fold_product(linear, total)
    bias, factor = linear.bias(), linear.bias_factor
    weight = linear.scaled_outputs(total.scale)
    if bias is None or not factor:
        return False
    new_bias = bias * total.scale + total.shift / factor
    changes = not np.array_equal(np.broadcast_to(bias, new_bias.shape), new_bias)
    room = linear.own_bias + _dropped(editor, total.steps)
    if not _is_finite(weight, new_bias) or (changes and (linear.shares_bias or room < linear.outputs)):
        return False
    editor.rewrite(linear.weight, weight)
    if changes:
        linear.set_bias(new_bias)
    _take_over(editor, node, total.steps)
    return True


def _fold_product(linear: Linear, total: _Total) -> bool:
    """The steps behind a matrix product: what they multiply by into the matrix, what they add as one sum."""
    editor, weight = linear.editor, linear.scaled_outputs(total.scale)
    sums = bool(total.shift.any())
    if len(total.steps) <= sums or not _is_finite(weight, total.shift):
        return False
    if total.shift.size > 1 and _dropped(editor, total.steps) < total.shift.size:
        return False
    editor.rewrite(linear.weight, weight)
    if sums:
        last = total.steps[-1]
        name = f"{linear.weight.name}/bias" if total.held is None else total.held.held.name or ""
        # Its constant comes when the old nodes are gone, and with them what may have its name.
        adding = editor.put(last, "Add", [linear.node.outputs[0], None])
        _take_over(editor, adding, total.steps)
        adding.replace_input_with(1, editor.constant(name, total.shift, like=linear.weight))
    else:
        _take_over(editor, linear.node, total.steps)
    return True


def _fold_norm(editor: Editor, node: ir.Node) -> bool:
    """The steps behind a batch normalisation into its scale and bias."""
    if len(node.inputs) != 5 or not is_inference(node):
        return False
    if any(editor.own_weight(value) is None for value in node.inputs[1:3]):
        return False
    gain, bias = (editor.numbers(value) for value in node.inputs[1:3])
    if gain is None or bias is None or gain.shape != bias.shape:
        return False
    rank = rank_of(node.outputs[0])
    total = _steps(editor, node, rank, 1 - (rank or 1), gain.size) if rank is not None and rank > 1 else None
    if total is None or not total.steps:
        return False
    gain, bias = gain * total.scale, bias * total.scale + total.shift
    scale_of, bias_of = node.inputs[1:3]
    if not _is_finite(gain, bias) or scale_of is None or bias_of is None:
        return False
    editor.rewrite(scale_of, gain)
    editor.rewrite(bias_of, bias)
    _take_over(editor, node, total.steps)
    return True


def _steps(editor: Editor, node: ir.Node, rank: int | None, axis: int, size: int) -> _Total:
    """The steps behind a node that treat its channels one by one, all together."""
    total, value = _Total((), ONE, ZERO, None), node.outputs[0]
    while (reader := editor.only_reader(value)) is not None and not editor.shares(reader):
        step = affine_of(editor, reader)
        if step is not None:
            scale, shift = (channels_of(part, rank, axis, size) for part in (step.scale, step.shift))
        elif (norm := norm_of(editor, reader)) is not None and _second_axis_is(axis, rank) and norm[0].size == size:
            scale, shift = norm
        else:
            break
        if scale is None or shift is None or not np.isfinite(scale).all():
            break
        total, value = total.then(reader, scale, shift, step), reader.outputs[0]
    return total


def _second_axis_is(axis: int, rank: int | None) -> bool:
    return rank is not None and rank + axis == 1


def _is_finite(*arrays: Array) -> bool:
    """Whether all numbers fit into the narrowest type that is folded."""
    return all(bool((np.abs(array) <= np.finfo(np.float32).max).all()) for array in arrays)


def _dropped(editor: Editor, steps: Sequence[ir.Node]) -> int:
    """Elements of the vectors that go with the steps, since nothing else reads them: a new one takes no more."""
    held = [value for step in steps for value in step.inputs if editor.own_weight(value) is not None]
    sizes = [numbers.size for value in held if (numbers := editor.numbers(value)) is not None]
    return sum(size for size in sizes if size > 1)


def _take_over(editor: Editor, node: ir.Node, steps: Sequence[ir.Node]) -> None:
    """Let a node compute what the last of the steps does, which go."""
    editor.hand_over(steps[-1].outputs[0], node.outputs[0])
    editor.remove(*reversed(steps))
