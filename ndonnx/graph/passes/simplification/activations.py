"""`HardSigmoid` and `HardSwish` in the place of what computes them from sums, clips and products.

x * clip(x + 3, 0, 6) / 6 is `HardSwish` from opset 14 on. Before it is x times its `HardSigmoid`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from ndonnx.graph.passes.fused_writer import input_of, number_of
from ndonnx.graph.passes.simplification.affine import ONE, ZERO, Affine, affine_of
from ndonnx.graph.passes.simplification.editor import Editor

_HARD_SWISH_SINCE = 14
_CLIP_INPUTS_SINCE = 11
"""Opsets."""
_SLOPE, _HALF = 1 / 6, 0.5
"""Of the hard swish: what its `HardSigmoid` multiplies by and adds."""
_CLOSE = 1e-6
"""Relative difference of float32 constants that stand for one number."""


@dataclass(frozen=True)
class _Ramp:
    """A line that is cut off at 0 and at `height`: `height * HardSigmoid(data; slope, offset)`."""

    nodes: list[ir.Node]
    data: ir.Value
    slope: float
    offset: float
    height: float
    held: ir.Value | None
    """A constant of the data's type; None where there is none."""

    @property
    def output(self) -> ir.Value:
        """What it computes."""
        return self.nodes[-1].outputs[0]


def write_activations(editor: Editor) -> bool:
    """Write hard sigmoids and hard swishes as operators where that makes fewer nodes; whether it did. In place."""
    changed = False
    for node in editor.nodes("Clip"):
        ramp = _ramp_of(editor, node)
        if ramp is not None:
            changed |= _write_hard_sigmoid(editor, ramp) or _write_gate(editor, ramp)
    if editor.opset >= _HARD_SWISH_SINCE:
        for node in editor.nodes("HardSigmoid"):
            changed |= _write_hard_swish(editor, node)
    return changed


def _write_hard_sigmoid(editor: Editor, ramp: _Ramp) -> bool:
    """A ramp and what multiplies it, if anything does."""
    scale = _scale_of(editor, ramp.output)
    factor = ramp.height * (1.0 if scale is None else float(scale.scale.reshape(-1)[0]))
    nodes = [*ramp.nodes, *([] if scale is None else [scale.node])]
    is_one = math.isclose(factor, 1, rel_tol=_CLOSE)
    if (scale is None and not is_one) or len(nodes) <= (1 if is_one else 2):
        return False
    last = nodes[-1]
    made = editor.put(last, "HardSigmoid", [ramp.data], alpha=ramp.slope, beta=ramp.offset)
    if not is_one and scale is not None:
        held = editor.constant(scale.held.name or "", ONE * factor, like=scale.held)
        made = editor.put(last, "Mul", [made.outputs[0], held])
    editor.hand_over(last.outputs[0], made.outputs[0])
    editor.remove(*reversed(nodes))
    return True


def _write_gate(editor: Editor, ramp: _Ramp) -> bool:
    """A ramp that its own data is multiplied by, and then a number, as `HardSigmoid` and the number."""
    gate = editor.only_reader(ramp.output)
    if gate is None or gate.op_type != "Mul" or ramp.data not in gate.inputs or len(ramp.nodes) == 1:
        return False
    scale = _scale_of(editor, gate.outputs[0])
    if scale is None:
        return False
    factor = ramp.height * float(scale.scale.reshape(-1)[0])
    inner = editor.put(ramp.nodes[-1], "HardSigmoid", [ramp.data], alpha=ramp.slope, beta=ramp.offset)
    made = editor.put(scale.node, "Mul", [ramp.data, inner.outputs[0]])
    if not math.isclose(factor, 1, rel_tol=_CLOSE):
        held = editor.constant(scale.held.name or "", ONE * factor, like=scale.held)
        made = editor.put(scale.node, "Mul", [made.outputs[0], held])
    editor.hand_over(scale.output, made.outputs[0])
    editor.remove(scale.node, gate, *reversed(ramp.nodes))
    return True


def _write_hard_swish(editor: Editor, node: ir.Node) -> bool:
    """x times its `HardSigmoid`."""
    gate, data = editor.only_reader(node.outputs[0]), node.inputs[0]
    is_own = math.isclose(number_of(node, "alpha", 0.2), _SLOPE, rel_tol=_CLOSE)
    if gate is None or not is_own or not math.isclose(number_of(node, "beta", 0.5), _HALF, rel_tol=_CLOSE):
        return False
    if gate.op_type != "Mul" or data not in gate.inputs:
        return False
    editor.hand_over(gate.outputs[0], editor.put(gate, "HardSwish", [data]).outputs[0])
    editor.remove(gate, node)
    return True


def _scale_of(editor: Editor, value: ir.Value) -> Affine | None:
    """The number that alone multiplies a value; None where there is none."""
    reader = editor.only_reader(value)
    step = None if reader is None else affine_of(editor, reader)
    if step is None or not step.is_scale or not _is_number(step):
        return None
    return step


def _ramp_of(editor: Editor, node: ir.Node) -> _Ramp | None:
    """A `Clip` from 0 up with the numbers that its data alone was multiplied by and shifted by."""
    low, high = _bounds(editor, node)
    data = node.inputs[0]
    if low != 0 or high is None or not 0 < high < math.inf or data is None:
        return None
    nodes, scale, shift, held = [node], ONE, ZERO, None
    while (maker := data.producer()) is not None and editor.only_reader(data) is nodes[0]:
        step = affine_of(editor, maker) if maker in editor.graph else None
        if step is None or not _is_number(step):
            break
        shift, scale = shift + scale * step.shift.reshape(()), scale * step.scale.reshape(())
        nodes, data, held = [maker, *nodes], step.data, step.held
    return _Ramp(nodes, data, float(scale) / high, float(shift) / high, high, held)


def _is_number(step: Affine) -> bool:
    """Whether a step has one number for all of the data, and as many axes at most."""
    return step.scale.size * step.shift.size == 1 and max(step.scale.ndim, step.shift.ndim) <= 1


def _bounds(editor: Editor, node: ir.Node) -> tuple[float | None, float | None]:
    """Bounds of a `Clip`; None for one that is computed or left open."""
    if editor.opset >= _CLIP_INPUTS_SINCE:
        return editor.number(input_of(node, 1)), editor.number(input_of(node, 2))
    both = "min" in node.attributes and "max" in node.attributes
    return (number_of(node, "min", 0.0), number_of(node, "max", 0.0)) if both else (None, None)
