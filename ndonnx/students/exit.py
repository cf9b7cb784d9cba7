"""Closed form at the end of a slice: its last linear operator answers for what went wrong before it.

A student that was trained on the teacher's activations later sees those of the students before
it. The correction of its last linear operator that best makes up for the difference, on the
inputs that it really gets, is a least-squares problem with one solution.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from ndonnx.errors import ShrinkError
from ndonnx.graph.costs import constant_of
from ndonnx.students.features import features, from_matrix, gram, is_plain, kernel_of, targets
from ndonnx.teacher.sessions import REFUSALS, first_line, make_session

Rows = Mapping[str, npt.NDArray[np.generic]]
"""Inputs of a slice by name; the first axis is the sample, except for constants."""

_RIDGE = 1e-4
"""Ridge, relative to the mean energy of a feature: what is corrected is small, so a little damping costs nothing."""
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
_BATCH = 64
_FEATURE_BYTES = 64 * 2**20
"""Most bytes of features that are in memory at a time."""


@dataclass(frozen=True)
class Exit:
    """The last linear operator of a slice, and the sum that it adds to."""

    node: ir.Node
    data: str
    """The value that it reads."""
    weight: str
    bias: str | None
    total: str
    """The value, before any activation, to which its output is added: what is made right."""


def find_exit(model: ir.Model) -> Exit | None:
    """The last linear operator whose output reaches the exit through sums and activations alone; None if there is none.

    Its weight belongs to it alone. Of several that are added up, the one with most weights.
    """
    total = model.graph.outputs[0]
    while (node := total.producer()) is not None and node.op_type in _PASSED and node.inputs[0] is not None:
        if len(node.inputs[0].uses()) > 1:
            break
        total = node.inputs[0]
    found = sorted(_summands(total), key=lambda node: -_size(node))
    if not found:
        return None
    node = found[0]
    data, weight = node.inputs[0], node.inputs[1]
    assert data is not None and data.name and weight is not None and weight.name and total.name
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    own = bias is not None and constant_of(bias) is not None and len(bias.uses()) == 1 and len(bias.shape or ()) == 1
    return Exit(node, data.name, weight.name, bias.name if own and bias is not None else None, total.name)


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


def _is_own(node: ir.Node) -> bool:
    if node.op_type not in ("Conv", "Gemm", "MatMul") or node.inputs[1] is None or not is_plain(node):
        return False
    return constant_of(node.inputs[1]) is not None and len(node.inputs[1].uses()) == 1


def _size(node: ir.Node) -> int:
    tensor = constant_of(node.inputs[1])
    assert tensor is not None
    return int(tensor.size)


def refit_exit(
    teacher: ir.Model,
    student: ir.Model,
    teacher_rows: Rows,
    student_rows: Rows,
    *,
    constants: frozenset[str] = frozenset(),
    holdout: float = 0.25,
    threads: int = 1,
) -> ir.Model | None:
    """The student with its last linear operator refitted on the inputs that it gets; None where that helps nothing.

    Zero weights of an operator that has many stay zero.

    Args:
        teacher: the teacher's slice.
        student: its student; not changed.
        teacher_rows: what the teacher's slice gets, samples first.
        student_rows: what the student gets for the same samples.
        constants: inputs without a sample axis.
        holdout: part of the samples that decides whether the refit helped.
        threads: for onnxruntime.

    Raises:
        ShrinkError: onnxruntime does not run a slice, or the activations are too large to be squared.
    """
    end = find_exit(student)
    names = {value.name for node in teacher.graph for value in node.outputs}
    if end is None or end.total not in names:
        return None
    exit_ = teacher.graph.outputs[0].name or ""
    feeds = _Pairs(teacher, student, teacher_rows, student_rows, constants, threads)
    fitted, judged = feeds.split(holdout)
    copy = student.clone()
    _apply(copy, end, _normal_equations(feeds, fitted, end))
    before = feeds.error(student, judged, exit_)
    after = feeds.error(copy, judged, exit_)
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
        """Samples to fit on, and those to judge by."""
        count = min(len(rows) for name, rows in self.student_rows.items() if name not in self.constants)
        fitted = max(1, count - max(1, round(holdout * count)))
        return range(fitted), range(min(fitted, count - 1), count)

    def differences(self, end: Exit, samples: range) -> Iterator[tuple[npt.NDArray[np.float32], ...]]:
        """What the student's operator reads, and what its sum lacks of the teacher's, batch after batch."""
        theirs = _session(self.teacher, [end.total], self.threads)
        ours = _session(self.student, [end.data, end.total], self.threads)
        for start in range(samples.start, samples.stop, _BATCH):
            rows = slice(start, min(start + _BATCH, samples.stop))
            (expected,) = theirs(self._feed(self.teacher_rows, rows))
            data, total = ours(self._feed(self.student_rows, rows))
            yield data, expected - total

    def error(self, student: ir.Model, samples: range, exit_: str) -> float:
        """Mean squared error of the exit."""
        theirs = _session(self.teacher, [exit_], self.threads)
        ours = _session(student, [exit_], self.threads)
        squared, count = 0.0, 0
        for start in range(samples.start, samples.stop, _BATCH):
            rows = slice(start, min(start + _BATCH, samples.stop))
            (expected,) = theirs(self._feed(self.teacher_rows, rows))
            (found,) = ours(self._feed(self.student_rows, rows))
            squared += float(np.square(found - expected, dtype=np.float64).sum())
            count += expected.size
        return squared / count

    def _feed(self, values: Rows, rows: slice) -> dict[str, npt.NDArray[np.generic]]:
        return {name: _plain(array if name in self.constants else array[rows]) for name, array in values.items()}


@dataclass(frozen=True)
class _Normal:
    """Normal equations of a least-squares problem, the last feature a constant one where there is a bias."""

    square: torch.Tensor
    cross: torch.Tensor


def _normal_equations(pairs: _Pairs, samples: range, end: Exit) -> _Normal:
    tensor = constant_of(end.node.inputs[1])
    assert tensor is not None
    kernel = kernel_of(tuple(int(d) for d in tensor.shape.numpy()))
    square = cross = None
    for data, missing in pairs.differences(end, samples):
        step = _samples_at_once(data, kernel)
        for start in range(0, len(data), step):
            x = features(end.node, data[start : start + step], kernel)
            y = targets(end.node, missing[start : start + step])
            if end.bias is not None:
                x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
            part, mixed = gram(x), (x.T @ y).double()
            square = part if square is None else square + part
            cross = mixed if cross is None else cross + mixed
    assert square is not None and cross is not None
    return _Normal(square, cross)


def _samples_at_once(data: npt.NDArray[np.float32], kernel: tuple[int, ...]) -> int:
    each = int(np.prod(data.shape[1:])) * 4 * max(1, int(np.prod(kernel)))
    return max(1, _FEATURE_BYTES // max(1, each))


def _apply(model: ir.Model, end: Exit, normal: _Normal) -> None:
    """Add the solution to the operator's weight and bias."""
    weight = model.graph.initializers[end.weight]
    assert weight.const_value is not None
    old = weight.const_value.numpy()
    square = normal.square.clone()
    square.diagonal().add_(_RIDGE * square.diagonal().mean() + torch.finfo(torch.float64).tiny)
    kept = _support(end.node, old, has_bias=end.bias is not None)
    solution = _solve(square, normal.cross, kept)
    if end.bias is not None:
        bias = model.graph.initializers[end.bias]
        assert bias.const_value is not None
        _set(bias, bias.const_value.numpy() + solution[-1])
        solution = solution[:-1]
    _set(weight, old + from_matrix(end.node, solution, old.shape))


