"""Operators that move channels: their labels are moved as numpy would move the data."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import onnx_ir as ir

from ndonnx.graph.costs import constant_of, dims, is_weight
from ndonnx.partition.channels.labels import FROZEN, Labels, axis_labels, check_count, on_axis
from ndonnx.partition.channels.rules.reshaping import reshape
from ndonnx.partition.channels.rules.tracker import (
    Edit,
    Folded,
    Rule,
    Tracker,
    input_at,
    int_attribute,
    labelled_axes,
    numbers,
    rank_of,
)
from ndonnx.partition.channels.sizes import number_source


def pad(tracker: Tracker, node: ir.Node) -> bool:
    """`Pad`; padded channels are zeros that stay."""
    labels = tracker.labels(node.inputs[0])
    if labels is None:
        return True
    pads = numbers(node, "pads", 1)
    rank = labels.ndim
    if pads is None or len(pads) != 2 * rank or input_at(node, 3) is not None:
        return False
    widths = [(pads[a], pads[a + rank]) if labels.shape[a] > 1 else (0, 0) for a in range(rank)]
    if any(low < 0 or high < 0 for low, high in widths):
        return False
    return tracker.set(node.outputs[0], np.pad(labels, widths, constant_values=FROZEN))


def concat(tracker: Tracker, node: ir.Node) -> bool:
    """`Concat`; operands that are not followed bring channels that stay."""
    operands = [value for value in node.inputs if value is not None]
    followed = [labels for value in operands if (labels := tracker.labels(value)) is not None]
    if not followed:
        return True
    rank = followed[0].ndim
    axis = int_attribute(node, "axis", 1) % rank
    if all(labels.shape[axis] == 1 for labels in followed):
        return _concat_beside(tracker, node, operands)
    shape = list(np.broadcast_shapes(*(tuple(np.delete(labels.shape, axis)) for labels in followed)))
    shape.insert(axis, 1)
    parts = []
    for value in operands:
        labels, size = tracker.labels(value), _length(value, axis)
        if size is None:
            return False
        if labels is None or labels.shape[axis] != size:
            if labels is not None:
                tracker.sets.freeze(labels)
            labels = on_axis(np.full(check_count(size), FROZEN, dtype=np.int64), axis, rank)
        target = [size if a == axis else max(shape[a], labels.shape[a]) for a in range(rank)]
        parts.append(np.broadcast_to(labels, target))
    return tracker.set(node.outputs[0], np.concatenate(parts, axis=axis))


def _concat_beside(tracker: Tracker, node: ir.Node, operands: list[ir.Value]) -> bool:
    """Joined along an axis without channels: the channels of all operands are one."""
    labels = [tracker.labels(value) for value in operands]
    first = next(found for found in labels if found is not None)
    if any(found is None or found.shape != first.shape for found in labels):
        return False
    for found in labels:
        if found is not None:
            tracker.sets.unite(first, found)
    return tracker.set(node.outputs[0], first)


def transpose(tracker: Tracker, node: ir.Node) -> bool:
    """`Transpose`."""
    data, perm = node.inputs[0], numbers(node, "perm", None)
    if data is not None and data in tracker.folded:
        return _transpose_folded(tracker, node, tracker.folded[data], perm)
    labels = tracker.labels(data)
    return tracker.set(node.outputs[0], None if labels is None else np.transpose(labels, perm))


def _transpose_folded(tracker: Tracker, node: ir.Node, folded: Folded, perm: list[int] | None) -> bool:
    """`Transpose` of a value with joined axes: they move together."""
    order = perm if perm is not None else list(reversed(range(folded.rank)))
    axes = [apart for axis in order for apart in folded.apart(axis)]
    moved = Folded(np.transpose(folded.labels, axes), order.index(folded.first), folded.count)
    tracker.folded[node.outputs[0]] = moved
    return True


def squeeze(tracker: Tracker, node: ir.Node) -> bool:
    """`Squeeze` of named axes."""
    labels = tracker.labels(node.inputs[0])
    if labels is None:
        return True
    axes = numbers(node, "axes", 1)
    if axes is None or any(labels.shape[axis] > 1 for axis in axes):
        return False
    return tracker.set(node.outputs[0], labels.squeeze(tuple(axis % labels.ndim for axis in axes)))


def unsqueeze(tracker: Tracker, node: ir.Node) -> bool:
    """`Unsqueeze`."""
    labels = tracker.labels(node.inputs[0])
    if labels is None:
        return True
    axes = numbers(node, "axes", 1)
    if axes is None:
        return False
    rank = labels.ndim + len(axes)
    return tracker.set(node.outputs[0], np.expand_dims(labels, tuple(axis % rank for axis in axes)))


def flatten(tracker: Tracker, node: ir.Node) -> bool:
    """`Flatten` behind the batch axis."""
    labels = tracker.labels(node.inputs[0])
    if labels is None:
        return True
    lengths = [_length(node.inputs[0], axis) for axis in range(1, labels.ndim)]
    if int_attribute(node, "axis", 1) != 1 or labels.shape[0] != 1 or any(length is None for length in lengths):
        return False
    whole = np.broadcast_to(labels, (1, *(length or 1 for length in lengths)))
    return tracker.set(node.outputs[0], whole.reshape(1, -1).copy())


def split(tracker: Tracker, node: ir.Node) -> bool:
    """`Split`: along the channels the sizes follow, or equal parts stay equal."""
    labels = tracker.labels(node.inputs[0])
    if labels is None:
        return True
    axis = int_attribute(node, "axis", 0) % labels.ndim
    if labels.shape[axis] == 1:
        return all(tracker.set(value, labels) for value in node.outputs)
    sizes = numbers(node, "split", 1)
    equal = sizes is None
    if sizes is None:
        if labels.shape[axis] % len(node.outputs):
            return False
        sizes = [labels.shape[axis] // len(node.outputs)] * len(node.outputs)
    if sum(sizes) != labels.shape[axis] or len(sizes) != len(node.outputs):
        return False
    parts = np.split(labels, list(accumulate(sizes))[:-1], axis=axis)
    slot: str | int = "split" if "split" in node.attributes else 1
    for position, part in enumerate(parts):
        if equal:
            tracker.sets.unite(parts[0], part)
        else:
            tracker.edits.append(Edit(node, slot, position, part, axis))
    return all(tracker.set(value, part) for value, part in zip(node.outputs, parts, strict=True))


def slice_(tracker: Tracker, node: ir.Node) -> bool:
    """`Slice`: across the channels anything, along them a plain stretch whose bounds follow."""
    labels = tracker.labels(node.inputs[0])
    if labels is None:
        return True
    starts, ends = numbers(node, "starts", 1), numbers(node, "ends", 2)
    axes = numbers(node, "axes", 3)
    if axes is None and input_at(node, 3) is None:
        axes = list(range(len(starts))) if starts is not None else None
    steps = numbers(node, "steps", 4)
    if axes is None or (steps is None and input_at(node, 4) is not None):
        return False
    along = [i for i, axis in enumerate(axes) if labels.shape[axis % labels.ndim] > 1]
    if not along:
        return tracker.set(node.outputs[0], labels)
    if starts is None or ends is None or (steps is not None and any(steps[i] != 1 for i in along)):
        return _slice_whole(tracker, node, labels, [axes[i] % labels.ndim for i in along])
    result = labels
    for i in along:
        axis = axes[i] % labels.ndim
        first, last, _ = slice(starts[i], ends[i]).indices(labels.shape[axis])
        for slot, name, bound, given in ((1, "starts", first, starts[i]), (2, "ends", last, ends[i])):
            if given != 0 and not given >= labels.shape[axis]:
                where: str | int = name if name in node.attributes else slot
                tracker.edits.append(Edit(node, where, i, labels, axis, bound))
        result = result.take(range(first, last), axis=axis)
    return tracker.set(node.outputs[0], result)


def _slice_whole(tracker: Tracker, node: ir.Node, labels: Labels, axes: list[int]) -> bool:
    """Cut at computed bounds: such an axis stays whole, the others may lose positions (heads, with rotary halves)."""
    lengths = [_length(node.outputs[0], axis) for axis in axes]
    if len(labelled_axes(labels)) == len(axes):
        return False
    for axis, length in zip(axes, lengths, strict=True):
        if length is None or length > labels.shape[axis]:
            return False
    result = labels
    for axis, length in zip(axes, lengths, strict=True):
        tracker.sets.unite(labels, labels.take([0], axis=axis))
        result = result.take(range(length or 0), axis=axis)
    return tracker.set(node.outputs[0], result)


def gather(tracker: Tracker, node: ir.Node) -> bool:
    """`Gather` from a table, or of constant positions on an axis of a split value (a query of a fused projection)."""
    data, index = node.inputs[0], constant_of(node.inputs[1])
    labels = tracker.labels(data)
    if labels is None:
        return _look_up(tracker, node)
    axis = int_attribute(node, "axis", 0) % labels.ndim
    if labels.shape[axis] == 1:
        return index is not None and index.size == 1 and _take_away(tracker, node, labels, axis, index)
    if index is None or len(labelled_axes(labels)) == 1:
        return False
    rest = labels.take([0], axis=axis)
    picked = labels.take(index.numpy(), axis=axis)
    # The axis itself must keep its positions: whatever stands on it goes together.
    tracker.sets.unite(labels, rest)
    return tracker.set(node.outputs[0], picked)


def _look_up(tracker: Tracker, node: ir.Node) -> bool:
    """`Gather` of the rows of a table (an embedding): it makes the table's columns."""
    table, ids, out = node.inputs[0], node.inputs[1], node.outputs[0]
    shape, rank = dims(table), rank_of(out)
    if not is_weight(table) or constant_of(ids) is not None or shape is None or len(shape) != 2 or rank is None:
        return True
    if int_attribute(node, "axis", 0) % 2 != 0:
        return True
    made = tracker.make(out, shape[1])
    tracker.label_weight(node, table, 1, made, "out")
    return tracker.set(out, on_axis(made, rank - 1, rank))


