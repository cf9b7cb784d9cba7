"""Which channels matter: the error that a channel's removal causes at its reader, on captured data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
_ONE_BY_ONE = 128
"""Units up to which each loss is weighed against all others. Of wider groups so many of the cheapest go together, each
the cheapest of twice as many: what goes at once is this part of the group."""
_RIDGE = 1e-4
"""Ridge, relative to the mean energy of a feature."""


@dataclass(frozen=True)
class ReaderStatistics:
    """What the linear operators that read channel groups get, on a slice's samples; by the name of their output."""

    energies: Mapping[str, npt.NDArray[np.float64]]
    """Mean square of each feature of a reader, (features,)."""
    problems: Mapping[str, Regression]
    """All moments of its features, where they are not too many."""


def measure_readers(teacher: TeacherSlice) -> ReaderStatistics:
    """Run the slice once and take the statistics of what each reader of a channel group gets.

    Raises:
        ShrinkError: onnxruntime does not run the slice, or the activations are too large to be squared.
    """
    readers = linear_readers(teacher.model, teacher.groups)
    narrow = {r.output: Regression(r.node, teacher.count) for r in readers if r.features <= _SURGERY_LIMIT}
    wide = {r.output: FeatureEnergies(r.node, teacher.count) for r in readers if r.features > _SURGERY_LIMIT}
    wanted = list(dict.fromkeys(reader.data for reader in readers))
    if wanted:
        for samples, (values,) in teacher.batches((teacher.model, wanted)):
            for reader in readers:
                (narrow.get(reader.output) or wide[reader.output]).add(samples, values[reader.data])
    energies = {name: problem.energies() for name, problem in wide.items()}
    energies |= {name: _second(problem.moments()).diagonal().numpy() for name, problem in narrow.items()}
    return ReaderStatistics(energies, narrow)


def rank_units(
    teacher: TeacherSlice, keep: Callable[[ChannelGroup], int], measured: ReaderStatistics | None = None
) -> dict[ChannelGroup, Order]:
    """Order the units of every group by what the exit would lose.

    A group that one linear operator reads is thinned out unit by unit, each time the one whose
    loss the others can best make up for (optimal brain surgery on blocks of features; Hassibi &
    Stork 1993). Otherwise a unit counts by the energy that it brings to its readers.

    Args:
        teacher: the slice with its groups and samples.
        keep: how many units of a group stay.
        measured: what the readers get. None: measured here.

    Raises:
        ShrinkError: as `measure_readers`.
    """
    readers = linear_readers(teacher.model, teacher.groups)
    measured = measured or measure_readers(teacher)
    orders: dict[ChannelGroup, Order] = {}
    for group in teacher.groups.groups:
        own = [reader for reader in readers if _reads(reader, group)]
        if len(own) == 1 and own[0].output in measured.problems and (own[0].units >= 0).all():
            moments = measured.problems[own[0].output].moments()
            orders[group] = _by_surgery(own[0], moments, group, keep(group))
        else:
            energies = {reader: measured.energies[reader.output] for reader in own}
            orders[group] = _by_energy(teacher, energies, group)
    return orders


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
    at_once = max(1, group.width // _ONE_BY_ONE)
    with one_thread():
        while (left := group.width - keep - len(surgery.removed)) > 0:
            surgery.remove(min(at_once, left))
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

    def remove(self, count: int) -> None:
        """Take out the cheapest blocks and refit the others; of several, each is the cheapest after those before it."""
        losses = self.losses()
        if count == 1:
            self._remove([int(losses.argmin())])
            return
        candidates = np.argsort(losses, kind="stable")[: 2 * count]
        self._remove(self._cheapest(candidates[np.isfinite(losses[candidates])].tolist(), count))

    def _cheapest(self, blocks: list[int], count: int) -> list[int]:
        """So many of these blocks, one after another, as if there were no others."""
        inside = self._places(blocks)
        v, z = self._so_far()
        inverse = self._inverse[inside][:, inside] - v[:, inside].T @ v[:, inside]
        small = np.arange(len(inside)).reshape(len(blocks), self._size)
        alone = _Surgery(inverse, self._weight[inside] - v[:, inside].T @ z, small)
        for _ in range(count):
            alone.remove(1)
        return [blocks[number] for number in alone.removed]

    def _remove(self, blocks: list[int]) -> None:
        own, size = self._places(blocks), self._size
        v, z = self._so_far()
        done = len(v)
        part = v[:, own]
        factor = self._pivots[blocks[0]] if len(blocks) == 1 else self._inverse[own][:, own] - part.T @ part
        factor = cholesky(factor)
        current = self._weight[own] - part.T @ z
        scaled = torch.linalg.solve_triangular(factor, current, upper=False)
        # The rows of A, and z times the transpose of W, both brought up to date by one pass over all v.
        passes = torch.cat([part.T, scaled @ z.T]) @ v
        row = torch.linalg.solve_triangular(factor, self._inverse[own] - passes[: len(own)], upper=False)
        product = scaled @ self._weight.T - passes[len(own) :]
        self._v[done : done + len(own)], self._z[done : done + len(own)] = row, scaled
        half = self._by_block(row, product - 0.5 * (scaled @ scaled.T) @ row)
        self._pivots -= self._by_block(row, row)
        self._energy -= half + half.mT
        self._pivots[blocks] = torch.eye(size, dtype=self._pivots.dtype)
        self.removed.extend(blocks)

    def _by_block(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Products of the columns of each block with each other: (blocks, size, size)."""
        if self._size == 1:  # a sum is faster than so many products of vectors
            return (left * right).sum(dim=0)[:, None, None]

        def by_block(rows: torch.Tensor) -> torch.Tensor:
            return rows.reshape(len(rows), -1, self._size).permute(1, 2, 0)

        return by_block(left) @ by_block(right).mT

    def _places(self, blocks: list[int]) -> torch.Tensor:
        """The features of these blocks."""
        return torch.cat([torch.arange(block * self._size, (block + 1) * self._size) for block in blocks])

    def _so_far(self) -> tuple[torch.Tensor, torch.Tensor]:
        """v and z of all blocks that went."""
        done = len(self.removed) * self._size
        return self._v[:done], self._z[:done]


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
