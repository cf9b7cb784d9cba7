"""Linear operators: channels end in a weight's input axis and begin in its output axis."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ndonnx.graph.costs import constant_of, dims
from ndonnx.partition.channels.labels import FROZEN, Labels, on_axis
from ndonnx.partition.channels.rules.statistics import conv_along_channels
from ndonnx.partition.channels.rules.tracker import (
    Edit,
    Grouping,
    Rule,
    Tracker,
    are_constant,
    input_at,
    int_attribute,
    is_constant,
    labelled_axes,
    rank_of,
)


def conv(tracker: Tracker, node: ir.Node) -> bool:
    """`Conv`, plain, grouped and depthwise."""
    weight, bias = node.inputs[1], input_at(node, 2)
    shape, out = dims(weight), node.outputs[0]
    labels = tracker.labels(node.inputs[0])
    channels = tracker.rows(labels, 1)
    groups = int_attribute(node, "group", 1)
    if labels is not None and channels is None:
        return conv_along_channels(tracker, node)
    if shape is None or not are_constant(node.inputs[1:]):
        return False
    if groups == 1:
        tracker.label_weight(node, weight, 1, channels, "in")
        made = tracker.make(out, shape[0])
    elif shape[0] % groups or (channels is not None and channels.size % groups):
        return False
    elif channels is None or node in tracker.by_part:
        if shape[0] == groups:
            return False
        if channels is not None:
            tracker.label_weight(node, weight, 1, same_parts(tracker, channels.reshape(groups, -1)), "in")
        made = np.tile(tracker.make(out, shape[0] // groups), groups)
    else:
        by_group = _whole_groups(tracker, node, channels.reshape(groups, -1), shape[0] // groups)
        made = np.repeat(by_group, shape[0] // groups)
    tracker.label_weight(node, weight, 0, made, "out")
    tracker.label_weight(node, bias, 0, made, "out")
    return tracker.set(out, on_axis(made, 1, len(shape)))


def conv_transpose(tracker: Tracker, node: ir.Node) -> bool:
    """`ConvTranspose`, plain, grouped and depthwise: the weight's axes are (in, out of a group, ...)."""
    weight, bias = node.inputs[1], input_at(node, 2)
    shape, out = dims(weight), node.outputs[0]
    labels = tracker.labels(node.inputs[0])
    channels = tracker.rows(labels, 1)
    groups = int_attribute(node, "group", 1)
    if shape is None or not are_constant(node.inputs[1:]) or (labels is not None and channels is None):
        return False
    if shape[0] % groups or (groups > 1 and channels is None and shape[1] == 1):
        return False
    if groups == 1 or channels is None or node in tracker.by_part:
        if channels is not None and groups > 1:
            same_parts(tracker, channels.reshape(groups, -1))
        tracker.label_weight(node, weight, 0, channels, "in")
        of_each = tracker.make(out, shape[1])
        tracker.label_weight(node, weight, 1, of_each, "out")
        made = np.tile(of_each, groups)
    else:
        by_group = _whole_groups(tracker, node, channels.reshape(groups, -1), shape[1])
        tracker.label_weight(node, weight, 0, channels, "out")
        made = np.repeat(by_group, shape[1])
    tracker.label_weight(node, bias, 0, made, "out")
    return tracker.set(out, on_axis(made, 1, len(shape)))


def _whole_groups(tracker: Tracker, node: ir.Node, by_group: Labels, outputs: int) -> Labels:
    """A whole group of a convolution goes or stays: its inputs and its outputs are one unit, which is returned."""
    tracker.sets.unite(by_group, by_group[:, :1])
    if by_group.shape[1] > 1 or outputs > 1:
        tracker.groupings.append(Grouping(node, by_group[:, 0]))
    tracker.edits.append(Edit(node, "group", None, by_group[:, 0], 0))
    return by_group[:, 0]


def same_parts(tracker: Tracker, blocks: Labels) -> Labels:
    """Let every block lose as many channels as any other: the first of each are one unit, the second, and so on.

    Channels that stand in some blocks and not in all stay.

    Args:
        tracker: of the slice.
        blocks: labels, a row for each block.

    Returns:
        The blocks: what stays of each is as long as what stays of the others.
    """
    roots = tracker.sets.roots(blocks)
    counts = [dict(zip(*map(np.ndarray.tolist, np.unique(row, return_counts=True)), strict=True)) for row in roots]
    everywhere = {root for root in counts[0] if all(found.get(root) == counts[0][root] for found in counts)}
    apart = [[root for root in dict.fromkeys(row.tolist()) if _only_in(i, root, counts)] for i, row in enumerate(roots)]
    times = [[counts[i][root] for root in own] for i, own in enumerate(apart)]
    alike = all(found == times[0] for found in times)
    if alike:
        for own in apart[1:]:
            tracker.sets.unite(np.array(apart[0], np.int64), np.array(own, np.int64))
    movable = everywhere.union(*apart) if alike else everywhere
    tracker.sets.freeze(blocks[~np.isin(roots, [root for root in movable if root != FROZEN])])
    return blocks