def _take_away(tracker: Tracker, node: ir.Node, labels: Labels, axis: int, index: ir.TensorProtocol) -> bool:
    scalar = len(index.shape) == 0
    return tracker.set(node.outputs[0], labels.squeeze(axis) if scalar else labels)


def expand(tracker: Tracker, node: ir.Node) -> bool:
    """`Expand`: repeated heads are the same heads."""
    labels = tracker.labels(node.inputs[0])
    if labels is None:
        return _spread(tracker, node)
    rank = rank_of(node.outputs[0])
    after = dims(node.outputs[0])
    if rank is None or after is None:
        return False
    padded = labels.reshape([1] * (rank - labels.ndim) + list(labels.shape))
    data = dims(node.inputs[0]) or ()
    given = [1] * (rank - len(data)) + list(data)
    target = [n if n > 1 else after[a] if given[a] == 1 else 1 for a, n in enumerate(padded.shape)]
    result = np.broadcast_to(padded, target).copy()
    for axis in labelled_axes(padded):
        source = number_source(node, 1, axis)
        if source is None:
            return False
        if source.number is not None and source.number > 1:
            if not source.writable:
                return False
            tracker.edits.append(Edit(node, 1, axis, result, axis))
    return tracker.set(node.outputs[0], result)


def _spread(tracker: Tracker, node: ir.Node) -> bool:
    """`Expand` of one value for all positions of an axis (a length to divide by): there may be fewer of them."""
    data, out = node.inputs[0], node.outputs[0]
    given, after = dims(data), dims(out)
    if given is None or after is None:
        return True
    before = (1,) * (len(after) - len(given)) + given
    axes = [axis for axis, size in enumerate(after) if size > before[axis]]
    source = number_source(node, 1, axes[0]) if len(axes) == 1 else None
    if source is None or not isinstance(out.shape[axes[0]] if out.shape is not None else None, int):
        return True
    (axis,), size = axes, after[axes[0]]
    origin = source.length_of
    theirs = axis_labels(tracker.labels(origin[0]), origin[1]) if origin is not None else None
    if theirs is not None and theirs.size == size:
        return tracker.set(out, on_axis(theirs, axis, len(after)))
    if source.number != size or not source.writable:
        return True
    labels = on_axis(tracker.sets.fresh(size), axis, len(after))
    tracker.edits.append(Edit(node, 1, axis, labels, axis))
    return tracker.set(out, labels)


