"""What a shrunk slice must answer like: the teacher slice in which nothing feels the removed channels.

Linear operators ignore a channel when its weights are zero. A statistic over channels (a layer norm, a mean or a
maximum over channels) does not: zeros go into it too. There the teacher slice's operator is given the kept channels
alone, and answers with zeros in the places of the others. So whatever is shrunk is compared with a slice of the
teacher's own width, in which each operator is known to see the kept channels and no more.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ndonnx.convert import relative_error
from ndonnx.errors import ShrinkError
from ndonnx.graph.initializers import add_constant, set_numbers, unique_name
from ndonnx.partition import ChannelGroups, ChannelStatistic, stays
from ndonnx.students.base import TeacherSlice

_TOLERANCE = 1e-4
"""Largest difference, relative to the output's scale."""

Kept = npt.NDArray[np.bool_]


def check_by_zeroing(teacher: TeacherSlice, shrunk: ir.Model, kept: Kept) -> None:
    """The teacher slice that ignores the removed units must answer as the shrunk slice does.

    Args:
        teacher: the slice with its channel groups and samples.
        shrunk: the slice without the removed units, all other weights as they were.
        kept: units that stay, (units,) of bool.

    Raises:
        ShrinkError: the channel groups do not describe this slice.
    """
    few = teacher.few()
    reference = ignoring(teacher.model, _with_lengths(few), kept)
    exit_ = teacher.model.graph.outputs[0].name or ""
    error = relative_error(few.run(shrunk, [exit_])[exit_], few.run(reference, [exit_])[exit_])
    if not error <= _TOLERANCE:
        raise ShrinkError(
            f"{teacher.name}: without the removed channels the slice differs by {error:.2g} of its scale "
            f"from the shrunk slice (at most {_TOLERANCE:g})"
        )


def _with_lengths(teacher: TeacherSlice) -> ChannelGroups:
    """The slice's groups with a unit for every position of an axis whose length only the samples tell."""
    groups, nodes = teacher.groups, {node.outputs[0].name: node for node in teacher.model.graph}
    open_ = {found: nodes[found.node].inputs[0] for found in groups.statistics if found.stretched}
    names = [value.name or "" for value in open_.values() if value is not None]
    values = teacher.run(teacher.model, list(dict.fromkeys(names)))

    def closed(found: ChannelStatistic) -> ChannelStatistic:
        given = open_.get(found)
        if given is None:
            return found
        length = values[given.name or ""].shape[found.axis]
        return replace(found, units=np.repeat(found.units, length // len(found.units)), stretched=False)

    return replace(groups, statistics=tuple(map(closed, groups.statistics)))


def ignoring(model: ir.Model, groups: ChannelGroups, kept: Kept) -> ir.Model:
    """A copy of a slice, as wide as it is, in which nothing depends on the units that are not kept.

    Args:
        model: the slice.
        groups: its channel groups, without statistics of an axis of unknown length.
        kept: units that stay, (units,) of bool.
    """
    copy = model.clone()
    graph = copy.graph
    nodes = {node.outputs[0].name: node for node in graph}
    for statistic in groups.statistics:
        _of_kept_alone(graph, nodes[statistic.node], statistic, groups, kept)
    # What a product of two activations sums over (queries and keys) is removed where it is made.
    made = kept.copy()
    made[[unit for unit in range(groups.units) if unit not in groups.multiplied]] = True
    for axis in groups.axes:
        stay = kept if axis.role == "in" else made
        if not stays(axis.units, stay).all():
            value = graph.initializers[axis.initializer]
            assert value.const_value is not None
            set_numbers(value, axis.zeroed(value.const_value.numpy(), stay))
    return copy


def _of_kept_alone(
    graph: ir.Graph, node: ir.Node, statistic: ChannelStatistic, groups: ChannelGroups, kept: Kept
) -> None:
    """Give a node the kept channels of its first input, and its output zeros for the others."""
    stay = stays(statistic.units, kept)
    given = node.inputs[0]
    assert given is not None
    node.replace_input_with(0, _gathered(graph, node, given, np.flatnonzero(stay), statistic.axis))
    for slot, value in enumerate(node.inputs[1:], 1):
        own = next((axis for axis in groups.axes if value is not None and axis.initializer == value.name), None)
        if own is not None and value is not None and value.const_value is not None:
            few = own.cut(value.const_value.numpy(), kept)
            node.replace_input_with(slot, add_constant(graph, f"{value.name}/kept", few))
    if statistic.carries:
        _scatter(graph, node, stay, statistic.axis)


def _gathered(graph: ir.Graph, before: ir.Node, value: ir.Value, places: npt.NDArray[np.intp], axis: int) -> ir.Value:
    index = add_constant(graph, f"{value.name}/places", places.astype(np.int64))
    gather = ir.node("Gather", [value, index], attributes={"axis": axis}, name=unique_name(graph, f"{before.name}/few"))
    gather.outputs[0].name = gather.name
    graph.insert_before(before, gather)
    return gather.outputs[0]


def _scatter(graph: ir.Graph, node: ir.Node, stay: Kept, axis: int) -> None:
    """Put a node's output back to its old places, with zeros in the others, under its old name."""
    output = node.outputs[0]
    name = output.name
    readers = list(output.uses())
    places = np.maximum(np.cumsum(stay) - 1, 0)
    index = add_constant(graph, f"{name}/places", places.astype(np.int64))
    mask = add_constant(graph, f"{name}/kept", stay.astype(np.float32).reshape(-1, *[1] * (-axis - 1)))
    output.name = unique_name(graph, f"{name}/few")
    spread = ir.node("Gather", [output, index], attributes={"axis": axis}, name=unique_name(graph, f"{name}/spread"))
    spread.outputs[0].name = spread.name
    masked = ir.node("Mul", [spread.outputs[0], mask], name=unique_name(graph, f"{name}/masked"))
    masked.outputs[0].name = name
    for reader, slot in readers:
        reader.replace_input_with(slot, masked.outputs[0])
    graph.insert_after(node, [spread, masked])
    for value in (output, spread.outputs[0], masked.outputs[0]):
        value.shape = None
    masked.outputs[0].type = output.type
