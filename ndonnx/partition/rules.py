"""What each operator does to the channels of its inputs: one rule per family.

A rule labels the weights it understands and the node's output. An operator without a rule,
or a case that its rule does not know, freezes what it reads: never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

from ndonnx.graph.costs import constant_of, dims
from ndonnx.graph.dataflow import reads
from ndonnx.partition.labels import FROZEN, Labels, LabelSets, axis_labels, on_axis

Role = Literal["in", "out"]
"""Whether an axis of a weight is summed over (`in`) or carried on (`out`)."""


@dataclass(eq=False)
class WeightLabels:
    """Labelled axes of one constant, and the nodes whose rule labelled it."""

    axes: dict[int, Labels] = field(default_factory=dict)
    roles: dict[int, Role] = field(default_factory=dict)
    readers: set[ir.Node] = field(default_factory=set)


@dataclass(eq=False)
class Tracker:
    """What is known so far of a slice's channels."""

    sets: LabelSets = field(default_factory=LabelSets)
    values: dict[ir.Value, Labels] = field(default_factory=dict)
    weights: dict[ir.Value, WeightLabels] = field(default_factory=dict)
    made: dict[str, Labels] = field(default_factory=dict)
    """Labels by the name of the value in which they were made."""
    edits: list[tuple[ir.Node, str, Labels]] = field(default_factory=list)

    def labels(self, value: ir.Value | None) -> Labels | None:
        """Labels of an activation; None when it is not followed.

        A lone channel is not: beside other lengths it would be taken for an axis that broadcasts.
        """
        labels = self.values.get(value) if value is not None else None
        return labels if labels is not None and labels.size > 1 else None

    def freeze(self, value: ir.Value | None) -> None:
        """Let all channels of an activation stay."""
        self.sets.freeze(self.labels(value))

    def freeze_reads(self, node: ir.Node) -> None:
        """Let all channels that a node reads stay."""
        for value in reads(node):
            self.freeze(value)

    def make(self, value: ir.Value, count: int) -> Labels:
        """New channels that `value` is the first to carry."""
        labels = self.sets.fresh(count)
        self.made[value.name or ""] = labels
        return labels

    def label_weight(self, node: ir.Node, value: ir.Value | None, axis: int, labels: Labels | None, role: Role) -> None:
        """Say that along `axis` of a constant stand these channels (None: channels that stay)."""
        if value is None or (shape := dims(value)) is None:
            return
        weight = self.weights.setdefault(value, WeightLabels())
        weight.readers.add(node)
        axis %= len(shape)
        if labels is None:
            labels = np.full(shape[axis], FROZEN, dtype=np.int64)
        if axis in weight.axes:
            self.sets.unite(weight.axes[axis], labels)
            weight.roles[axis] = "in" if "in" in (role, weight.roles[axis]) else "out"
        else:
            weight.axes[axis], weight.roles[axis] = labels, role


def apply_rule(tracker: Tracker, node: ir.Node) -> None:
    """Label the outputs and weights of one node, or freeze what it reads."""
    rule = _RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if rule is None or not rule(tracker, node):
        tracker.freeze_reads(node)
        for value in node.outputs:
            tracker.values.pop(value, None)


Rule = Callable[[Tracker, ir.Node], bool]
"""Returns False when the case is not understood; nothing may have been labelled by then."""


# Linear operators: channels end in the weight's input axis and begin in its output axis.


