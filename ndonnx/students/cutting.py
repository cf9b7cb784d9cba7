"""Units cut out of a slice: the weights, and the numbers that the graph holds about them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ndonnx.graph.initializers import set_numbers
from ndonnx.graph.interface import is_inside, name_inside
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.graph.shapes.symbolic import resolve_shapes
from ndonnx.partition import ChannelGroups, DimensionEdit, stays
from ndonnx.partition.channels.sizes import write_number
from ndonnx.partition.removable import kept_width
from ndonnx.students.base import TeacherSlice
from ndonnx.students.importance import ReaderStatistics, rank_units


def choose_units(
    teacher: TeacherSlice, keep: float, round_to: int | None, measured: ReaderStatistics | None = None
) -> npt.NDArray[np.bool_]:
    """Mark the units to keep: in every group those that matter most for the exit on the samples.

    Args:
        teacher: the slice with its groups and samples.
        keep: part of each group's units that stays, above 0 and at most 1.
        round_to: what the number is rounded to a multiple of; see `kept_width`.
        measured: what the readers of the groups get. None: measured here.

    Returns:
        (units,) of bool.
    """
    kept = np.zeros(teacher.groups.units, dtype=bool)
    for group, order in rank_units(teacher, lambda group: kept_width(group.width, keep, round_to), measured).items():
        kept[group.start + order[: kept_width(group.width, keep, round_to)]] = True
    return kept


def shrink(model: ir.Model, groups: ChannelGroups, kept: npt.NDArray[np.bool_]) -> ir.Model:
    """A copy of the slice without the units that are not kept; all other weights are the teacher's."""
    copy = model.clone()
    graph = copy.graph
    for axis in groups.axes:
        value = graph.initializers[axis.initializer]
        assert value.const_value is not None
        array = axis.cut(value.const_value.numpy(), kept)
        set_numbers(value, array)
    by_output = {node.outputs[0].name: node for node in graph}
    # Where the exit is turned, its name is that of the turned value.
    by_output |= {name_inside(node.outputs[0]): node for node in graph if is_inside(node.outputs[0])}
    for edit in groups.edits:
        _write(graph, by_output[edit.node], edit, int(stays(edit.units, kept).sum()))
    boundary = set(graph.inputs) | set(graph.outputs)
    for node in graph:
        for value in node.outputs:
            if value not in boundary:
                value.shape = None
    return resolve_shapes(infer_shapes(copy))


def _write(graph: ir.Graph, node: ir.Node, edit: DimensionEdit, number: int) -> None:
    if isinstance(edit.slot, int):
        assert edit.position is not None
        write_number(graph, node, edit.slot, edit.position, number)
    elif edit.position is None:
        node.attributes[edit.slot] = ir.AttrInt64(edit.slot, number)
    else:
        values = list(node.attributes[edit.slot].as_ints())
        values[edit.position] = number
        node.attributes[edit.slot] = ir.AttrInt64s(edit.slot, values)