def _only_in(block: int, root: int, counts: list[dict[int, int]]) -> bool:
    return root != FROZEN and all((root in found) == (i == block) for i, found in enumerate(counts))


def gemm(tracker: Tracker, node: ir.Node) -> bool:
    """`Gemm` with a constant B."""
    data, weight, bias = node.inputs[0], node.inputs[1], input_at(node, 2)
    shape, out = dims(weight), node.outputs[0]
    channels = tracker.rows(tracker.labels(data), 1)
    if shape is None or not are_constant(node.inputs[1:]) or int_attribute(node, "transA", 0):
        return False
    if tracker.labels(data) is not None and channels is None:
        return False
    transposed = bool(int_attribute(node, "transB", 0))
    made = tracker.make(out, shape[0 if transposed else 1])
    tracker.label_weight(node, weight, 1 if transposed else 0, channels, "in")
    tracker.label_weight(node, weight, 0 if transposed else 1, made, "out")
    tracker.set(out, on_axis(made, 1, 2))
    if bias is not None and (size := dims(bias)) and size[-1] == made.size:
        tracker.label_weight(node, bias, -1, made, "out")
    return True


def matmul(tracker: Tracker, node: ir.Node) -> bool:
    """`MatMul`: a constant on either side, or two activations (attention)."""
    left, right = node.inputs[0], node.inputs[1]
    if is_constant(right):
        return _times_weight(tracker, node, left, right)
    if is_constant(left):
        return _weight_times(tracker, node, left, right)
    return _product(tracker, node, left, right)


def _times_weight(tracker: Tracker, node: ir.Node, data: ir.Value | None, weight: ir.Value | None) -> bool:
    shape, rank, labels = dims(weight), rank_of(data), tracker.labels(data)
    channels = tracker.rows(labels, -1)
    if shape is None or len(shape) != 2 or rank is None or (labels is not None and channels is None):
        return False
    tracker.label_weight(node, weight, 0, channels, "in")
    made = tracker.make(node.outputs[0], shape[1])
    tracker.label_weight(node, weight, 1, made, "out")
    return tracker.set(node.outputs[0], on_axis(made, -1, rank))


def _weight_times(tracker: Tracker, node: ir.Node, weight: ir.Value | None, data: ir.Value | None) -> bool:
    shape, rank, labels = dims(weight), rank_of(data), tracker.labels(data)
    channels = tracker.rows(labels, -2) if rank is not None and rank > 1 else None
    if shape is None or len(shape) != 2 or rank is None or rank < 2 or (labels is not None and channels is None):
        return False
    tracker.label_weight(node, weight, 1, channels, "in")
    made = tracker.make(node.outputs[0], shape[0])
    tracker.label_weight(node, weight, 0, made, "out")
    return tracker.set(node.outputs[0], on_axis(made, -2, rank))


def _product(tracker: Tracker, node: ir.Node, left: ir.Value | None, right: ir.Value | None) -> bool:
    """Two activations: the contracted axes meet, batch axes (heads) meet, the outer axes go on."""
    rank = rank_of(left)
    if rank is None or rank != rank_of(right) or rank < 2:
        return False
    a, b = _by_head(tracker, node, left), _by_head(tracker, node, right)
    if a is None and b is None:
        return True
    a = a if a is not None else np.zeros([1] * rank, dtype=np.int64)
    b = b if b is not None else np.zeros([1] * rank, dtype=np.int64)
    met = _meeting(a, left, b, right)
    if met is None:
        return False
    for axis_a, axis_b in met:
        one, other = _along(a, axis_a), _along(b, axis_b)
        if 1 != one.shape[1] != other.shape[1] != 1:  # they carry different channels besides: whole rows only
            tracker.sets.unite(one, one[:, :1])
            tracker.sets.unite(other, other[:, :1])
            one, other = one[:, :1], other[:, :1]
        tracker.sets.unite(one, other)
        if axis_a == rank - 1 and (_nought_stays(left) or _nought_stays(right)):
            tracker.contracted.append(one)
    out = [1] * rank
    parts: list[Labels] = []
    for labels, drop in ((a, rank - 1), (b, rank - 2)):
        kept = np.take(labels, [0], axis=drop)
        if labels.shape[drop] > 1 and kept.size > 1:
            tracker.sets.unite(labels, kept)  # batch axes and the contracted axis go together
        if kept.size > 1:
            parts.append(kept)
            out = list(np.broadcast_shapes(tuple(out), kept.shape))
    merged = _merge(tracker, parts)
    if merged is None:
        for part in parts:
            tracker.sets.freeze(part)
        return True
    return tracker.set(node.outputs[0], merged if merged.size > 1 else None)


