"""Channel groups of a slice: which channels of which weights can go, and what goes with them.

Walks the slice once with the rules of `rules.py`, then sorts the channels that no rule froze
into units (removed together: a channel with everything that carries it) and groups (units of
equal standing, of which a part `k` is kept).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ndonnx.graph.ties import origin_of, transposed
from ndonnx.partition.channels.group import (
    UNREAD,
    ChannelGroup,
    ChannelGroups,
    ChannelStatistic,
    Copy,
    DimensionEdit,
    FrozenWidth,
    WeightAxis,
)
from ndonnx.partition.channels.labels import FROZEN, Labels
from ndonnx.partition.channels.rules import Edit, Tracker, apply_rule


def find_groups(nodes: Iterable[ir.Node], exit_: ir.Value, held: Collection[ir.Value] = ()) -> ChannelGroups:
    """Channel groups of the slice made of `nodes` (in topological order) and ending in `exit_`.

    Values made outside the nodes are not followed, so their channels stay; so do the exit's, and those of the `held`
    weights, which stay as they are.
    """
    return _best_labels(list(nodes), exit_, held)[1]


def shrinking_axes(nodes: Iterable[ir.Node], exit_: ir.Value) -> dict[ir.Value, frozenset[int]]:
    """Axes that get shorter when the slice's groups shrink, by value; a value without any is not among them."""
    tracker, _ = _best_labels(list(nodes), exit_)
    found = {value: _carried(tracker, labels) for value, labels in tracker.values.items()}
    for value, folded in tracker.folded.items():
        if _carried(tracker, folded.labels):
            found[value] = frozenset(range(folded.rank))
    return {value: axes for value, axes in found.items() if axes}


def frozen_widths(nodes: Iterable[ir.Node]) -> tuple[list[FrozenWidth], bool]:
    """Widths that have to stay in what these nodes compute, and whether there are others.

    Args:
        nodes: in topological order; what others read of them, or the graph hands out, stays.
    """
    nodes = list(nodes)
    own = {value for node in nodes for value in node.outputs}
    inside = set(nodes)
    ends = [value for value in own if value.is_graph_output() or not inside.issuperset(value.consumers())]
    tracker, groups = _labels_of(nodes, *ends)
    found = []
    for value, labels in tracker.made.items():
        if labels.size > 1 and not tracker.sets.roots(labels).any():
            found.append(_frozen(value, labels.size, tracker.sets.why_frozen(int(labels[0]))))
    return found, bool(groups.groups)


def _frozen(value: str, width: int, cause: Hashable | None) -> FrozenWidth:
    if isinstance(cause, ir.Node):
        return FrozenWidth(value, width, cause.op_type, cause.name or cause.outputs[0].name or "")
    return FrozenWidth(value, width, str(cause or "end"), "")


def _carried(tracker: Tracker, labels: Labels) -> frozenset[int]:
    """Axes of labels along which channels stand, if any of them may go."""
    may_go = (tracker.sets.roots(labels) != FROZEN).any()
    return frozenset(axis for axis, size in enumerate(labels.shape) if size > 1 and may_go)


def _best_labels(
    nodes: list[ir.Node], exit_: ir.Value, held: Collection[ir.Value] = ()
) -> tuple[Tracker, ChannelGroups]:
    """What the labels of the slice tell, and the groups.

    Where channels stand in blocks (heads, groups), whole blocks go first of all. The same part of each block goes
    where whole ones have to stay, or where that reaches as much and is finer.
    """
    best = _labels_of(nodes, exit_, held=held)
    tracker = best[0]
    stuck = {g.node for g in tracker.groupings if (tracker.sets.roots(g.labels) == FROZEN).all()}
    coarse = {g.node for g in tracker.groupings if g.is_coarse}
    for by_part in (stuck, stuck | coarse) if coarse - stuck else (stuck,):
        if by_part:
            other = _labels_of(nodes, exit_, held=held, by_part=by_part)
            best = max(best, other, key=lambda found: (_reach(nodes, found[1]), found[1].units))
    return best


