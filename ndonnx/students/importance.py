"""Which channels matter: the error that a channel's removal causes at its reader, on captured data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ndonnx.partition import ChannelGroup
from ndonnx.students.base import TeacherSlice
from ndonnx.students.features import LinearReader, linear_readers
from ndonnx.students.least_squares import FeatureEnergies, Moments, Regression, cholesky, one_thread

Order = npt.NDArray[np.int64]
"""Units of a group, counted from its start, the most important first."""

_SURGERY_LIMIT = 2500
"""Features of a reader above which units are ranked one by one, without joint elimination."""
_RIDGE = 1e-4
"""Ridge, relative to the mean energy of a feature."""


def rank_units(teacher: TeacherSlice, keep: Callable[[ChannelGroup], int]) -> dict[ChannelGroup, Order]:
    """Order the units of every group by what the exit would lose.

    A group that one linear operator reads is thinned out unit by unit, each time the one whose
    loss the others can best make up for (optimal brain surgery on blocks of features; Hassibi &
    Stork 1993). Otherwise a unit counts by the energy that it brings to its readers.
    """
    readers = linear_readers(teacher.model, teacher.groups)
    measured = _measure(teacher, readers)
    orders: dict[ChannelGroup, Order] = {}
    for group in teacher.groups.groups:
        own = [reader for reader in readers if _reads(reader, group)]
        if len(own) == 1 and own[0] in measured.moments and (own[0].units >= 0).all():
            orders[group] = _by_surgery(own[0], measured.moments[own[0]], group, keep(group))
        else:
            orders[group] = _by_energy(teacher, {reader: measured.energies[reader] for reader in own}, group)
    return orders


@dataclass(frozen=True)
class _Measured:
    """What is known of each reader's features: the mean square of each, and all moments where they are not too many."""

    energies: dict[LinearReader, npt.NDArray[np.float64]]
    moments: dict[LinearReader, Moments]


def _measure(teacher: TeacherSlice, readers: Sequence[LinearReader]) -> _Measured:
    narrow = {r: Regression(r.node, teacher.count) for r in readers if r.features <= _SURGERY_LIMIT}
    wide = {r: FeatureEnergies(r.node, teacher.count) for r in readers if r.features > _SURGERY_LIMIT}
    wanted = list(dict.fromkeys(reader.data for reader in readers))
    if wanted:
        for samples, (values,) in teacher.batches((teacher.model, wanted)):
            for reader in readers:
                (narrow.get(reader) or wide[reader]).add(samples, values[reader.data])
    moments = {reader: problem.moments() for reader, problem in narrow.items()}
    energies = {reader: problem.energies() for reader, problem in wide.items()}
    energies |= {reader: _second(found).diagonal().numpy() for reader, found in moments.items()}
    return _Measured(energies, moments)


def _second(moments: Moments) -> torch.Tensor:
    return moments.about_zero().square[0]


def _reads(reader: LinearReader, group: ChannelGroup) -> bool:
    return bool(((reader.units >= group.start) & (reader.units < group.stop)).any())


def _by_energy(
    teacher: TeacherSlice, energies: Mapping[LinearReader, npt.NDArray[np.float64]], group: ChannelGroup
) -> Order:
    score = np.zeros(group.width)
    for reader, seen in energies.items():
        energy = seen * (reader.weight_matrix().astype(np.float64) ** 2).sum(axis=1)
        by_channel = energy.reshape(len(reader.units), -1).sum(axis=1)
        inside = (reader.units >= group.start) & (reader.units < group.stop)
        np.add.at(score, reader.units[inside] - group.start, by_channel[inside])
    if not energies:
        score = _weight_norms(teacher, group)
    return np.argsort(-score, kind="stable").astype(np.int64)


def _weight_norms(teacher: TeacherSlice, group: ChannelGroup) -> npt.NDArray[np.float64]:
    """Squared norm of all weights of each unit: the last resort where no reader's input can be captured."""
    score = np.zeros(group.width)
    for axis in teacher.groups.axes:
        tensor = teacher.model.graph.initializers[axis.initializer].const_value
        assert tensor is not None
        energies = axis.by_unit(np.square(tensor.numpy(), dtype=np.float64), teacher.groups.units)
        score += energies[group.start : group.stop]
    return score


def _by_surgery(reader: LinearReader, moments: Moments, group: ChannelGroup, keep: int) -> Order:
    """Remove, one after another, the unit whose loss costs least after the others are refitted."""
    square = moments.square[0] if reader.has_bias else _second(moments)
    weight = torch.from_numpy(reader.weight_matrix().astype(np.float64))
    # Scaled to a mean energy of 1; features that are all dead have none, and any order will do.
    square = square / (float(square.trace()) / len(square) or 1.0)
    surgery = _Surgery(torch.cholesky_inverse(cholesky(square, _RIDGE)), weight, _blocks(reader, group))
    with one_thread():
        for _ in range(group.width - keep):
            surgery.remove(int(surgery.losses().argmin()))
    alive = np.setdiff1d(np.arange(group.width), surgery.removed)
    return np.concatenate([alive, surgery.removed[::-1]]).astype(np.int64)


