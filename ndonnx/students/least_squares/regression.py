"""The least-squares problem of one linear operator: what it should give, on what it reads, batch after batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from ndonnx.students.least_squares.moments import Accumulator, Moments
from ndonnx.students.least_squares.rows import Array, RowSampler
from ndonnx.students.least_squares.solver import RIDGES, solve

_AMPLE = 5
"""Rows per feature from which the slightest ridge is safe."""
_HELD_OUT = 0.25
"""Part of the samples, the last ones, that choose the ridge where rows are scarce."""


class Regression:
    """Moments of an operator's features and of the outputs that it should give, from a bounded number of rows.

    All samples have to be fed, in order.
    """

    def __init__(self, node: ir.Node, samples: int, weight_shape: tuple[int, ...] | None = None) -> None:
        """Begin with nothing.

        Args:
            node: `Conv`, `Gemm` or `MatMul` with a constant weight.
            samples: that will be fed in all.
            weight_shape: of the operator's weight; None where the node's own has it.
        """
        self._rows = RowSampler(node, samples, weight_shape)
        self.features = self._rows.features
        """Features of one group."""
        self._samples = samples
        self._first, self._last = Accumulator(self._rows.groups), Accumulator(self._rows.groups)
        self._scarce = False

    @property
    def rows(self) -> int:
        """Rows taken in so far."""
        return self._first.rows + self._last.rows

    def add(self, samples: range, data: Array, output: Array | None = None) -> None:
        """Take in rows of one batch.

        Args:
            samples: which it has.
            data: what the operator reads, float32.
            output: what it should give; None where only the features' own moments are wanted.
        """
        index = self._rows.index(len(samples), data)
        if not self.rows:
            self._scarce = len(index) * self._samples < _AMPLE * self.features * len(samples)
        before = round(len(index) * self._part_before(samples)) if self._scarce else len(index)
        for accumulator, part in ((self._first, index[:before]), (self._last, index[before:])):
            for x, y in self._rows.chunks(part, data, output):
                accumulator.add(x, y)

    def _part_before(self, samples: range) -> float:
        """The part of a batch that lies before the samples held out; a lone sample is split by its positions."""
        held_out = max(1, int(_HELD_OUT * self._samples)) if self._samples > 1 else _HELD_OUT
        return min(1.0, max(0.0, (self._samples - held_out - samples.start) / len(samples)))

    def moments(self) -> Moments:
        """Moments of all rows, about their means.

        Raises:
            ShrinkError: the rows are so large that their squares overflow.
        """
        parts = self.parts() or (self._first.moments(),)
        return parts[0] if len(parts) == 1 else parts[0].merged(parts[1])

    def parts(self, features: int | None = None) -> tuple[Moments, ...]:
        """Moments of the rows that fit and, where rows are scarce, of those that choose the ridge.

        Args:
            features: how many are left of the operator's. None: all of one group.

        Raises:
            ShrinkError: the rows are so large that their squares overflow.
        """
        if features is not None and self.rows >= _AMPLE * features:
            return (self.moments(),)
        return tuple(part.moments() for part in (self._first, self._last) if part.rows)

    def solve(self, *, offset: bool) -> tuple[Tensor, Tensor]:
        """See `fit`, on all rows."""
        return fit(self.parts(), offset=offset)


def fit(parts: Sequence[Moments], *, offset: bool, ridges: Sequence[float] = RIDGES) -> tuple[Tensor, Tensor]:
    """Weights (groups, features, outputs) and offset (groups, outputs), float64.

    With two parts the ridge is the one that does best on the second after a fit to the first; the weights are then
    fitted to both.

    Args:
        parts: one or two, as `Regression.parts` gives them.
        offset: whether the operator has one; if not, it is zero.
        ridges: to choose from, relative to the mean energy of a feature; with one part, the first.

    Raises:
        ShrinkError: the systems hold NaN or Inf.
    """
    given = list(parts) if offset else [part.about_zero() for part in parts]
    moments = parts[0] if len(parts) == 1 else parts[0].merged(parts[1])
    moments = moments if offset else moments.about_zero()
    weights = solve(moments.square, moments.cross, ridges[0] if len(given) == 1 else _best(ridges, *given))
    return weights, moments.offset(weights)


def _best(ridges: Sequence[float], first: Moments, last: Moments) -> float:
    def error(ridge: float) -> float:
        weights = solve(first.square, first.cross, ridge)
        return last.error(weights, first.offset(weights))

    return min(ridges, key=error)


class FeatureEnergies:
    """The mean square of each of an operator's features: all that is asked of one with too many for their products."""

    def __init__(self, node: ir.Node, samples: int) -> None:
        self._rows = RowSampler(node, samples)
        self._squares = torch.zeros(self._rows.features * self._rows.groups, dtype=torch.float64)
        self._count = 0

    def add(self, samples: range, data: Array) -> None:
        """Take in rows of one batch; see `Regression.add`."""
        for x, _ in self._rows.chunks(self._rows.index(len(samples), data), data):
            self._squares += x.double().square_().sum(dim=0)
            self._count += len(x)

    def energies(self) -> npt.NDArray[np.float64]:
        """Mean square of the features, group after group."""
        found: npt.NDArray[np.float64] = (self._squares / max(1, self._count)).numpy()
        return found
