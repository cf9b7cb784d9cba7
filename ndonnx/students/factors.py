"""A linear operator as two of lower rank, with the smallest error of its output on captured data.

With features X (rows, features) and the teacher's output Y = X W, two factors A and B minimise
|Y - X A B|^2. For a matrix this is closed form (reduced-rank regression, Izenman 1975): A spans
the leading right singular vectors of X W. A convolution may be cut in four ways, by which of the
two factors has the window along each axis: `k x k` then `1 x 1`, `1 x 1` then `k x k`, `k x 1`
then `1 x k` (Jaderberg et al. 2014), `1 x k` then `k x 1`. Only in the first way is the second
factor applied to one position; in the others A is optimal where the positions that B sums over
are taken apart, and B is then exact by least squares.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ndonnx.students.features import LinearReader, Matrix
from ndonnx.students.least_squares import Regression, cholesky, solve

Kernel = tuple[int, int]

_RIDGE = 1e-6
"""Ridge, relative to the mean energy of a feature."""
_NOTHING = 1e-7
"""Energy of a direction, relative to the strongest, below which it is rounding (moments are sums of float32)."""


@dataclass(frozen=True)
class Form:
    """Which factor has the window along each axis; a matrix has a window of (1, 1)."""

    first: Kernel
    second: Kernel

    def cost(self, channels: int, outputs: int) -> int:
        """Weights of both factors per rank."""
        return channels * int(np.prod(self.first)) + outputs * int(np.prod(self.second))


def forms_of(kernel: Kernel) -> list[Form]:
    """The ways to share a window out between two factors."""
    high, wide = kernel
    return [
        Form((a, b), (high // a, wide // b))
        for a in dict.fromkeys((high, 1))
        for b in dict.fromkeys((wide, 1))
    ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Problem:
    """Moments of an operator's features and of the output that is wanted, as means over the same rows."""

    square: Matrix
    """X^T X (features, features); features are channels times positions of the window."""
    cross: Matrix
    """X^T Y (features, outputs)."""
    energy: float
    """|Y|^2."""
    kernel: Kernel

    @property
    def channels(self) -> int:
        """Input channels."""
        return len(self.square) // int(np.prod(self.kernel))

    @property
    def outputs(self) -> int:
        """Output channels."""
        return int(self.cross.shape[1])

    @property
    def size(self) -> int:
        """Weights of the whole operator."""
        return self.cross.size

    @cached_property
    def weights(self) -> Matrix:
        """Least squares without any limit of rank (features, outputs)."""
        square = torch.from_numpy(self.square)
        found: Matrix = solve(square, torch.from_numpy(self.cross), _RIDGE).numpy()
        return found

    @cached_property
    def unexplained(self) -> float:
        """|Y - X W|^2 that remains with all weights."""
        return max(0.0, self.energy - float((self.weights * self.cross).sum()))


@dataclass(frozen=True, eq=False)
class Fit:
    """A problem, and the means that were taken off where the operator has an offset of its own."""

    problem: Problem
    mean_x: Matrix
    mean_y: Matrix

    def offset(self, weights: Matrix) -> Matrix:
        """The offset that goes with weights (features, outputs)."""
        return self.mean_y - self.mean_x @ weights


def fit_of(reader: LinearReader, problem: Regression) -> Fit:
    """An operator's problem, about the means if it has an offset.

    Args:
        reader: the operator.
        problem: fed with what it reads and with what it should answer.

    Raises:
        ShrinkError: the values are so large that their squares overflow.
    """
    moments = problem.moments() if reader.has_bias else problem.moments().about_zero()
    kernel = reader.kernel
    window = (kernel[0], kernel[1]) if kernel else (1, 1)
    found = Problem(moments.square[0].numpy(), moments.cross[0].numpy(), moments.energy, window)
    return Fit(found, moments.mean_x[0].numpy(), moments.mean_y[0].numpy())