def depth_to_space(tracker: Tracker, node: ir.Node) -> bool:
    """`DepthToSpace` (pixel shuffle): the channels that make one go together."""
    labels, size = tracker.labels(node.inputs[0]), int_attribute(node, "blocksize", 1)
    if labels is None:
        return True
    channels = tracker.rows(labels, 1)
    if channels is None or channels.size % size**2:
        return False
    mode = node.attributes.get("mode")
    last = mode is not None and mode.as_string() == "CRD"
    block = channels.reshape(-1, size**2).T if last else channels.reshape(size**2, -1)
    tracker.sets.unite(block, block[:1])
    return tracker.set(node.outputs[0], on_axis(block[0], 1, labels.ndim))


def space_to_depth(tracker: Tracker, node: ir.Node) -> bool:
    """`SpaceToDepth`: every channel becomes as many as a block has pixels."""
    labels, size = tracker.labels(node.inputs[0]), int_attribute(node, "blocksize", 1)
    if labels is None:
        return True
    channels = tracker.rows(labels, 1)
    if channels is None:
        return False
    return tracker.set(node.outputs[0], on_axis(np.tile(channels, size**2), 1, labels.ndim))


def _length(value: ir.Value | None, axis: int) -> int | None:
    if value is None or value.shape is None or axis >= len(value.shape):
        return None
    length = value.shape[axis]
    return length if isinstance(length, int) else None


RULES: dict[str, Rule] = {
    "Concat": concat,
    "DepthToSpace": depth_to_space,
    "Expand": expand,
    "Flatten": flatten,
    "Gather": gather,
    "Pad": pad,
    "Reshape": reshape,
    "Slice": slice_,
    "SpaceToDepth": space_to_depth,
    "Split": split,
    "Squeeze": squeeze,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
}
