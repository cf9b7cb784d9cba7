"""Operators that take a statistic over several channels at once: norms, means and maxima over channels, softmax.

Where channels stand in blocks (norm groups, heads) and the statistic is of one block, whole blocks go, and
what stays keeps its statistics. Otherwise the statistic becomes one of the channels that are kept. That changes
their values; the reconstruction and the training take it up, and what is verified is that nothing but the kept
channels goes into it (see `students/zeroing.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import onnx_ir as ir

from ndonnx.graph.costs import dims
from ndonnx.partition.channels.labels import Labels, on_axis
from ndonnx.partition.channels.rules.tracker import (
    Edit,
    Folded,
    Grouping,
    Rule,
    Statistic,
    Tracker,
    are_constant,
    extent,
    input_at,
    int_attribute,
    labelled_axes,
    numbers,
)


def see_together(tracker: Tracker, node: ir.Node, labels: Labels, axes: Iterable[int], *, carries: bool) -> bool:
    """Let a node see all channels along some axes of its first input together.

    Args:
        tracker: of the slice.
        node: the norm, mean, ...
        labels: of its first input.
        axes: those that a statistic is taken over, counted from the front.
        carries: whether the output has the channels along these axes.

    Returns:
        Whether the statistics stay as they are, since whole blocks go (or no channels lie along these axes).
    """
    carried = labelled_axes(labels)
    inside = sorted((axis for axis in carried if axis in axes), key=lambda axis: labels.shape[axis])
    outside = [axis for axis in carried if axis not in axes]
    if not inside:
        return True
    if outside and node not in tracker.by_part:
        sizes = [math.prod(labels.shape[axis] for axis in some) for some in (inside, outside)]
        tracker.unite_across(labels, inside)
        tracker.groupings.append(Grouping(node, labels, is_coarse=sizes[0] > sizes[1]))
        return True
    along = tracker.unite_across(labels, [*outside, *inside[:-1]])
    tracker.statistics.append(Statistic(node, along, inside[-1] - labels.ndim, carries))
    return False


def softmax(tracker: Tracker, node: ir.Node) -> bool:
    """`Softmax`, `LogSoftmax` and `LpNormalization`."""
    labels = tracker.labels(node.inputs[0])
    if labels is None:
        return True
    first, last = _normalised(node, labels.ndim)
    see_together(tracker, node, labels, range(first, last), carries=True)
    return tracker.set(node.outputs[0], labels)


def hardmax(tracker: Tracker, node: ir.Node) -> bool:
    """`Hardmax`: which channel is the largest is no matter of the kept ones alone, so these stay."""
    labels = tracker.labels(node.inputs[0])
    if labels is None:
        return True
    first, last = _normalised(node, labels.ndim)
    inside = [axis for axis in labelled_axes(labels) if first <= axis < last]
    if inside and inside == labelled_axes(labels):
        return False
    tracker.unite_across(labels, inside)
    return tracker.set(node.outputs[0], labels)


def layer_norm(tracker: Tracker, node: ir.Node) -> bool:
    """`LayerNormalization` and `RMSNormalization` over the axes from `axis` on, with scale and bias of their shape."""
    labels = tracker.labels(node.inputs[0])
    if labels is None:
        return True
    if not are_constant(node.inputs[1:]):
        return False
    first, last = _normalised(node, labels.ndim)
    if not see_together(tracker, node, labels, range(first, last), carries=True):
        statistic = tracker.statistics[-1]
        for value in node.inputs[1:]:
            shape = dims(value)
            if shape is not None and -statistic.axis <= len(shape) and shape[statistic.axis] > 1:
                tracker.label_weight(node, value, statistic.axis, statistic.labels, "out")
    return tracker.set(node.outputs[0], labels)


def _normalised(node: ir.Node, rank: int) -> tuple[int, int]:
    """The axes that are normalised together, as a range."""
    opset = node.graph.opset_imports.get("", _ONE_AXIS_SINCE) if node.graph is not None else _ONE_AXIS_SINCE
    flattens = node.op_type in _SOFTMAX and opset < _ONE_AXIS_SINCE
    first = int_attribute(node, "axis", 1 if flattens else -1) % rank
    one = node.op_type == "LpNormalization" or (node.op_type in _SOFTMAX and not flattens)
    return first, first + 1 if one else rank


_SOFTMAX = ("Softmax", "LogSoftmax", "Hardmax")
_ONE_AXIS_SINCE = 13
"""Opset from which these normalise one axis; before, all from `axis` on."""


def group_norm(tracker: Tracker, node: ir.Node) -> bool:
    """`GroupNormalization`: scale and bias are of each group (opset 18) or of each channel (opset 21)."""
    labels = tracker.labels(node.inputs[0])
    if labels is None:
        return True
    channels, groups = tracker.rows(labels, 1), int_attribute(node, "num_groups", 0)
    if channels is None or groups < 1 or channels.size % groups or not are_constant(node.inputs[1:]):
        return False
    by_group = channels.reshape(groups, -1)
    by_part = groups == 1 or (node in tracker.by_part and by_group.shape[1] > 1)
    if by_part:
        tracker.sets.unite(by_group, by_group[:1])
        tracker.statistics.append(Statistic(node, channels, 1 - labels.ndim, carries=True))
    else:
        tracker.sets.unite(by_group, by_group[:, :1])
        tracker.edits.append(Edit(node, "num_groups", None, by_group[:, 0], 0))
        if by_group.shape[1] > 1:
            tracker.groupings.append(Grouping(node, by_group, is_coarse=by_group.shape[1] > groups))
    for value in node.inputs[1:]:
        if dims(value) == channels.shape:
            tracker.label_weight(node, value, 0, channels, "out")
        elif not by_part:
            tracker.label_weight(node, value, 0, by_group[:, 0], "out")
    return tracker.set(node.outputs[0], labels)


def instance_norm(tracker: Tracker, node: ir.Node) -> bool:
    """`InstanceNormalization`: by one scale and one bias for each position of axis 1, statistics over all behind it."""
    data = node.inputs[0]
    if data is not None and data in tracker.folded:
        return _instance_norm_folded(tracker, node, tracker.folded[data])
    labels = tracker.labels(data)
    if labels is None:
        return True
    if not are_constant(node.inputs[1:]):
        return False
    if see_together(tracker, node, labels, range(2, labels.ndim), carries=True) and labels.shape[1] > 1:
        channels = tracker.rows(labels, 1)
        for value in node.inputs[1:]:
            tracker.label_weight(node, value, 0, channels, "out")
    return tracker.set(node.outputs[0], labels)


def _instance_norm_folded(tracker: Tracker, node: ir.Node, folded: Folded) -> bool:
    """`InstanceNormalization` over blocks of channels that are joined with dynamic axes behind them."""
    labels = folded.labels
    if folded.first != 2 or folded.rank != 3 or any(axis not in (1, 2) for axis in labelled_axes(labels)):
        return False
    if not are_constant(node.inputs[1:]):
        return False
    blocks, size = labels.shape[1:3]
    if size > 1 and (blocks == 1 or node in tracker.by_part):
        along = tracker.unite_across(labels, [1])
        tracker.statistics.append(Statistic(node, along, -1, carries=True, stretched=True))
    else:
        by_block = tracker.unite_across(labels, [2])
        if size > 1:
            tracker.groupings.append(Grouping(node, labels, is_coarse=size > blocks))
        for value in node.inputs[1:]:
            tracker.label_weight(node, value, 0, by_block, "out")
    tracker.folded[node.outputs[0]] = folded
    return True


def mean_variance(tracker: Tracker, node: ir.Node) -> bool:
    """`MeanVarianceNormalization`, of each channel or of several together."""
    labels = tracker.labels(node.inputs[0])
    if labels is None:
        return True
    axes = numbers(node, "axes", None) or [0, 2, 3]
    see_together(tracker, node, labels, [axis % labels.ndim for axis in axes], carries=True)
    return tracker.set(node.outputs[0], labels)


def local_response(tracker: Tracker, node: ir.Node) -> bool:
    """`LRN`: every channel is divided by what its neighbours among the kept channels hold."""
    labels = tracker.labels(node.inputs[0])
    if labels is None:
        return True
    channels = tracker.rows(labels, 1)
    if channels is None:
        return False
    tracker.statistics.append(Statistic(node, channels, 1 - labels.ndim, carries=True))
    return tracker.set(node.outputs[0], on_axis(channels, 1, labels.ndim))


def conv_along_channels(tracker: Tracker, node: ir.Node) -> bool:
    """`Conv` of one kernel along the channels, which lie on its spatial axis (efficient channel attention).

    It sees the kept channels side by side.
    """
    labels, weight = tracker.labels(node.inputs[0]), dims(node.inputs[1])
    if labels is None or labelled_axes(labels) != [2] or labels.ndim != 3 or weight is None or weight[:2] != (1, 1):
        return False
    if not are_constant(node.inputs[1:]) or extent(node.outputs[0], -1) != labels.shape[2]:
        return False
    if any(step != 1 for step in numbers(node, "strides", None) or []):
        return False
    tracker.statistics.append(Statistic(node, labels.reshape(-1), -1, carries=True))
    return tracker.set(node.outputs[0], labels)


def reduce(tracker: Tracker, node: ir.Node) -> bool:
    """`Reduce*`: channels along axes that are reduced end here, others go on."""
    labels = tracker.labels(node.inputs[0])
    if labels is None:
        return True
    axes = numbers(node, "axes", 1)
    if not axes:
        if input_at(node, 1) is not None or int_attribute(node, "noop_with_empty_axes", 0):
            return False
        axes = list(range(labels.ndim))
    axes = [axis % labels.ndim for axis in axes]
    if not see_together(tracker, node, labels, axes, carries=False):
        return True
    for axis in axes:
        labels = labels.take([0], axis=axis)
    if not int_attribute(node, "keepdims", 1):
        labels = labels.squeeze(tuple(axes))
    return tracker.set(node.outputs[0], labels)


_REDUCTIONS = (
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp",
    "ReduceSumSquare",
)  # fmt: skip

RULES: dict[str, Rule] = {
    **dict.fromkeys(_REDUCTIONS, reduce),
    **dict.fromkeys(("Softmax", "LogSoftmax", "LpNormalization"), softmax),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"), layer_norm),
    "GroupNormalization": group_norm,
    "Hardmax": hardmax,
    "InstanceNormalization": instance_norm,
    "LRN": local_response,
    "MeanVarianceNormalization": mean_variance,
}