def _conv(tracker: Tracker, node: ir.Node) -> bool:
    data, weight, *bias = node.inputs
    shape, out = dims(weight), node.outputs[0]
    labels = tracker.labels(data)
    channels = axis_labels(labels, 1)
    if shape is None or not _constant(node.inputs[1:]) or (labels is not None and channels is None):
        return False
    groups = _int(node, "group", 1)
    if groups == 1:
        tracker.label_weight(node, weight, 1, channels, "in")
        made = tracker.make(out, shape[0])
    else:
        if channels is None or channels.size % groups or shape[0] % groups:
            return False
        # A whole group goes or stays: its inputs and its outputs are one unit.
        by_group = channels.reshape(groups, -1)
        tracker.sets.unite(by_group, by_group[:, :1])
        made = np.repeat(by_group[:, 0], shape[0] // groups)
        tracker.edits.append((node, "group", by_group[:, 0]))
    tracker.label_weight(node, weight, 0, made, "out")
    for value in bias:
        tracker.label_weight(node, value, 0, made, "out")
    tracker.values[out] = on_axis(made, 1, len(shape))
    return True


def _gemm(tracker: Tracker, node: ir.Node) -> bool:
    data, weight, *bias = node.inputs
    shape, out = dims(weight), node.outputs[0]
    channels = axis_labels(tracker.labels(data), 1)
    if shape is None or not _constant(node.inputs[1:]) or _int(node, "transA", 0):
        return False
    if tracker.labels(data) is not None and channels is None:
        return False
    transposed = bool(_int(node, "transB", 0))
    made = tracker.make(out, shape[0 if transposed else 1])
    tracker.label_weight(node, weight, 1 if transposed else 0, channels, "in")
    tracker.label_weight(node, weight, 0 if transposed else 1, made, "out")
    tracker.values[out] = on_axis(made, 1, 2)
    for value in bias:
        if value is not None and (size := dims(value)) and size[-1] == made.size:
            tracker.label_weight(node, value, -1, made, "out")
    return True


def _matmul(tracker: Tracker, node: ir.Node) -> bool:
    data, weight = node.inputs
    shape, out, labels = dims(weight), node.outputs[0], tracker.labels(data)
    rank = len(data.shape) if data is not None and data.shape is not None else None
    channels = axis_labels(labels, -1)
    if shape is None or len(shape) != 2 or rank is None or constant_of(weight) is None:
        return False
    if labels is not None and channels is None:
        return False
    tracker.label_weight(node, weight, 0, channels, "in")
    made = tracker.make(out, shape[1])
    tracker.label_weight(node, weight, 1, made, "out")
    tracker.values[out] = on_axis(made, -1, rank)
    return True


# Operators that treat each channel alone.


def _pass(tracker: Tracker, node: ir.Node) -> bool:
    labels = tracker.labels(node.inputs[0])
    if labels is not None:
        tracker.values[node.outputs[0]] = labels
    return True


def _spatial(tracker: Tracker, node: ir.Node) -> bool:
    """Pooling and its like: every axis but the channel axis (1) may change its length."""
    labels = tracker.labels(node.inputs[0])
    if labels is None:
        return True
    if axis_labels(labels, 1) is None or len(node.outputs) > 1:
        return False
    tracker.values[node.outputs[0]] = labels
    return True


def _normalisation(tracker: Tracker, node: ir.Node) -> bool:
    """BatchNormalization and InstanceNormalization: one scale and one bias per channel."""
    labels = tracker.labels(node.inputs[0])
    channels = axis_labels(labels, 1)
    if not _constant(node.inputs[1:]) or (labels is not None and channels is None):
        return False
    for value in node.inputs[1:]:
        tracker.label_weight(node, value, 0, channels, "out")
    if labels is not None:
        tracker.values[node.outputs[0]] = labels
    return True


def _elementwise(tracker: Tracker, node: ir.Node) -> bool:
    operands = [value for value in node.inputs if value is not None]
    followed = [labels for value in operands if (labels := tracker.labels(value)) is not None]
    if not followed:
        return True
    if any(dims(value) is None for value in operands):
        return False
    rank = max(*(labels.ndim for labels in followed), *(len(dims(value) or ()) for value in operands))
    padded = [labels.reshape([1] * (rank - labels.ndim) + list(labels.shape)) for labels in followed]
    if len({labels.shape for labels in padded}) > 1:
        return False
    axes = [axis for axis, size in enumerate(padded[0].shape) if size > 1]
    strangers = [value for value in operands if tracker.labels(value) is None]
    touched = {value: [axis for axis in axes if _extent(value, axis - rank) != 1] for value in strangers}
    if any(found and (constant_of(value) is None or len(axes) > 1) for value, found in touched.items()):
        return False
    for labels in padded[1:]:
        tracker.sets.unite(padded[0], labels)
    for value, found in touched.items():
        if found:
            tracker.label_weight(node, value, found[0] - rank, axis_labels(padded[0], found[0]), "out")
    tracker.values[node.outputs[0]] = padded[0]
    return True


def _extent(value: ir.Value, axis: int) -> int | None:
    """Length of an axis counted from the end: 1 where broadcasting adds it, None where it is unknown."""
    shape = dims(value)
    if shape is None or -axis > len(shape):
        return 1 if shape is not None else None
    length = value.shape[axis] if value.shape is not None else shape[axis]
    return length if isinstance(length, int) else None


# Operators that move channels.


def _pad(tracker: Tracker, node: ir.Node) -> bool:
    labels = tracker.labels(node.inputs[0])
    if labels is None:
        return True
    pads = _ints(node, "pads", 1)
    rank = labels.ndim
    if pads is None or len(pads) != 2 * rank or len(node.inputs) > 3:
        return False
    widths = [(pads[a], pads[a + rank]) if labels.shape[a] > 1 else (0, 0) for a in range(rank)]
    if any(low < 0 or high < 0 for low, high in widths):
        return False
    tracker.values[node.outputs[0]] = np.pad(labels, widths, constant_values=FROZEN)
    return True


def _concat(tracker: Tracker, node: ir.Node) -> bool:
    operands = [value for value in node.inputs if value is not None]
    followed = [labels for value in operands if (labels := tracker.labels(value)) is not None]
    if not followed:
        return True
    rank = followed[0].ndim
    axis = _int(node, "axis", 1) % rank
    parts = []
    for value in operands:
        labels, shape = tracker.labels(value), dims(value)
        if labels is None and (shape is None or value.shape is None or not isinstance(value.shape[axis], int)):
            return False
        if labels is None and shape is not None:
            labels = on_axis(np.full(shape[axis], FROZEN, dtype=np.int64), axis, rank)
        if labels is None or labels.size != labels.shape[axis]:
            return False
        parts.append(labels)
    tracker.values[node.outputs[0]] = np.concatenate(parts, axis=axis)
    return True


def _flatten(tracker: Tracker, node: ir.Node) -> bool:
    labels = tracker.labels(node.inputs[0])
    if labels is None:
        return True
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if _int(node, "axis", 1) != 1 or shape is None or not all(isinstance(d, int) for d in list(shape)[1:]):
        return False
    if labels.shape[0] != 1:
        return False
    whole = np.broadcast_to(labels, (1, *(int(d) for d in list(shape)[1:])))  # type: ignore[arg-type]
    tracker.values[node.outputs[0]] = whole.reshape(1, -1).copy()
    return True


def _transpose(tracker: Tracker, node: ir.Node) -> bool:
    labels = tracker.labels(node.inputs[0])
    if labels is not None:
        perm = _ints(node, "perm", None)
        tracker.values[node.outputs[0]] = np.transpose(labels, perm)
    return True


def _constant(values: Iterable[ir.Value | None]) -> bool:
    return all(value is None or constant_of(value) is not None for value in values)


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else default


def _ints(node: ir.Node, name: str, position: int | None) -> list[int] | None:
    """Integers that stand in an attribute (older opsets) or in a constant input (newer ones)."""
    attribute = node.attributes.get(name)
    if attribute is not None:
        return [int(number) for number in attribute.as_ints()]
    if position is None or len(node.inputs) <= position:
        return None
    tensor = constant_of(node.inputs[position])
    return [int(number) for number in tensor.numpy().reshape(-1)] if tensor is not None else None


def _same(rule: Rule, names: Iterable[str]) -> dict[str, Rule]:
    return dict.fromkeys(names, rule)


_ONE_TO_ONE = (
    "Abs", "Cast", "Ceil", "Celu", "Clip", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid",
    "HardSwish", "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal", "Relu", "Round", "Selu",
    "Sigmoid", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu",
)  # fmt: skip

_RULES: dict[str, Rule] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Pad": _pad,
    "Concat": _concat,
    "Flatten": _flatten,
    "Transpose": _transpose,
    **_same(_normalisation, ("BatchNormalization", "InstanceNormalization")),
    **_same(_spatial, ("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool")),
    **_same(_elementwise, ("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Sum", "Mean", "PRelu", "Where")),
    **_same(_pass, _ONE_TO_ONE),
}
