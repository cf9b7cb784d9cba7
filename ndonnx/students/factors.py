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
import numpy.typing as npt
import torch

from ndonnx.errors import ShrinkError
from ndonnx.students.features import LinearReader, Matrix, features, gram, targets, thin

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
        return _solve(_factor(square), torch.from_numpy(self.cross)).numpy()

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


_NUMBERS = 2**24
"""Numbers of features, about, that are in memory at a time."""


def fit_of(reader: LinearReader, given: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> Fit:
    """Moments of what an operator reads and of what it should answer with, about their means if it has an offset.

    Raises:
        ShrinkError: the values are so large that their squares overflow.
    """
    given, expected = thin(given, expected)
    kernel = reader.kernel
    shifts: list[torch.Tensor] = []
    square = cross = energy = sum_x = sum_y = torch.zeros((), dtype=torch.float64)
    count = 0
    per_sample = int(np.prod(given.shape[1:])) * int(np.prod(kernel, dtype=np.int64))
    step = max(1, _NUMBERS // max(1, per_sample))
    for start in range(0, len(given), step):
        x = features(reader.node, given[start : start + step], kernel)
        y = targets(reader.node, expected[start : start + step])
        if reader.has_bias:
            # In float32 a large mean would drown what varies about it, so most of it goes before squaring.
            shifts = shifts or [x.mean(dim=0), y.mean(dim=0)]
            x, y = x - shifts[0], y - shifts[1]
        count += len(x)
        square, cross = square + gram(x), cross + (x.T @ y).double()
        energy, sum_x, sum_y = energy + y.double().square().sum(), sum_x + x.sum(0).double(), sum_y + y.sum(0).double()
    means = [torch.zeros_like(sum_x), torch.zeros_like(sum_y)]
    if reader.has_bias:
        square = square - torch.outer(sum_x, sum_x) / count
        cross = cross - torch.outer(sum_x, sum_y) / count
        energy = energy - sum_y.square().sum() / count
        means = [shifts[0].double() + sum_x / count, shifts[1].double() + sum_y / count]
    window = (kernel[0], kernel[1]) if kernel else (1, 1)
    problem = Problem((square / count).numpy(), (cross / count).numpy(), float(energy) / count, window)
    return Fit(problem, means[0].numpy(), means[1].numpy())


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
        factor = _factor(torch.from_numpy(np.ascontiguousarray(square.reshape(size, size))))
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
            second = _solve(factor[:size, :size], cross[:size]).numpy()
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
    root = _factor(torch.from_numpy(square)).numpy()
    outer = matrix @ matrix.T @ root
    energy, vectors = np.linalg.eigh(root.T @ outer)
    energy, vectors = energy[::-1], vectors[:, ::-1]
    return energy, outer @ vectors / np.sqrt(np.maximum(energy, np.finfo(np.float64).tiny))


def _factor(square: torch.Tensor) -> torch.Tensor:
    """Lower Cholesky factor with a slight ridge, raised until rounding does no harm.

    Raises:
        ShrinkError: the moments are no numbers.
    """
    energy = float(square.diagonal().mean()) or 1.0
    factor: torch.Tensor
    for ridge in (_RIDGE, 1e-4, 1e-2, 1.0):
        damped = square.clone()
        damped.diagonal().add_(ridge * energy)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return factor
    raise ShrinkError("the activations' second moments hold NaN")


def _solve(factor: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    return torch.cholesky_solve(cross, factor)