def _blocks(reader: LinearReader, group: ChannelGroup) -> npt.NDArray[np.int64]:
    """Features of each unit: (units, most features of a unit), filled up with -1."""
    units = np.repeat(reader.units, reader.features // len(reader.units))
    own = [np.flatnonzero(units == unit) for unit in range(group.start, group.stop)]
    blocks = np.full((group.width, max(map(len, own))), -1, dtype=np.int64)
    for block, features in zip(blocks, own, strict=True):
        block[: len(features)] = features
    return blocks


class _Surgery:
    """Elimination of blocks of features from a least-squares problem, block after block.

    A is the inverse Gram matrix of the features that are left, W their weights. To lose block u
    costs tr(W_u' A_uu^-1 W_u); with L L' = A_uu, v = L^-1 A_u. and z = L^-1 W_u it turns A into
    A - v'v and W into W - v'z (Hassibi & Stork 1993, on blocks). Every loss needs no more than
    A_jj and W_j W_j', which are kept current; the row A_u. is brought up to date when u goes, from
    all v so far, as a Cholesky factorisation does that goes by columns.
    """

    def __init__(self, inverse: torch.Tensor, weight: torch.Tensor, blocks: npt.NDArray[np.int64]) -> None:
        """Start with every block.

        Args:
            inverse: of the Gram matrix, float64 (features, features).
            weight: float64 (features, outputs).
            blocks: features of each block, (blocks, features of a block); -1 for a missing one.
        """
        self.removed: list[int] = []
        self._size = blocks.shape[1]
        self._inverse, self._weight = _in_order(inverse, weight, blocks.ravel())
        if self._weight.shape[1] > len(self._weight):
            # Only W W' counts, and a square W has the same.
            self._weight = torch.linalg.qr(self._weight.T, mode="r").R.T.contiguous()
        by_block = self._weight.reshape(*blocks.shape, -1)
        self._energy = by_block @ by_block.mT
        self._pivots = self._inverse.reshape(*blocks.shape, *blocks.shape).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        self._pivots = self._pivots.contiguous()
        self._v, self._z = (matrix.new_empty(matrix.shape) for matrix in (self._inverse, self._weight))

    def losses(self) -> npt.NDArray[np.float64]:
        """What the loss of each block costs; infinite where it is lost already."""
        # A division where blocks have one feature; LAPACK would be called for each.
        one = self._size == 1
        solved = self._energy / self._pivots if one else torch.cholesky_solve(self._energy, cholesky(self._pivots))
        losses: npt.NDArray[np.float64] = solved.diagonal(dim1=1, dim2=2).sum(dim=1).numpy()
        losses[self.removed] = np.inf
        return losses

    def remove(self, block: int) -> None:
        """Take a block out and refit the others."""
        size, done = self._size, len(self.removed) * self._size
        own, v, z = slice(block * size, (block + 1) * size), self._v[:done], self._z[:done]
        factor = cholesky(self._pivots[block])
        current = self._weight[own] - v[:, own].T @ z
        scaled = torch.linalg.solve_triangular(factor, current, upper=False)
        # The row of A, and z times the transpose of W, both brought up to date by one pass over all v.
        passes = torch.cat([v[:, own].T, scaled @ z.T]) @ v
        row = torch.linalg.solve_triangular(factor, self._inverse[own] - passes[:size], upper=False)
        product = scaled @ self._weight.T - passes[size:]
        self._v[done : done + size], self._z[done : done + size] = row, scaled
        by_block = row.reshape(size, -1, size).permute(1, 2, 0).contiguous()
        half = by_block @ (product.reshape(size, -1, size).transpose(0, 1) - 0.5 * (scaled @ scaled.T) @ by_block.mT)
        self._pivots -= by_block @ by_block.mT
        self._energy -= half + half.mT
        self._pivots[block] = torch.eye(size)
        self.removed.append(block)


def _in_order(inverse: torch.Tensor, weight: torch.Tensor, order: npt.NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
    """Both in this order of features, without the others; a missing one is independent and has no weight."""
    if np.array_equal(order, np.arange(len(inverse))):
        return inverse, weight
    index, missing = torch.from_numpy(order), torch.from_numpy(order < 0)
    inverse, weight = inverse[index][:, index], weight[index]
    inverse[missing], weight[missing] = 0.0, 0.0
    inverse[:, missing] = 0.0
    inverse.diagonal()[missing] = 1.0
    return inverse, weight