def _support(node: ir.Node, weight: npt.NDArray[np.float32], *, has_bias: bool) -> npt.NDArray[np.bool_] | None:
    """Which weights may change, (features, outputs), where a pattern of zeros has to be kept; None: all."""
    from_output = node.op_type == "Conv" or (node.op_type == "Gemm" and _transposed(node))
    matrix = weight.reshape(len(weight), -1).T if from_output else weight
    kept: npt.NDArray[np.bool_] = matrix != 0
    if kept.mean() > 1 - _MANY_ZEROS:
        return None
    return np.concatenate([kept, np.ones((1, kept.shape[1]), bool)]) if has_bias else kept


def _transposed(node: ir.Node) -> bool:
    return "transB" in node.attributes and node.attributes["transB"].as_int() == 1


def _solve(square: torch.Tensor, cross: torch.Tensor, kept: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.float64]:
    if kept is None:
        return np.asarray(torch.linalg.solve(square, cross).numpy())
    solution = np.zeros(tuple(cross.shape))
    for output in range(cross.shape[1]):
        rows = torch.from_numpy(np.flatnonzero(kept[:, output]))
        if len(rows):
            part = torch.linalg.solve(square[rows][:, rows], cross[rows, output])
            solution[rows.numpy(), output] = part.numpy()
    return solution


def _session(model: ir.Model, values: list[str], threads: int):  # type: ignore[no-untyped-def]
    probe = model.clone()
    inner = ir.convenience.create_value_mapping(probe.graph)
    probe.graph.outputs.clear()
    probe.graph.outputs.extend(inner[name] for name in dict.fromkeys(values))
    wanted = {value.name for value in probe.graph.inputs}
    session = make_session(probe, threads=threads)

    def run(feeds: dict[str, npt.NDArray[np.generic]]) -> list[npt.NDArray[np.float32]]:
        try:
            found = session.run(list(dict.fromkeys(values)), {k: v for k, v in feeds.items() if k in wanted})
        except REFUSALS as error:
            raise ShrinkError(f"onnxruntime does not run a slice: {first_line(error)}") from error
        by_name = dict(zip(dict.fromkeys(values), found, strict=True))
        return [by_name[name] for name in values]

    return run


def _plain(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    return np.array(array, dtype=np.float32) if array.dtype.kind == "f" else np.array(array)


def _set(value: ir.Value, array: npt.NDArray[np.floating]) -> None:
    assert value.const_value is not None
    value.const_value = ir.tensor(array.astype(value.const_value.dtype.numpy()), name=value.name)
