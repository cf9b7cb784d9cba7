"""Which channels matter: the error that a channel's removal causes at its reader, on captured data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ndonnx.partition import ChannelGroup
from ndonnx.students.base import TeacherSlice
from ndonnx.students.features import LinearReader, Moments, linear_readers, moments

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
    needed = list(dict.fromkeys(reader.data for reader in readers))
    values = teacher.run(teacher.model, needed) if needed else {}
    orders: dict[ChannelGroup, Order] = {}
    for group in teacher.groups.groups:
        own = [reader for reader in readers if _reads(reader, group)]
        stats = [moments(reader, values[reader.data]) for reader in own]
        if len(own) == 1 and stats[0].covariance.shape[0] <= _SURGERY_LIMIT and (own[0].units >= 0).all():
            orders[group] = _by_surgery(own[0], stats[0], group, keep(group))
        else:
            orders[group] = _by_energy(teacher, own, stats, group)
    return orders


def _reads(reader: LinearReader, group: ChannelGroup) -> bool:
    return bool(((reader.units >= group.start) & (reader.units < group.stop)).any())


def _by_energy(teacher: TeacherSlice, readers: list[LinearReader], stats: list[Moments], group: ChannelGroup) -> Order:
    score = np.zeros(group.width)
    for reader, stat in zip(readers, stats, strict=True):
        energy = np.diag(stat.second()) * (reader.weight_matrix().astype(np.float64) ** 2).sum(axis=1)
        by_channel = energy.reshape(len(reader.units), -1).sum(axis=1)
        inside = (reader.units >= group.start) & (reader.units < group.stop)
        np.add.at(score, reader.units[inside] - group.start, by_channel[inside])
    if not readers:
        score = _weight_norms(teacher, group)
    return np.argsort(-score, kind="stable").astype(np.int64)


def _weight_norms(teacher: TeacherSlice, group: ChannelGroup) -> npt.NDArray[np.float64]:
    """Squared norm of all weights of each unit: the last resort where no reader's input can be captured."""
    score = np.zeros(group.width)
    for axis in teacher.groups.axes:
        inside = (axis.units >= group.start) & (axis.units < group.stop)
        tensor = teacher.model.graph.initializers[axis.initializer].const_value
        assert tensor is not None
        rows = np.moveaxis(tensor.numpy(), axis.axis, 0).astype(np.float64)
        np.add.at(score, axis.units[inside] - group.start, (rows.reshape(len(rows), -1) ** 2).sum(axis=1)[inside])
    return score


def _by_surgery(reader: LinearReader, stat: Moments, group: ChannelGroup, keep: int) -> Order:
    """Remove, one after another, the unit whose loss costs least after the others are refitted."""
    gram = stat.covariance if reader.has_bias else stat.second()
    width = gram.shape[0] // len(reader.units)
    # Scaled to a mean energy of 1; features that are all dead have none, and any order will do.
    energy = float(np.trace(gram)) / len(gram)
    inverse = np.linalg.inv(gram / (energy or 1.0) + _RIDGE * np.eye(len(gram)))
    weight = reader.weight_matrix().astype(np.float64)
    features = {
        unit: np.flatnonzero(np.repeat(reader.units == group.start + unit, width)) for unit in range(group.width)
    }
    alive = list(range(group.width))
    removed: list[int] = []
    while len(alive) > keep:
        losses = [_loss(inverse, weight, features[unit]) for unit in alive]
        unit = alive.pop(int(np.argmin(losses)))
        block = features[unit]
        pivot = np.linalg.solve(inverse[np.ix_(block, block)], np.hstack([inverse[block], weight[block]]))
        update = inverse[:, block] @ pivot
        inverse -= update[:, : len(inverse)]
        weight -= update[:, len(inverse) :]
        removed.append(unit)
    return np.array(alive + removed[::-1], dtype=np.int64)


def _loss(inverse: npt.NDArray[Any], weight: npt.NDArray[Any], block: npt.NDArray[np.int64]) -> float:
    rows = weight[block]
    return float((rows * np.linalg.solve(inverse[np.ix_(block, block)], rows)).sum())
