"""Closed form at the end of a slice: its last linear operator answers for what went wrong before it.

A student that was trained on the teacher's activations later sees those of the students before
it. The correction of its last linear operator that best makes up for the difference, on the
inputs that it really gets, is a least-squares problem with one solution.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from ndonnx.errors import ShrinkError, first_line
from ndonnx.graph.costs import constant_of
from ndonnx.graph.initializers import set_numbers
from ndonnx.graph.working_copy import slice_batch
from ndonnx.students.features import from_matrix, is_plain, offset_of
from ndonnx.students.least_squares import (
    MOST_FEATURES,
    Regression,
    features_of,
    fit,
    ridge_of,
    shape_of,
    solve_masked,
)
from ndonnx.teacher.probe import Probe, Rows, run_batches, sample_count
from ndonnx.teacher.sessions import REFUSALS

_RIDGES = (1e-4, 1e-2, 1e-1, 1.0, 10.0)
"""Ridges, relative to the mean energy of a feature: what is corrected is small, so a little damping costs nothing, and
where rows are scarce, much of it still corrects a part."""
_PASSED = {
    "BatchNormalization",
    "Clip",
    "Elu",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "LayerNormalization",
    "LeakyRelu",
    "Mish",
    "PRelu",
    "Relu",
    "Selu",
    "Sigmoid",
    "Softplus",
    "Tanh",
}
"""Operators between the last sum and the exit through which a smaller error before is a smaller error behind."""
_MANY_ZEROS = 0.01
"""Part of zeros in a weight from which they are taken for a pattern."""


@dataclass(frozen=True)
class LastLayer:
    """The last linear operator of a slice, and the sum that it adds to."""

    node: ir.Node
    data: str
    """The value that it reads."""
    weight: str
    bias: str | None
    total: str
    """The value, before any activation, to which its output is added: what is made right."""


def find_last_layer(model: ir.Model, held: Collection[str] = ()) -> LastLayer | None:
    """The last linear operator whose output reaches the exit through sums and activations alone; None if there is none.

    Its weight belongs to it alone, and is not `held`. Of several that are added up, the one with most weights.
    """
    total = model.graph.outputs[0]
    while (node := total.producer()) is not None and node.op_type in _PASSED and node.inputs[0] is not None:
        if len(node.inputs[0].uses()) > 1:
            break
        total = node.inputs[0]
    found = sorted((node for node in _summands(total) if _name(node) not in held), key=lambda node: -_size(node))
    if not found:
        return None
    node = found[0]
    data, weight = node.inputs[0], node.inputs[1]
    assert data is not None and data.name and weight is not None and weight.name and total.name
    bias = offset_of(node) or _added(node)
    own = bias is not None and len(bias.uses()) == 1 and bias.name not in held
    return LastLayer(node, data.name, weight.name, bias.name if own and bias is not None else None, total.name)


def _summands(value: ir.Value) -> Iterator[ir.Node]:
    """Linear operators that a sum consists of."""
    node = value.producer()
    if node is None:
        return
    if node.op_type == "Add":
        for summand in node.inputs:
            if summand is not None and len(summand.uses()) == 1:
                yield from _summands(summand)
    elif _is_own(node):
        yield node


def _added(node: ir.Node) -> ir.Value | None:
    """The constant with one number for each output that is added to a matrix product; None where there is none."""
    uses = list(node.outputs[0].uses())
    weight = constant_of(node.inputs[1])
    if node.op_type != "MatMul" or len(uses) != 1 or weight is None or uses[0].node.op_type != "Add":
        return None
    other = next((value for value in uses[0].node.inputs if value is not node.outputs[0]), None)
    tensor = constant_of(other)
    outputs = weight.shape[-1]
    return other if tensor is not None and tensor.size == outputs and tensor.shape[-1:] == (outputs,) else None


def _is_own(node: ir.Node) -> bool:
    if node.op_type not in ("Conv", "Gemm", "MatMul") or node.inputs[1] is None or not is_plain(node):
        return False
    return constant_of(node.inputs[1]) is not None and len(node.inputs[1].uses()) == 1


def _name(node: ir.Node) -> str | None:
    return node.inputs[1].name if node.inputs[1] is not None else None


def _size(node: ir.Node) -> int:
    tensor = constant_of(node.inputs[1])
    assert tensor is not None
    return int(tensor.size)


_HOLDOUT = 0.25
"""Fraction of the samples that decides whether the refit helped."""


def reconstruct_last_layer(
    teacher: ir.Model,
    student: ir.Model,
    teacher_rows: Rows,
    student_rows: Rows,
    *,
    constants: frozenset[str] = frozenset(),
    threads: int = 1,
    held: Collection[str] = (),
) -> ir.Model | None:
    """The student with its last linear operator refitted on the inputs that it gets; None where that helps nothing.

    Zero weights of an operator that has many stay zero.

    Args:
        teacher: the teacher's slice.
        student: its student; not changed.
        teacher_rows: what the teacher's slice gets, samples first.
        student_rows: what the student gets for the same samples.
        constants: inputs without a sample axis.
        threads: for onnxruntime.
        held: names of weights that stay as they are.

    Raises:
        ShrinkError: onnxruntime does not run a slice, or the activations are too large to be squared.
    """
    end = find_last_layer(student, held)
    names = {value.name for node in teacher.graph for value in node.outputs}
    if end is None or end.total not in names or features_of(end.node, shape_of(end.node)) > MOST_FEATURES:
        return None
    exit_ = teacher.graph.outputs[0].name or ""
    pairs = _Pairs(teacher, student, teacher_rows, student_rows, constants, threads)
    fitted, held_out = pairs.split(_HOLDOUT)
    copy = student.clone()
    _apply(copy, end, pairs.missing(end, fitted))
    before = pairs.error(student, held_out, exit_)
    after = pairs.error(copy, held_out, exit_)
    return copy if after < before else None


@dataclass
class _Pairs:
    """Runs both slices side by side on the same samples."""

    teacher: ir.Model
    student: ir.Model
    teacher_rows: Rows
    student_rows: Rows
    constants: frozenset[str]
    threads: int

    def split(self, holdout: float) -> tuple[range, range]:
        """Samples to fit on, and those that are held out."""
        count = sample_count(self.student_rows, self.constants)
        fitted = max(1, count - max(1, round(holdout * count)))
        return range(fitted), range(min(fitted, count - 1), count)

    def missing(self, end: LastLayer, samples: range) -> Regression:
        """What the student's sum lacks of the teacher's, on what its operator reads."""
        problem = Regression(end.node, len(samples))
        for batch, (theirs, ours) in self._batches(self.student, [end.total], [end.data, end.total], samples):
            problem.add(batch, ours[end.data], theirs[end.total] - ours[end.total])
        return problem

    def error(self, student: ir.Model, samples: range, exit_: str) -> float:
        """Mean squared error of the exit."""
        squared, count = 0.0, 0
        for _, (theirs, ours) in self._batches(student, [exit_], [exit_], samples):
            squared += float(np.square(ours[exit_] - theirs[exit_], dtype=np.float64).sum())
            count += theirs[exit_].size
        return squared / count

    def _batches(
        self, student: ir.Model, theirs: Sequence[str], ours: Sequence[str], samples: range
    ) -> Iterator[tuple[range, list[dict[str, npt.NDArray[np.float32]]]]]:
        try:
            probes = [
                Probe(model, values, threads=self.threads)
                for model, values in ((self.teacher, theirs), (student, ours))
            ]
            feeds = (self.teacher_rows, self.student_rows)
            runs = [(probe.run, rows) for probe, rows in zip(probes, feeds, strict=True)]
            yield from run_batches(runs, self.constants, samples, slice_batch(self.teacher))
        except REFUSALS as error:
            raise ShrinkError(f"onnxruntime does not run a slice: {first_line(error)}") from error


def _apply(model: ir.Model, end: LastLayer, problem: Regression) -> None:
    """Add the solution to the operator's weight and bias."""
    weight = model.graph.initializers[end.weight]
    assert weight.const_value is not None
    old = weight.const_value.numpy()
    kept = _support(end.node, old)
    if kept is None:
        solution, offset = fit(problem.parts(), offset=end.bias is not None, ridges=_RIDGES)
    else:
        moments = problem.moments() if end.bias is not None else problem.moments().about_zero()
        damped = moments.square.clone()
        damped.diagonal(dim1=1, dim2=2).add_(ridge_of(damped, _RIDGES[0])[:, None])
        solution = solve_masked(damped, moments.cross, torch.from_numpy(kept)[None])
        offset = moments.offset(solution)
    if end.bias is not None:
        bias = model.graph.initializers[end.bias]
        assert bias.const_value is not None
        numbers = bias.const_value.numpy()
        set_numbers(bias, numbers + offset[0].numpy().reshape(numbers.shape))
    set_numbers(weight, old + from_matrix(end.node, solution[0].numpy(), old.shape))


def _support(node: ir.Node, weight: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_] | None:
    """Which weights may change, (features, outputs), where a pattern of zeros has to be kept; None: all."""
    from_output = node.op_type == "Conv" or (node.op_type == "Gemm" and _transposed(node))
    matrix = weight.reshape(len(weight), -1).T if from_output else weight
    kept: npt.NDArray[np.bool_] = matrix != 0
    return None if kept.mean() > 1 - _MANY_ZEROS else kept


def _transposed(node: ir.Node) -> bool:
    return "transB" in node.attributes and node.attributes["transB"].as_int() == 1