class Cut:
    """One problem in one form: the error of every rank, and the factors of one."""

    def __init__(self, problem: Problem, form: Form) -> None:
        self.problem = problem
        self.form = form
        kernel = problem.kernel
        inner = [axis for axis in (0, 1) if form.first[axis] == kernel[axis]]
        outer = [axis for axis in (0, 1) if axis not in inner]
        order = [0, *(axis + 1 for axis in (*inner, *outer))]
        window = (problem.channels, *kernel)
        rows = problem.channels * int(np.prod(form.first))
        positions = int(np.prod(form.second))
        apart = (rows, positions)
        self._square = problem.square.reshape(*window, *window).transpose(*order, *(axis + 3 for axis in order))
        self._square = self._square.reshape(*apart, *apart)
        self._cross = problem.cross.reshape(*window, -1).transpose(*order, 3).reshape(*apart, -1)
        weights = problem.weights.reshape(*window, -1).transpose(*order, 3).reshape(*apart, -1)
        matrix = weights.reshape(rows, -1)
        each = np.einsum("iqjq->ij", self._square)
        energy, directions = _leading(matrix, each)
        self.limit = min(rows, matrix.shape[1], (problem.size - 1) // form.cost(problem.channels, problem.outputs))
        """Largest rank at which the factors are smaller than the operator."""
        floor = max(_NOTHING * energy[0], np.finfo(np.float64).tiny)
        self.filled = min(self.limit, int((energy > floor).sum()))
        """Largest rank of them that the data have something for."""
        self._first = directions[:, : self.filled] / np.sqrt(energy[: self.filled])

    @cached_property
    def _normal(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cholesky factor of the second factor's normal equations, ranks outermost, and their right side."""
        half = np.tensordot(self._first.T, self._square, (1, 0))
        square = np.tensordot(half, self._first, (2, 0)).transpose(0, 1, 3, 2)
        size = square.shape[0] * square.shape[1]
        cross = np.tensordot(self._first.T, self._cross, (1, 0)).reshape(size, -1)
        factor = cholesky(torch.from_numpy(np.ascontiguousarray(square.reshape(size, size))), _RIDGE)
        return factor, torch.from_numpy(np.ascontiguousarray(cross))

    def errors(self) -> Matrix:
        """|Y - X A B|^2 at ranks 1 to `limit`, the second factor refitted at each."""
        if not self.filled:
            return np.full(self.limit, self.problem.energy)
        factor, cross = self._normal
        explained = torch.linalg.solve_triangular(factor, cross, upper=False).square().sum(dim=1).cumsum(0).numpy()
        positions = self._square.shape[1]
        left: Matrix = self.problem.energy - explained[positions - 1 :: positions]
        found = np.maximum(self.problem.unexplained, left)
        return np.append(found, np.full(self.limit - self.filled, found[-1]))

    def factors(self, rank: int) -> tuple[Matrix, Matrix]:
        """A (rank, channels, *form.first) and B (outputs, rank, *form.second).

        Beyond the rank that the data fill, A is random and B zero: nothing is added, but it can be trained.
        """
        filled = min(rank, self.filled)
        window = (self.problem.channels, *self.form.first)
        a = self._first[:, :filled].reshape(*window, filled).transpose(3, 0, 1, 2)
        b = np.zeros((self.problem.outputs, rank, *self.form.second))
        if filled:
            factor, cross = self._normal
            size = filled * int(np.prod(self.form.second))
            second = torch.cholesky_solve(cross[:size], factor[:size, :size]).numpy()
            b[:, :filled] = second.reshape(filled, *self.form.second, -1).transpose(3, 0, 1, 2)
        further = np.random.default_rng(0).standard_normal((rank - filled, *window))
        further *= np.sqrt(np.square(a).mean()) if filled else 1 / np.sqrt(np.prod(window))
        return np.concatenate([a, further]), b

    def product(self, rank: int) -> Matrix:
        """Both factors as one weight (outputs, channels, *kernel)."""
        a, b = self.factors(rank)
        whole: Matrix = np.einsum("rcyx,orhw->ocyhxw", a, b)
        return whole.reshape(*whole.shape[:2], *self.problem.kernel)


def _leading(matrix: Matrix, square: Matrix) -> tuple[Matrix, Matrix]:
    """The columns M V for the singular vectors V of X M, strongest first, and their energies in X; square is X^T X."""
    if matrix.shape[0] >= matrix.shape[1]:
        energy, vectors = np.linalg.eigh(matrix.T @ square @ matrix)
        return energy[::-1], matrix @ vectors[:, ::-1]
    # The same from the smaller side, with X^T X = L L^T.
    root = cholesky(torch.from_numpy(square), _RIDGE).numpy()
    outer = matrix @ matrix.T @ root
    energy, vectors = np.linalg.eigh(root.T @ outer)
    energy, vectors = energy[::-1], vectors[:, ::-1]
    return energy, outer @ vectors / np.sqrt(np.maximum(energy, np.finfo(np.float64).tiny))
