"""Recurrent operators: a unit of the hidden state goes with its gates, its recurrence and all that reads it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ndonnx.graph.costs import constant_of, dims
from ndonnx.partition.channels.labels import Labels, axis_labels, on_axis
from ndonnx.partition.channels.rules.tracker import Edit, Rule, Tracker, are_constant, input_at, rank_of

_GATES = {"GRU": 3, "LSTM": 4, "RNN": 1}


def recurrent(tracker: Tracker, node: ir.Node) -> bool:
    """`LSTM`, `GRU` and `RNN`: both directions of a bidirectional one keep the same units.

    W is (D, G*H, I), R (D, G*H, H), the bias (D, 2*G*H), peepholes (D, 3*H); states end in H.
    """
    data, weight, recurrence = node.inputs[:3]
    bias, hidden, cell, peepholes = (input_at(node, position) for position in (3, 5, 6, 7))
    shape, labels, gates = dims(recurrence), tracker.labels(data), _GATES[node.op_type]
    channels = axis_labels(labels, 2)
    if shape is None or len(shape) != 3 or shape[1] != gates * shape[2] or rank_of(data) != 3:
        return False
    if not are_constant((weight, recurrence, bias, peepholes)) or (labels is not None and channels is None):
        return False
    first = next(value for value in node.outputs if value.name)
    made = tracker.make(first, shape[2])
    by_gate = np.tile(made, gates)
    tracker.label_weight(node, weight, 1, by_gate, "out")
    tracker.label_weight(node, weight, 2, channels, "in")
    tracker.label_weight(node, recurrence, 1, by_gate, "out")
    tracker.label_weight(node, recurrence, 2, made, "in")
    tracker.label_weight(node, bias, 1, np.tile(by_gate, 2), "out")
    tracker.label_weight(node, peepholes, 1, np.tile(made, 3), "out")
    for state in (hidden, cell):
        _meet(tracker, node, state, made)
    if "hidden_size" in node.attributes:
        tracker.edits.append(Edit(node, "hidden_size", None, made, 0))
    for value, rank in zip(node.outputs, (4, 3, 3), strict=False):
        if value.name:
            tracker.set(value, on_axis(made, rank - 1, rank))
    return True


def _meet(tracker: Tracker, node: ir.Node, state: ir.Value | None, made: Labels) -> None:
    """An initial state has the units of the hidden state; one that is computed elsewhere keeps all of them."""
    if constant_of(state) is not None:
        tracker.label_weight(node, state, 2, made, "out")
    elif state is not None:
        known = axis_labels(tracker.labels(state), 2)
        if known is not None and known.shape == made.shape:
            tracker.sets.unite(known, made)
        else:
            tracker.freeze(state)
            tracker.sets.freeze(made)


RULES: dict[str, Rule] = dict.fromkeys(_GATES, recurrent)
