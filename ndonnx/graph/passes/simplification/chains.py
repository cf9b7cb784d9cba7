"""Several multiplications and additions of constants in a row as one of each, and those that do nothing as none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ndonnx.graph.passes.simplification.affine import ONE, ZERO, Affine, affine_of, chain_from
from ndonnx.graph.passes.simplification.editor import Array, Editor, least_rank


def combine_chains(editor: Editor) -> bool:
    """Write every chain of affine steps as few as can be; whether any became shorter. In place."""
    done, changed = set[ir.Node](), False
    for node in editor.nodes("Add", "Div", "Mul", "Sub"):
        first = affine_of(editor, node) if node not in done else None
        if first is not None:
            steps = [first, *chain_from(editor, first.output)]
            done.update(step.node for step in steps)
            changed |= _drop(editor, first) if len(steps) == 1 else _combine(editor, steps)
    return changed


def _drop(editor: Editor, step: Affine) -> bool:
    """A step that does nothing."""
    does_nothing = step.is_scale and step.is_shift and editor.is_free(step.output)
    if not does_nothing or step.scale.size * step.shift.size != 1:
        return False
    if max(step.scale.ndim, step.shift.ndim) > least_rank(step.data):
        return False
    editor.skip(step.node)
    return True


def _combine(editor: Editor, steps: Sequence[Affine]) -> bool:
    if any(editor.shares(step.node) for step in steps):
        return False
    scale, shift, largest = ONE, ZERO, 1
    for step in steps:
        scale, shift = scale * step.scale, shift * step.scale + step.shift
        largest = max(largest, step.scale.size, step.shift.size)
    wanted = _written(scale, shift)
    wide = any(numbers.size > largest for _, numbers in wanted)
    if len(wanted) >= len(steps) or wide or not all(_fits(numbers) for _, numbers in wanted):
        return False
    last, value = steps[-1].node, steps[0].data
    for op, numbers in wanted:
        held = next((step.held for step in steps if op == step.node.op_type), steps[0].held)
        value = editor.put(last, op, [value, editor.constant(held.name or "", numbers, like=held)]).outputs[0]
    editor.hand_over(last.outputs[0], value)
    editor.remove(*(step.node for step in reversed(steps)))
    return True


def _written(scale: Array, shift: Array) -> list[tuple[str, Array]]:
    """The fewest operators that multiply and add, at least one; together they widen the data as all did."""
    shape = np.broadcast_shapes(scale.shape, shift.shape)
    if not shift.any():
        return [("Mul", np.broadcast_to(scale, shape))]
    if (scale == 1).all():
        return [("Add", np.broadcast_to(shift, shape))]
    return [("Mul", scale), ("Add", shift)]


def _fits(numbers: Array) -> bool:
    return bool((np.abs(numbers) <= np.finfo(np.float32).max).all())
