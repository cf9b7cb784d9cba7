"""Initial states of zeros: recurrent operators begin with them anyway, so the working copy does without.

Exporters hand them over as a block of zeros whose shape states the hidden size once for all layers; no layer
could then lose a unit alone.
"""

from __future__ import annotations

import onnx_ir as ir

from ndonnx.graph.costs import constant_of
from ndonnx.graph.dataflow import STANDARD_DOMAINS
from ndonnx.graph.shapes.targets import note_reader

_STATES = {"GRU": (5,), "LSTM": (5, 6), "RNN": (5,)}
"""Positions of the initial states among the inputs."""
_PASS_ON = {
    "Cast", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze",
}  # fmt: skip
"""Operators whose output holds no number that their first input does not hold."""
_LONGEST = 32
"""Operators between the zeros and their reader up to which they are looked for."""


def drop_zero_states(model: ir.Model) -> bool:
    """Take initial states that are known to be zeros off their readers; whether there were any. In place."""
    dropped = False
    for node in model.graph:
        for position in _STATES.get(node.op_type, ()) if node.domain in STANDARD_DOMAINS else ():
            state = node.inputs[position] if position < len(node.inputs) else None
            if state is not None and _is_zero(state) and note_reader(node, state):
                node.replace_input_with(position, None)
                dropped = True
    return dropped


def _is_zero(value: ir.Value) -> bool:
    for _ in range(_LONGEST):
        tensor, node = constant_of(value), value.producer()
        if tensor is not None:
            return not tensor.numpy().any()
        if node is None or node.domain not in STANDARD_DOMAINS:
            return False
        if node.op_type == "ConstantOfShape":
            fill = node.attributes.get("value")
            return fill is None or (fill.type == ir.AttributeType.TENSOR and not fill.as_tensor().numpy().any())
        before = node.inputs[0] if node.op_type in _PASS_ON and node.inputs else None
        if before is None:
            return False
        value = before
    return False