def _labels_of(
    nodes: list[ir.Node],
    *ends: ir.Value,
    held: Collection[ir.Value] = (),
    by_part: Collection[ir.Node] = frozenset(),
) -> tuple[Tracker, ChannelGroups]:
    """What is known then, and the groups."""
    tracker = Tracker(by_part=by_part)
    for node in nodes:
        apply_rule(tracker, node)
    for end in ends:
        tracker.freeze(end)
    for value in held:
        tracker.freeze_weight(value)
    _freeze_weights_read_elsewhere(tracker, nodes)
    _make_rectangular(tracker)
    _freeze_unread(tracker)
    return tracker, _assemble(tracker, nodes)


def _reach(nodes: list[ir.Node], groups: ChannelGroups) -> int:
    """Elements of the weights that the groups shrink, vectors aside: those of norms tell little of what can go."""
    names = groups.weights()
    held = {value for node in nodes for value in node.inputs if value is not None and value.name in names}
    shapes = (value.const_value.shape.numpy() for value in held if value.const_value is not None)
    return sum(math.prod(shape) for shape in shapes if sum(size > 1 for size in shape) > 1)


def _freeze_weights_read_elsewhere(tracker: Tracker, nodes: list[ir.Node]) -> None:
    """A matrix that some node of the slice reads without a rule having labelled it stays whole."""
    for node in nodes:
        for value in node.inputs:
            origin = origin_of(value) if value is not None else None
            if origin is None or (origin, None) not in tracker.weights or transposed(node.outputs[0]) is not None:
                continue  # of a transpose, what reads it tells
            if node not in tracker.weights[origin, None].readers:
                tracker.sets.cause = node
                tracker.freeze_weight(origin)


def _freeze_unread(tracker: Tracker) -> None:
    """A unit that nothing sums over, no weight and no product of two activations, has nothing to show it is unused."""
    read = {FROZEN}
    tracker.sets.cause = UNREAD
    for labels in tracker.contracted:
        read.update(tracker.sets.roots(labels).reshape(-1).tolist())
    for weight in tracker.weights.values():
        for axis, labels in weight.axes.items():
            if weight.roles[axis] == "in":
                read.update(tracker.sets.roots(labels).reshape(-1).tolist())
    for labels in tracker.made.values():
        roots = tracker.sets.roots(labels)
        if not set(roots.tolist()) <= read:
            tracker.sets.freeze(labels[~np.isin(roots, list(read))])


def _assemble(tracker: Tracker, nodes: list[ir.Node]) -> ChannelGroups:
    unit_of: dict[int, int] = {}
    groups: list[ChannelGroup] = []
    for name, members in _components(tracker):
        start = len(unit_of)
        for root in members:
            unit_of[root] = len(unit_of)
        groups.append(ChannelGroup(name, start, len(unit_of)))

    def units(labels: Labels) -> npt.NDArray[np.int64]:
        roots = tracker.sets.roots(labels)
        found = np.array([unit_of.get(root, -1) for root in roots.ravel().tolist()], dtype=np.int64)
        found = found.reshape(roots.shape)
        return found[0] if found.ndim > 1 and (found == found[0]).all() else found

    found_axes = {
        key: [
            WeightAxis(key[0].name or "", axis, weight.roles[axis], found)
            for axis, labels in weight.axes.items()
            if ((found := units(labels)) >= 0).any()
        ]
        for key, weight in tracker.weights.items()
    }
    axes, copies = _with_copies(found_axes, nodes)
    edits = []
    for edit in tracker.edits:
        along = _varying(tracker.sets.roots(edit.labels), edit.axis)
        if along is None or _follows(tracker, edit, along):
            continue
        if ((found := units(along[: edit.stop])) >= 0).any():
            edits.append(DimensionEdit(edit.node.outputs[0].name or "", edit.slot, edit.position, found))
    statistics = (
        ChannelStatistic(
            found.node.outputs[0].name or "", found.axis, units(found.labels), found.carries, found.stretched
        )
        for found in tracker.statistics
    )
    changed = tuple(found for found in statistics if (found.units >= 0).any())
    multiplied = {unit for labels in tracker.contracted for unit in units(labels).ravel().tolist()} - {-1}
    return ChannelGroups(tuple(groups), tuple(axes), tuple(edits), changed, tuple(copies), frozenset(multiplied))


