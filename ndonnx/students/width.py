"""Width reduction: a part `k` of each channel group is kept, the rest is cut out of the weights."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ndonnx.errors import ShrinkError
from ndonnx.graph.costs import is_weight
from ndonnx.graph.interface import is_inside, name_inside
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.graph.shapes.symbolic import resolve_shapes
from ndonnx.partition import ChannelGroups, DimensionEdit, stays
from ndonnx.partition.channels.sizes import write_number
from ndonnx.partition.removable import kept_width
from ndonnx.students.base import WHOLE, Candidate, StudentMethod, TeacherSlice
from ndonnx.students.importance import rank_units
from ndonnx.students.reconstruction import refit_consumers
from ndonnx.students.zeroing import check_by_zeroing

Init = Literal["teacher", "least-squares", "random"]


@dataclass(frozen=True)
class Width(StudentMethod):
    """Keep the part `keep` of every group's units; see `Recipe` for the fields."""

    keep: float
    round_to: int | None = None
    init: Init = "least-squares"

    def _build(self, teacher: TeacherSlice, rng: np.random.Generator) -> Candidate:
        spec = f"width k={self.keep:g}"
        if (reason := self.needs_more(teacher.groups)) is not None:
            raise ShrinkError(f"{teacher.name}: {reason}")
        if self.keep == 1:
            return Candidate(spec, teacher.model.clone())
        kept = choose_units(teacher, self.keep, self.round_to)
        shrunk = shrink(teacher.model, teacher.groups, kept)
        check_by_zeroing(teacher, shrunk, kept)
        if self.init == "least-squares":
            shrunk = refit_consumers(teacher, shrunk, kept)
        elif self.init == "random":
            shrunk = randomise(shrunk, rng, teacher.held)
        return Candidate(spec, shrunk)

    def needs_more(self, groups: ChannelGroups) -> str | None:
        """A width inside."""
        return None if groups.groups else "no width to shrink inside"

    def shape_key(self, groups: ChannelGroups) -> Hashable | None:
        """The kept widths: how many units stay decides which do, and all that is drawn and fitted."""
        if not groups.groups:
            return None
        kept = tuple(kept_width(group.width, self.keep, self.round_to) for group in groups.groups)
        return WHOLE if kept == tuple(group.width for group in groups.groups) else (self.init, kept)


def choose_units(teacher: TeacherSlice, keep: float, round_to: int | None) -> npt.NDArray[np.bool_]:
    """Mark the units to keep: in every group those that matter most for the exit on the samples."""
    kept = np.zeros(teacher.groups.units, dtype=bool)
    for group, order in rank_units(teacher, lambda group: kept_width(group.width, keep, round_to)).items():
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
        value.const_value = ir.tensor(np.ascontiguousarray(array), name=axis.initializer)
        value.shape = ir.Shape(array.shape)
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


def randomise(model: ir.Model, rng: np.random.Generator, held: Collection[str] = ()) -> ir.Model:
    """Draw the weights of linear operators anew (He et al. 2015); biases, scales, slopes and `held` weights stay."""
    copy = model.clone()
    drawn = {value for name, value in copy.graph.initializers.items() if name in held}
    for node in copy.graph:
        value = node.inputs[1] if node.op_type in _LINEAR_OPS and len(node.inputs) > 1 else None
        if value is None or value in drawn or not is_weight(value) or value.const_value is None:
            continue
        drawn.add(value)
        shape = tuple(int(d) for d in value.const_value.shape.numpy())
        array = rng.normal(0.0, np.sqrt(2.0 / _fan_in(node, shape)), shape)
        value.const_value = ir.tensor(array.astype(value.const_value.dtype.numpy()), name=value.name)
    return copy


_LINEAR_OPS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


def _fan_in(node: ir.Node, shape: tuple[int, ...]) -> int:
    """Inputs that one output of a linear operator sums over."""
    if node.op_type == "Conv":
        return int(np.prod(shape[1:]))
    if node.op_type == "ConvTranspose":
        return int(shape[0] * np.prod(shape[2:]))
    transposed = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int() == 1
    return shape[-1] if transposed else shape[-2] if len(shape) > 1 else shape[0]
