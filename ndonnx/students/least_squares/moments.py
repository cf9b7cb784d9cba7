"""First and second moments of features and outputs, summed chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ndonnx.errors import ShrinkError

_CHUNK_NUMBERS = 2**22
"""Numbers of features, about, that are multiplied at a time."""
_PRECISE_FEATURES = 256
"""Features up to which products are taken in float64: that costs nothing, and rounds nothing off. Of wider problems,
the float32 products of a chunk are added up in float64."""


@dataclass(frozen=True, eq=False)
class Moments:
    """What a least-squares problem needs, in float64; every first axis is the group of the operator (one, mostly)."""

    rows: int
    mean_x: Tensor
    """(groups, features)"""
    mean_y: Tensor
    """(groups, outputs)"""
    square: Tensor
    """Mean products of the features with each other, about their means: (groups, features, features)."""
    cross: Tensor
    """Mean products of features and outputs, about their means: (groups, features, outputs)."""
    energy: float
    """Mean square of a row of all outputs, about their means."""

    def about_zero(self) -> Moments:
        """The same moments about zero, for an operator without an offset; its means are zero."""
        x, y = self.mean_x[:, :, None], self.mean_y[:, None, :]
        return Moments(
            self.rows,
            torch.zeros_like(self.mean_x),
            torch.zeros_like(self.mean_y),
            self.square + x @ x.mT,
            self.cross + x @ y,
            self.energy + float(self.mean_y.square().sum()),
        )

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets of rows together."""
        rows = self.rows + other.rows
        part = other.rows / rows
        x, y = (other.mean_x - self.mean_x)[:, :, None], (other.mean_y - self.mean_y)[:, None, :]
        between = part * (1 - part)
        return Moments(
            rows,
            torch.lerp(self.mean_x, other.mean_x, part),
            torch.lerp(self.mean_y, other.mean_y, part),
            torch.lerp(self.square, other.square, part) + between * (x @ x.mT),
            torch.lerp(self.cross, other.cross, part) + between * (x @ y),
            self.energy + part * (other.energy - self.energy) + between * float(y.square().sum()),
        )

    def of_linear(self, weights: Tensor, offset: Tensor, kept: Tensor) -> Moments:
        """Moments of some of the features, and of what a linear operator gives on all of them, without another row.

        Args:
            weights: of the operator, float64 (groups, features, outputs).
            offset: its own, (groups, outputs).
            kept: indices of the features that are left, (kept,) of int64, the same in each group.
        """
        cross = self.square @ weights
        return Moments(
            self.rows,
            self.mean_x[:, kept],
            (self.mean_x[:, None, :] @ weights)[:, 0] + offset,
            self.square[:, kept][:, :, kept],
            cross[:, kept],
            float((weights * cross).sum()),
        )

    def offset(self, weights: Tensor) -> Tensor:
        """The offset (groups, outputs) that goes with weights (groups, features, outputs)."""
        return self.mean_y - (self.mean_x[:, None, :] @ weights)[:, 0]

    def error(self, weights: Tensor, offset: Tensor) -> float:
        """Mean squared error of a row of all outputs with these weights and this offset."""
        missed = self.offset(weights) - offset
        explained = (weights * (self.square @ weights - 2 * self.cross)).sum()
        return self.energy + float(explained) + float(missed.square().sum())


class Accumulator:
    """Sums the moments of rows that come in any number of parts."""

    def __init__(self, groups: int = 1) -> None:
        self.rows = 0
        self._groups = groups
        self._shift_x = self._shift_y = torch.empty(0)
        self._sum_x = self._sum_y = self._square = self._cross = torch.empty(0, dtype=torch.float64)
        self._energy = 0.0

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Take in rows.

        Args:
            x: float32 (rows, groups * features), group after group.
            y: float32 (rows, groups * outputs); None where only the features' own moments are wanted.
        """
        if not len(x):
            return
        y = x.new_empty(len(x), 0) if y is None else y
        if not self.rows:
            self._begin(x, y)
        step = max(1, _CHUNK_NUMBERS // max(1, x.shape[1]))
        for rows, outputs in zip(torch.split(x, step), torch.split(y, step), strict=True):
            self._add(rows - self._shift_x, outputs - self._shift_y)

    def moments(self) -> Moments:
        """The moments of all rows so far.

        Raises:
            ShrinkError: the rows are so large that their squares overflow float32, in which students are trained.
        """
        square = self._square
        largest = float(square.diagonal(dim1=1, dim2=2).amax()) if square.numel() else 0.0
        if not largest <= torch.finfo(torch.float32).max:
            size = max(largest, 0.0) ** 0.5
            raise ShrinkError(f"activations as large as {size:.1g} overflow when they are squared")
        x, y = self._sum_x / self.rows, self._sum_y / self.rows
        return Moments(
            self.rows,
            self._shift_x.double().reshape(x.shape) + x,
            self._shift_y.double().reshape(y.shape) + y,
            square / self.rows - x[:, :, None] @ x[:, None, :],
            self._cross / self.rows - x[:, :, None] @ y[:, None, :],
            self._energy / self.rows - float(y.square().sum()),
        )

    def _begin(self, x: Tensor, y: Tensor) -> None:
        # In float32 a large mean would drown what varies about it, so most of it goes before squaring.
        self._shift_x, self._shift_y = x.mean(dim=0), y.mean(dim=0)
        features, outputs = x.shape[1] // self._groups, y.shape[1] // self._groups
        self._sum_x, self._sum_y, self._square, self._cross = (
            torch.zeros(self._groups, *shape, dtype=torch.float64)
            for shape in ((features,), (outputs,), (features, features), (features, outputs))
        )

    def _add(self, x: Tensor, y: Tensor) -> None:
        self.rows += len(x)
        if x.shape[1] // self._groups <= _PRECISE_FEATURES:
            x, y = x.double(), y.double()
        self._energy += float(y.double().square().sum())
        by_group = [rows.reshape(len(rows), self._groups, -1).transpose(0, 1) for rows in (x, y)]
        self._sum_x += by_group[0].sum(dim=1).double()
        self._sum_y += by_group[1].sum(dim=1).double()
        self._cross += (by_group[0].mT @ by_group[1]).double()
        if self._groups > 1:
            self._square += (by_group[0].mT @ by_group[0]).double()
        else:
            self._square[0] += _inner_products(x)


def _inner_products(rows: Tensor) -> Tensor:
    """Products of all columns with each other. NumPy asks BLAS for half of a matrix times its own transpose, torch for
    all of it."""
    array = rows.numpy()
    return torch.from_numpy(array.T @ array)
