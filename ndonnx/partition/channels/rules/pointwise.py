"""Operators that treat each channel alone."""

from __future__ import annotations

import onnx_ir as ir

from ndonnx.graph.costs import constant_of, dims
from ndonnx.partition.channels.labels import Labels, axis_labels, on_axis
from ndonnx.partition.channels.rules.tracker import (
    Rule,
    Tracker,
    are_constant,
    extent,
    input_at,
    labelled_axes,
    numbers,
    rank_of,
)


def one_to_one(tracker: Tracker, node: ir.Node) -> bool:
    """An element-wise function of the first input."""
    return tracker.set(node.outputs[0], tracker.labels(node.inputs[0]))


def spatial(tracker: Tracker, node: ir.Node) -> bool:
    """Pooling and its like: every axis but the channel axis (1) may change its length."""
    labels = tracker.labels(node.inputs[0])
    channels = tracker.rows(labels, 1)
    if labels is None:
        return True
    if channels is None or len(node.outputs) > 1:
        return False
    return tracker.set(node.outputs[0], on_axis(channels, 1, labels.ndim))


def resize(tracker: Tracker, node: ir.Node) -> bool:
    """`Resize` and `Upsample`, as long as the channel axis keeps its length."""
    data, out = node.inputs[0], node.outputs[0]
    labels = tracker.labels(data)
    if labels is None:
        return True
    scales = next((constant_of(v) for v in node.inputs[1:] if v is not None and _is_float(v)), None)
    kept = scales is not None and len(scales.numpy()) == labels.ndim and float(scales.numpy()[1]) == 1.0
    sized = (
        data is not None and dims(data) is not None and extent(data, 1 - labels.ndim) == extent(out, 1 - labels.ndim)
    )
    # A target size given as numbers holds the channel count and would have to be edited.
    channels = tracker.rows(labels, 1)
    if channels is None or not (kept or (sized and constant_of(input_at(node, 3)) is None)):
        return False
    return tracker.set(out, on_axis(channels, 1, labels.ndim))


def _is_float(value: ir.Value) -> bool:
    tensor = constant_of(value)
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT and tensor.size > 1


def batch_norm(tracker: Tracker, node: ir.Node) -> bool:
    """`BatchNormalization`: one scale, bias, mean and variance per channel."""
    labels = tracker.labels(node.inputs[0])
    channels = tracker.rows(labels, 1)
    if not are_constant(node.inputs[1:]) or (labels is not None and channels is None):
        return False
    for value in node.inputs[1:]:
        tracker.label_weight(node, value, 0, channels, "out")
    return tracker.set(node.outputs[0], labels)


def cumulative(tracker: Tracker, node: ir.Node) -> bool:
    """`CumSum` along an axis without channels."""
    labels, axis = tracker.labels(node.inputs[0]), numbers(node, "axis", 1)
    if labels is None:
        return True
    if axis is None or len(axis) != 1 or labels.shape[axis[0]] > 1:
        return False
    return tracker.set(node.outputs[0], labels)


def elementwise(tracker: Tracker, node: ir.Node) -> bool:
    """Several operands with broadcasting: channels that meet are one; constants are labelled."""
    operands = [value for value in node.inputs if value is not None]
    if not any(tracker.labels(value) is not None for value in operands):
        return True
    if any(dims(value) is None for value in operands):
        return False
    rank = max(rank_of(value) or 0 for value in operands)
    own = {value: _padded(tracker.labels(value), rank) for value in operands}
    whole = max((labels for labels in own.values() if labels is not None), key=lambda labels: labels.size)
    axes = labelled_axes(whole)
    strangers = {axis: _strangers(own, axis, rank) for axis in axes}
    if any(set(labelled_axes(labels)) - set(axes) for labels in own.values() if labels is not None):
        return False
    met = [axis for axis in axes if strangers[axis]]
    labellable = len(axes) == 1 and all(constant_of(value) is not None for value in strangers[axes[0]])
    if met == axes and not labellable:
        return False
    for labels in own.values():
        if labels is not None:
            tracker.sets.unite(whole, labels)
    for axis in met:
        if labellable:
            for value in strangers[axis]:
                tracker.label_weight(node, value, axis - rank, axis_labels(whole, axis), "out")
        else:  # an axis that meets something unknown (rotary tables) stays whole; the others may lose positions
            tracker.sets.unite(whole, whole.take([0], axis=axis))
    return tracker.set(node.outputs[0], whole)


def _padded(labels: Labels | None, rank: int) -> Labels | None:
    return None if labels is None else labels.reshape([1] * (rank - labels.ndim) + list(labels.shape))


def _strangers(own: dict[ir.Value, Labels | None], axis: int, rank: int) -> list[ir.Value]:
    """Operands that have this axis but no labels along it."""
    return [
        value
        for value, labels in own.items()
        if (labels is None or labels.shape[axis] == 1) and extent(value, axis - rank) != 1
    ]


_ELEMENTWISE = (
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod",
    "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
)  # fmt: skip
_ONE_TO_ONE = (
    "Abs", "Cast", "Ceil", "Celu", "Clip", "Cos", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid",
    "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu",
    "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu",
)  # fmt: skip
_POOLS = ("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ONE_TO_ONE, one_to_one),
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys(_POOLS, spatial),
    "BatchNormalization": batch_norm,
    "CumSum": cumulative,
    **dict.fromkeys(("Resize", "Upsample"), resize),
}