def _nought_stays(value: ir.Value | None) -> bool:
    """Whether channels that a linear operator makes as zeros are zeros here, so that a product does not feel them."""
    stack, seen = [value], set()
    while stack:
        node = reached.producer() if (reached := stack.pop()) is not None else None
        if node is None or node.op_type in RULES or node in seen:
            continue
        seen.add(node)
        if node.op_type not in _NOUGHT_STAYS:
            return False
        if node.op_type in ("Add", "Sub") and any(map(_is_shift, node.inputs)):
            return False
        stack += [given for given in node.inputs if constant_of(given) is None]
    return True


def _is_shift(value: ir.Value | None) -> bool:
    """Whether a summand is one constant number for all channels, and not a bias that goes with them."""
    tensor = constant_of(value)
    return tensor is not None and tensor.size == 1 and bool(tensor.numpy().any())


_NOUGHT_STAYS = {
    "Add", "Cast", "Concat", "Div", "Elu", "Erf", "Expand", "Flatten", "Gather", "Gelu", "Identity", "LeakyRelu", "Mul",
    "Neg", "PRelu", "Relu", "Reshape", "Slice", "Split", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze",
}  # fmt: skip
"""Operators whose answer is 0 where their input is."""


def _by_head(tracker: Tracker, node: ir.Node, value: ir.Value | None) -> Labels | None:
    """Labels of one side of a product: whole heads, or, where those have to stay, the same part of each."""
    labels = tracker.labels(value)
    if labels is None:
        return None
    batch = [axis for axis in labelled_axes(labels) if axis < labels.ndim - 2]
    if not batch:
        return labels
    if node not in tracker.by_part:
        tracker.groupings.append(Grouping(node, labels))
        return labels
    first = labels.take([0], axis=batch[0])
    for axis in batch[1:]:
        first = first.take([0], axis=axis)
    tracker.sets.unite(labels, first)
    return first if first.size > 1 else None


def _meeting(a: Labels, left: ir.Value | None, b: Labels, right: ir.Value | None) -> list[tuple[int, int]] | None:
    """Pairs of axes at which both sides carry channels; None when one side's channels meet something unknown."""
    rank = a.ndim
    pairs = [(axis, axis) for axis in range(rank - 2)] + [(rank - 1, rank - 2)]
    met = []
    for axis_a, axis_b in pairs:
        followed_a, followed_b = a.shape[axis_a] > 1, b.shape[axis_b] > 1
        if followed_a and followed_b:
            if a.shape[axis_a] != b.shape[axis_b]:
                return None
            met.append((axis_a, axis_b))
        elif followed_a != followed_b:
            other, axis = (right, axis_b) if followed_a else (left, axis_a)
            length = other.shape[axis] if other is not None and other.shape is not None else None
            if length != 1:
                return None
    return met


def _along(labels: Labels, axis: int) -> Labels:
    """Labels with `axis` first and all others flattened behind it, one row per position."""
    rows = np.moveaxis(labels, axis, 0)
    return rows.reshape(rows.shape[0], -1)[:, :1] if rows.size == rows.shape[0] else rows.reshape(rows.shape[0], -1)


def _merge(tracker: Tracker, parts: list[Labels]) -> Labels | None:
    """Labels of a product: both sides' batch axes are one, and at most one side brings an outer axis."""
    if not parts:
        return np.zeros([1], dtype=np.int64)
    if len(parts) == 1:
        return parts[0]
    one, other = parts
    if one.shape == other.shape:
        tracker.sets.unite(one, other)
        return one
    small, large = sorted(parts, key=lambda part: part.size)
    if any(s not in (1, full) for s, full in zip(small.shape, large.shape, strict=True)):
        return None
    tracker.sets.unite(large, small)
    return large


RULES: dict[str, Rule] = {"Conv": conv, "ConvTranspose": conv_transpose, "Gemm": gemm, "MatMul": matmul}
