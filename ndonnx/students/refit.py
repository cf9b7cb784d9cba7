"""Closed form before any gradient: readers of a shrunk group are refitted by least squares.

Each linear operator that lost inputs gets the weights that best reproduce the teacher's own
output of that operator from the student's remaining inputs, on captured data. Operators are
taken in order, so that a later one sees what the earlier ones now give it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from ndonnx.students.base import TeacherSlice
from ndonnx.students.features import (
    LinearReader,
    features,
    from_matrix,
    gram,
    kernel_of,
    linear_readers,
    targets,
    thin,
)

_RIDGES = (1e-6, 1e-4, 1e-2, 1e-1)
"""Ridges, relative to the mean energy of a feature; the first where rows are ample."""
_AMPLE = 5
"""Rows per feature from which the slightest ridge is safe."""


def refit_consumers(teacher: TeacherSlice, student: ir.Model, kept: npt.NDArray[np.bool_]) -> ir.Model:
    """A copy of the shrunk slice whose readers of shrunk groups are refitted on the samples."""
    copy = student.clone()
    # A weight that several operators share cannot suit one of them alone.
    readers = [reader for reader in linear_readers(teacher.model, teacher.groups) if _is_own(copy, reader)]
    expected = teacher.run(teacher.model, [reader.output for reader in readers])
    for reader in readers:
        given = teacher.run(copy, [reader.data])[reader.data]
        _refit(copy, reader, given, _kept_outputs(teacher, reader, expected[reader.output], kept))
    return copy


def _is_own(student: ir.Model, reader: LinearReader) -> bool:
    weights = (student.graph.initializers[name] for name in (reader.weight, reader.bias) if name is not None)
    return all(len(value.uses()) == 1 for value in weights)


def _kept_outputs(
    teacher: TeacherSlice, reader: LinearReader, output: np.ndarray, kept: npt.NDArray[np.bool_]
) -> np.ndarray:
    """The teacher's output on the channels that the student still has."""
    channel_axis = 1 if reader.node.op_type == "Conv" else output.ndim - 1
    for axis in teacher.groups.axes:
        if axis.initializer == reader.weight and axis.role == "out":
            stays = (axis.units < 0) | np.append(kept, True)[axis.units]
            return np.compress(stays, output, axis=channel_axis)
    return output


def _refit(student: ir.Model, reader: LinearReader, given: np.ndarray, expected: np.ndarray) -> None:
    weight = student.graph.initializers[reader.weight]
    assert weight.const_value is not None
    shape = _shape(weight)
    given, expected = thin(given, expected)
    x = features(reader.node, given, kernel_of(shape))
    y = targets(reader.node, expected)
    if len(x) < x.shape[1]:
        return  # more unknowns than rows: any solution fits them, with weights as large as it likes
    mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
    if reader.has_bias:
        x, y = x - mean_x, y - mean_y
    solution = solve(x, y, len(given) if reader.node.op_type == "Conv" else None)
    _set(weight, from_matrix(reader.node, solution, shape))
    if reader.bias is not None:
        bias = student.graph.initializers[reader.bias]
        _set(bias, (mean_y.double().numpy() - mean_x.double().numpy() @ solution).reshape(_shape(bias)))


def solve(x: torch.Tensor, y: torch.Tensor, innermost: int | None = None) -> npt.NDArray[np.float64]:
    """Weights (features, outputs) of least squares with a ridge, solved in float64.

    Where rows are scarce, the ridge is the one that does best on a quarter of the samples after
    a fit to the others.
    """
    if len(x) >= _AMPLE * x.shape[1]:
        return _ridged(gram(x), (x.T @ y).double(), _RIDGES[0])
    judged = _last_quarter(len(x), innermost)
    square, cross = gram(x[~judged]), (x[~judged].T @ y[~judged]).double()
    further, mixed = gram(x[judged]), (x[judged].T @ y[judged]).double()

    def error(ridge: float) -> float:
        weights = torch.from_numpy(_ridged(square, cross, ridge))
        return float((weights * (further @ weights - 2 * mixed)).sum())

    return _ridged(square + further, cross + mixed, min(_RIDGES, key=error))


def _last_quarter(rows: int, innermost: int | None) -> torch.Tensor:
    samples = innermost or rows
    start = samples - max(1, samples // 4)
    return (torch.arange(rows) % samples) >= start


def _ridged(square: torch.Tensor, cross: torch.Tensor, relative: float) -> npt.NDArray[np.float64]:
    square = square.clone()
    square.diagonal().add_(relative * square.trace() / len(square) + torch.finfo(torch.float64).tiny)
    factor, failed = torch.linalg.cholesky_ex(square)
    if failed:
        return np.asarray(torch.linalg.lstsq(square, cross, driver="gelsd").solution.numpy())
    return np.asarray(torch.cholesky_solve(cross, factor).numpy())


def _set(value: ir.Value, array: np.ndarray) -> None:
    assert value.const_value is not None
    value.const_value = ir.tensor(array.astype(value.const_value.dtype.numpy()), name=value.name)


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return tuple(int(d) for d in value.const_value.shape.numpy())
