"""`Reshape`: axes that are split, joined, or joined with a dynamic one until they are parted again."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import onnx_ir as ir

from ndonnx.graph.shapes.sizes import factors
from ndonnx.partition.channels.labels import Labels, axis_labels
from ndonnx.partition.channels.rules.tracker import Edit, Folded, Tracker, labelled_axes
from ndonnx.partition.channels.sizes import number_source


def reshape(tracker: Tracker, node: ir.Node) -> bool:
    """`Reshape` that splits or joins axes; the target's numbers follow the channels that stay."""
    data, out = node.inputs[0], node.outputs[0]
    if data is not None and data in tracker.folded:
        return _unfold(tracker, node, tracker.folded[data])
    labels = tracker.labels(data)
    if labels is None:
        return True
    before, after = _symbolic(data, labels), _symbolic(out)
    if before is None or after is None:
        return False
    after = _resolved(before, after)
    moved = _moved(labels, before, after)
    if moved is None:
        return _fold(tracker, node, labels, before, after)
    known = {axis: axis for axis in labelled_axes(moved)}
    return _follow_numbers(tracker, node, moved, known) and tracker.set(out, moved)


def _moved(labels: Labels, before: list[int | str], after: list[int | str]) -> Labels | None:
    """Labels behind a reshape, where all axes, or at least those with channels, can be found again."""
    if (found := _blockwise(labels, before, after)) is not None:
        return found
    span = _spans(labels, before, after)
    if span is None:
        return None
    (start, stop), (first, last) = span
    block = np.broadcast_to(labels.reshape(labels.shape[start:stop]), [int(n) for n in before[start:stop]])
    inner = _narrowed(block.reshape([int(n) for n in after[first:last]]))
    return inner.reshape([1] * first + list(inner.shape) + [1] * (len(after) - last)).copy()


def _blockwise(labels: Labels, before: list[int | str], after: list[int | str]) -> Labels | None:
    """Labels of a reshape that joins and splits some axes and leaves all others where they are."""
    given: list[int] = []
    wanted: list[int] = []
    i = k = 0
    while i < len(before) and k < len(after):
        start, first = i, k
        i, k = i + 1, k + 1
        while (whole := _signature(before[start:i])) != (taken := _signature(after[first:k])):
            if i < len(before) and (k == len(after) or _reaches(whole, taken)):
                i += 1
            elif k < len(after):
                k += 1
            else:
                return None
        if max(labels.shape[start:i]) == 1:
            given, wanted = given + [1] * (i - start), wanted + [1] * (k - first)
        elif i - start == k - first == 1:
            given, wanted = [*given, labels.shape[start]], [*wanted, labels.shape[start]]
        elif all(isinstance(size, int) for size in (*before[start:i], *after[first:k])):
            given, wanted = given + [int(n) for n in before[start:i]], wanted + [int(n) for n in after[first:k]]
        else:
            return None
    if before[i:] or after[k:]:
        return None
    return _narrowed(np.broadcast_to(labels, given).reshape(wanted)).copy()


def _reaches(whole: tuple[int, Counter[str]], taken: tuple[int, Counter[str]]) -> bool:
    """Whether a stretch of axes holds a part of what the other one holds: it is the one to be drawn out."""
    return taken[0] % whole[0] == 0 and not whole[1] - taken[1]


def _narrowed(labels: Labels) -> Labels:
    """Axes along which the labels are all the same (an axis between two that carry channels) as one position."""
    for axis in range(labels.ndim):
        first = labels.take([0], axis=axis)
        if (labels == first).all():
            labels = first
    return labels


def _follow_numbers(tracker: Tracker, node: ir.Node, labels: Labels, axes: dict[int, int]) -> bool:
    """Let the target's numbers follow the labels; `axes` maps positions of the target to axes of the labels."""
    edits = []
    for position, axis in axes.items():
        source = number_source(node, 1, position)
        if source is None:
            return False
        if labels.shape[axis] == 1 or source.number in (-1, 0) or (source.number is None and source.length_of is None):
            continue  # the node counts by itself, or the graph does
        if not source.writable:
            if not _counted(tracker, labels, axis, source.length_of):
                return False
            continue
        edits.append(Edit(node, 1, position, labels, axis, follows=_along_origin(tracker, source.length_of)))
    tracker.edits += edits
    return True


def _counted(tracker: Tracker, labels: Labels, axis: int, origin: tuple[ir.Value, int] | None) -> bool:
    """Whether a number is computed from the length of an axis with these very channels."""
    along, theirs = axis_labels(labels, axis), _along_origin(tracker, origin)
    counted = None if theirs is None else axis_labels(*theirs)
    if along is None or counted is None or along.shape != counted.shape:
        return False
    return bool((tracker.sets.roots(along) == tracker.sets.roots(counted)).all())


def _along_origin(tracker: Tracker, origin: tuple[ir.Value, int] | None) -> tuple[Labels, int] | None:
    """Labels whose count a computed number is already, and their axis."""
    labels = tracker.labels(origin[0]) if origin is not None else None
    return (labels, origin[1]) if labels is not None and origin is not None else None


