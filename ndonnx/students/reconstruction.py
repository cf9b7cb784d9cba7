"""Closed form before any gradient: readers of a shrunk group are refitted by least squares.

Each linear operator that lost inputs gets the weights that best reproduce the teacher's own
output of that operator from the student's remaining inputs, on captured data. So does one behind a
statistic of the channels, whose inputs are other ones since some channels are missing in it. Operators are
taken in order, so that a later one sees what the earlier ones now give it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from ndonnx.convert import relative_error
from ndonnx.graph.costs import constant_of
from ndonnx.graph.initializers import set_numbers
from ndonnx.graph.storage.sparse import is_sparse
from ndonnx.partition import stays
from ndonnx.students.base import TeacherSlice
from ndonnx.students.features import LinearReader, from_matrix, linear_readers, offset_of, summed, summed_axis
from ndonnx.students.forward import Forward, side_by_side
from ndonnx.students.importance import ReaderStatistics
from ndonnx.students.least_squares import MOST_FEATURES, Regression, features_of, fit
from ndonnx.students.linear import every_reader

Kept = npt.NDArray[np.bool_]

_SAME = 1e-5
"""Largest difference, relative to its scale, between what two operators read that is the same for a fit."""


def refit_consumers(
    teacher: TeacherSlice, student: ir.Model, kept: Kept, measured: ReaderStatistics | None = None
) -> ir.Model:
    """A copy of the shrunk slice whose readers of shrunk groups are refitted on the samples.

    Args:
        teacher: the slice with its groups and samples.
        student: the slice without the units that are not kept; not changed.
        kept: units that stay, (units,) of bool.
        measured: what the teacher's readers get. A reader that in the student gets the same, but for the removed
            channels, is fitted by that. None: nothing is known.

    Raises:
        ShrinkError: onnxruntime does not run a slice, or the activations are too large to be squared.
    """
    copy = student.clone()
    theirs, ours = Forward(teacher, teacher.model), Forward(teacher, copy)
    sharing: dict[str, list[LinearReader]] = {}
    refitted: list[str] = []
    for reader in _readers(teacher):
        several = sharing.setdefault(reader.weight, [])
        several.append(reader)
        # A weight that several operators share has to suit them all: it is fitted when the last of them is reached.
        if len(copy.graph.initializers[reader.weight].uses()) == len(several) and _are_alike(several):
            problem = measured.problems.get(reader.output) if measured and len(several) == 1 else None
            as_before = problem is not None and reader.data not in _behind(teacher.model, refitted)
            if problem is not None and as_before and _gets_the_rest(teacher, copy, reader, kept):
                _refit_known(teacher, copy, reader, problem, kept)
            else:
                _refit(ours, theirs, several, kept)
            refitted += [each.output for each in several]
    return copy


def _gets_the_rest(teacher: TeacherSlice, student: ir.Model, reader: LinearReader, kept: Kept) -> bool:
    """Whether the student's operator reads the teacher's own channels, without those that went."""
    few = teacher.few()
    found, whole = (few.run(model, [reader.data])[reader.data] for model in (student, teacher.model))
    rest = np.compress(stays(reader.units, kept), whole, axis=_channel_axis(reader, whole))
    return found.shape == rest.shape and relative_error(found, rest) <= _SAME


def _refit_known(
    teacher: TeacherSlice, student: ir.Model, reader: LinearReader, problem: Regression, kept: Kept
) -> None:
    """Fit an operator to what the teacher's gives, by the moments of what that reads."""
    weight = student.graph.initializers[reader.weight]
    node, shape = reader.node, _shape(weight)
    if is_sparse(weight) or problem.rows < features_of(node, shape):
        return
    outputs = _kept_columns(teacher, reader, kept)
    matrix = torch.from_numpy(reader.weight_matrix().astype(np.float64))[None, :, outputs]
    bias = None if reader.bias is None else constant_of(teacher.model.graph.initializers[reader.bias])
    numbers = np.zeros(len(outputs)) if bias is None else bias.numpy().reshape(-1)
    offset = torch.from_numpy(numbers[outputs].astype(np.float64))[None]
    stay = torch.from_numpy(np.flatnonzero(np.repeat(stays(reader.units, kept), reader.features // len(reader.units))))
    parts = [part.of_linear(matrix, offset, stay) for part in problem.parts(len(stay))]
    _set(student, reader, reader.bias, *fit(parts, offset=bias is not None))


def _readers(teacher: TeacherSlice) -> list[LinearReader]:
    """Linear operators that lose inputs, or whose inputs change, in topological order."""
    found = linear_readers(teacher.model, teacher.groups, teacher.held)
    changed = _behind(teacher.model, [statistic.node for statistic in teacher.groups.statistics])
    if changed:
        losing = {reader.output for reader in found}
        found += [r for r in every_reader(teacher.model, teacher.held) if r.data in changed and r.output not in losing]
        place = {node.outputs[0].name: number for number, node in enumerate(teacher.model.graph)}
        found.sort(key=lambda reader: place[reader.output])
    return found


def _behind(model: ir.Model, names: Sequence[str]) -> set[str]:
    """These values, and all that depend on them."""
    found = set(names)
    for node in model.graph if names else ():
        if any(value is not None and value.name in found for value in node.inputs):
            found.update(value.name or "" for value in node.outputs)
    return found


def _are_alike(readers: Sequence[LinearReader]) -> bool:
    """Whether operators with one weight read it along the same axis."""
    return len({(reader.node.op_type, summed_axis(reader.node)) for reader in readers}) == 1


def _refit(ours: Forward, theirs: Forward, readers: Sequence[LinearReader], kept: Kept) -> None:
    """Fit the one weight of these operators, with the bias where it belongs to them alone."""
    teacher, student = theirs.teacher, ours.model
    weight = student.graph.initializers[readers[0].weight]
    node, shape = readers[0].node, _shape(weight)
    if features_of(node, shape) > MOST_FEATURES or is_sparse(weight):
        return
    bias = _own_bias(teacher, readers)
    problem = Regression(node, teacher.count * len(readers), shape)
    for number, reader in enumerate(readers):
        first = number * teacher.count
        for samples, data, output in side_by_side((ours, reader.data), (theirs, reader.output)):
            whole = summed(reader.node, output, offset=bias is not None)
            expected = _kept_outputs(teacher, reader, whole, kept)
            problem.add(range(first + samples.start, first + samples.stop), data, expected)
    if len(readers) > 1:
        ours.forget()  # the last of them reads what the first one gives
    if problem.rows < problem.features:
        return  # more unknowns than rows: any solution fits them, with weights as large as it likes
    _set(student, readers[0], bias, *problem.solve(offset=bias is not None))


def _own_bias(teacher: TeacherSlice, readers: Sequence[LinearReader]) -> str | None:
    """The bias that all these operators have and nothing else has; None where there is none, or it has to stay."""
    if len(readers) == 1:
        return readers[0].bias
    biases = {offset_of(reader.node) for reader in readers}
    bias = biases.pop()
    if biases or bias is None or bias.name in teacher.held:
        return None
    return bias.name if len(bias.uses()) == len(readers) else None


def _set(
    student: ir.Model, reader: LinearReader, bias: str | None, weights: torch.Tensor, offset: torch.Tensor
) -> None:
    """Give an operator the solution (groups, features, outputs), and its bias the offset (groups, outputs)."""
    weight = student.graph.initializers[reader.weight]
    set_numbers(weight, from_matrix(reader.node, weights[0].numpy(), _shape(weight)))
    if bias is not None:
        value = student.graph.initializers[bias]
        set_numbers(value, offset[0].numpy().reshape(_shape(value)))


def _kept_outputs(teacher: TeacherSlice, reader: LinearReader, output: np.ndarray, kept: Kept) -> np.ndarray:
    """The teacher's output on the channels that the student still has."""
    return np.compress(_kept_columns(teacher, reader, kept), output, axis=_channel_axis(reader, output))


def _kept_columns(teacher: TeacherSlice, reader: LinearReader, kept: Kept) -> Kept:
    """Which outputs of an operator the student still has, (outputs,) of bool."""
    for axis in teacher.groups.axes:
        if axis.initializer == reader.weight and axis.role == "out":
            return stays(axis.units, kept)
    return np.ones(reader.weight_matrix().shape[1], dtype=bool)


def _channel_axis(reader: LinearReader, value: np.ndarray) -> int:
    return 1 if reader.node.op_type == "Conv" else value.ndim - 1


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return tuple(int(d) for d in value.const_value.shape.numpy())