def _with_copies(
    found: Mapping[tuple[ir.Value, ir.Node | None], list[WeightAxis]], nodes: list[ir.Node]
) -> tuple[list[WeightAxis], list[Copy]]:
    """All axes that have units, and the copies that readers of one vector need whose units are not the same.

    The vector itself is left to those readers whose channels stay; where there are none, to the first one.
    """
    axes: list[WeightAxis] = []
    copies: list[Copy] = []
    names: dict[ir.Value, dict[Hashable, str]] = {}
    reading: dict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in nodes:
        for given in dict.fromkeys(node.inputs):
            if given is not None and given.is_initializer():
                reading[given].append(node)
    for (value, reader), own in found.items():
        name = value.name or ""
        if reader is None or not own:
            axes += own
            continue
        known = names.setdefault(value, {})
        key = tuple((axis.axis, axis.units.tobytes()) for axis in own)
        if key not in known:
            whole = any(not found.get((value, node)) for node in reading[value])
            known[key] = f"{name}/{reader.outputs[0].name}" if known or whole else name
            axes += [replace(axis, initializer=known[key]) for axis in own]
        if known[key] != name:
            copies.append(Copy(name, reader.outputs[0].name or "", known[key]))
    return axes, copies


def _follows(tracker: Tracker, edit: Edit, along: Labels) -> bool:
    """Whether the graph computes the number from the length of an axis with these very channels."""
    if edit.follows is None:
        return False
    origin = _varying(tracker.sets.roots(edit.follows[0]), edit.follows[1])
    return origin is not None and np.array_equal(origin, along)


def _make_rectangular(tracker: Tracker) -> None:
    """Channels that lie along several axes at once can only go row by row: along the longest axis."""
    for _ in range(2):  # uniting one block may concern an earlier one
        for block in tracker.blocks:
            roots = tracker.sets.roots(block)
            varying = [axis for axis in range(block.ndim) if _varying(roots, axis) is not None]
            for axis in sorted(varying, key=lambda axis: block.shape[axis])[:-1]:
                tracker.sets.unite(block, block.take([0], axis=axis))


def _varying(roots: Labels, axis: int) -> Labels | None:
    """Roots along an axis, when they vary along it at all."""
    if (roots == roots.take([0], axis=axis)).all():
        return None
    return np.moveaxis(roots, axis, 0).reshape(roots.shape[axis], -1)[:, 0]


def _components(tracker: Tracker) -> list[tuple[str, list[int]]]:
    """Roots that stand on a common axis, as groups in the order in which they are made."""
    leader: dict[int, int] = {}
    members: dict[int, list[int]] = defaultdict(list)
    names: dict[int, str] = {}
    for name, labels in tracker.made.items():
        roots = list(dict.fromkeys(root for root in tracker.sets.roots(labels).tolist() if root != FROZEN))
        if not roots:
            continue
        joined = list(dict.fromkeys(leader[root] for root in roots if root in leader))
        head = joined[0] if joined else roots[0]
        names.setdefault(head, name)
        for other in joined[1:]:
            for root in members.pop(other):
                leader[root] = head
                members[head].append(root)
        for root in roots:
            if root not in leader:
                leader[root] = head
                members[head].append(root)
    return [(names[head], roots) for head, roots in members.items() if len(roots) > 1]