def _resolved(before: list[int | str], after: list[int | str]) -> list[int | str]:
    """The target with its one unknown length as a number, where the others account for all that is dynamic."""
    held, symbols = _signature(before)
    for axis, size in enumerate(after):
        taken, others = _signature([*after[:axis], *after[axis + 1 :]])
        if isinstance(size, str) and symbols == others and taken and held % taken == 0:
            return [*after[:axis], held // taken, *after[axis + 1 :]]
    return after


def _fold(tracker: Tracker, node: ir.Node, labels: Labels, before: list[int | str], after: list[int | str]) -> bool:
    """Channels joined with a dynamic axis (heads with the batch): remembered until they are parted again."""
    folded = _joined(labels, before, after)
    if folded is None:
        return False
    others = [axis for axis in range(folded.rank) if axis != folded.first]
    if not _follow_numbers(tracker, node, folded.labels, {axis: folded.apart(axis)[0] for axis in others}):
        return False
    source = number_source(node, 1, folded.first)
    if source is None or source.number != -1:  # a number that is computed counts the heads of old
        return False
    tracker.folded[node.outputs[0]] = folded
    return True


def _joined(labels: Labels, before: list[int | str], after: list[int | str]) -> Folded | None:
    """Axes joined as they are (N, H, L, D -> N*H, L, D), or the front part of the last with the one before it
    (L, N, H*D -> L, N*H, D, as multi-head attention is often written)."""
    joined = len(before) - len(after) + 1
    if (blocks := _blocks_joined(labels, before, after)) is not None:
        return blocks
    if joined > 1:
        fits = [i for i in range(len(after)) if before[:i] == after[:i] and before[i + joined :] == after[i + 1 :]]
        return Folded(labels, fits[0], joined) if len(fits) == 1 and isinstance(after[fits[0]], str) else None
    whole, part = before[-1], after[-1]
    if joined < 1 or len(after) < 2 or before[:-2] != after[:-2] or isinstance(after[-2], int):
        return None
    if not isinstance(whole, int) or not isinstance(part, int) or whole % part or labels.shape[-1] != whole:
        return None
    return Folded(labels.reshape(*labels.shape[:-1], whole // part, part), len(after) - 2, 2)


def _blocks_joined(labels: Labels, before: list[int | str], after: list[int | str]) -> Folded | None:
    """Blocks of channels as an axis, and all in a block joined with the dynamic axes behind (N, C, H, W -> N, G, X)."""
    axis = len(after) - 2
    if axis < 0 or before[:axis] != after[:axis] or labelled_axes(labels) != [axis]:
        return None
    channels, blocks = before[axis], after[axis]
    if not isinstance(channels, int) or not isinstance(blocks, int) or channels % blocks or isinstance(after[-1], int):
        return None
    parted = labels.reshape(*labels.shape[:axis], blocks, channels // blocks, *labels.shape[axis + 1 :])
    return Folded(parted, axis + 1, parted.ndim - axis - 1, (labels, tuple(before)))


def _unfold(tracker: Tracker, node: ir.Node, folded: Folded) -> bool:
    """Joined axes parted as they were."""
    labels, after = folded.labels, _symbolic(node.outputs[0])
    if after is not None and folded.before is not None and tuple(after) == folded.before[1]:
        labels = folded.before[0]
    if after is None or len(after) != labels.ndim:
        return False
    if any(labels.shape[axis] not in (1, size) for axis, size in enumerate(after)):
        return False
    if not _follow_numbers(tracker, node, labels, {axis: axis for axis in range(labels.ndim)}):
        return False
    return tracker.set(node.outputs[0], labels)


def _spans(labels: Labels, before: list[int | str], after: list[int | str]) -> tuple[tuple[int, int], ...] | None:
    """The axes that carry channels on either side of a reshape, wide enough to hold the same elements."""
    carried = labelled_axes(labels)
    start, stop = carried[0], carried[-1] + 1
    while True:
        inside = before[start:stop]
        if not all(isinstance(n, int) for n in inside):
            return None
        found = _place(math.prod(int(n) for n in inside), before[:start], before[stop:], after)
        if found is not None:
            return (start, stop), found
        # What follows the channels may be joined with them (a flattened feature map).
        if stop < len(before):
            stop += 1
        else:
            return None


def _place(size: int, lead: list[int | str], trail: list[int | str], after: list[int | str]) -> tuple[int, int] | None:
    """Where in `after` axes of `size` elements stand, by what is before or behind them."""
    for first in range(len(after)):
        for last in range(first + 1, len(after) + 1):
            inside = after[first:last]
            if not all(isinstance(n, int) for n in inside) or math.prod(int(n) for n in inside) != size:
                continue
            if _same(after[last:], trail) or (lead and _same(after[:first], lead)):
                return first, last
    return None


def _same(one: list[int | str], other: list[int | str]) -> bool:
    """Whether two stretches of axes hold equally many elements, as far as their names tell."""
    return _signature(one) == _signature(other)


def _signature(axes: list[int | str]) -> tuple[int, Counter[str]]:
    number, names = 1, Counter[str]()
    for times, more in map(factors, axes):
        number, names = number * times, names + more
    return number, names


def _symbolic(value: ir.Value | None, labels: Labels | None = None) -> list[int | str] | None:
    """Lengths, and names of dynamic axes; an axis that carries labels is as long as they are."""
    if value is None or value.shape is None:
        return None
    sizes: list[int | str] = [d if isinstance(d, int) else str(d) for d in value.shape]
    if labels is None:
        return sizes
    return [length if length > 1 else size for length, size in zip(labels.shape, sizes, strict=True)]
