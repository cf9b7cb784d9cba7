"""What is found about the channels of a slice: groups, and the places in weights and nodes that go with their units."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ndonnx.partition.channels.rules import Role


@dataclass(frozen=True, eq=False)
class WeightAxis:
    """One axis of an initializer whose positions are channels of a group."""

    initializer: str
    axis: int
    role: Role
    units: npt.NDArray[np.int64]
    """Unit of each position, -1 where the position stays. Of two axes, it has a row for each block of the weight's
    first axis: a grouped convolution whose groups lose other positions, but equally many."""

    def cut(self, array: npt.NDArray[np.generic], kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.generic]:
        """An array of the weight's shape without the positions of the units that are not kept."""
        stay = stays(self.units, kept)
        if stay.ndim == 1:
            return np.compress(stay, array, axis=self.axis)
        blocks = zip(np.split(array, len(stay)), stay, strict=True)
        return np.concatenate([np.compress(row, block, axis=self.axis) for block, row in blocks])

    def by_unit(self, array: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.float64]:
        """Sums of an array of the weight's shape over all that belongs to each of `count` units."""
        sums = np.zeros(count + 1)
        rows = self.units.reshape(-1, self.units.shape[-1])
        for units, block in zip(rows, np.split(array, len(rows)), strict=True):
            np.add.at(sums, units, np.moveaxis(block, self.axis, 0).reshape(len(units), -1).sum(axis=1))
        return sums[:count]  # what belongs to none was added to the last

    def zeroed(self, array: npt.NDArray[np.generic], kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.generic]:
        """An array of the weight's shape with zeros at the positions of the units that are not kept."""
        stay = stays(self.units, kept)
        blocks = np.split(np.array(array), len(stay) if stay.ndim > 1 else 1)
        for block, row in zip(blocks, stay if stay.ndim > 1 else [stay], strict=True):
            np.moveaxis(block, self.axis, 0)[~row] = 0
        return np.concatenate(blocks)


@dataclass(frozen=True, eq=False)
class ChannelStatistic:
    """An operator that takes a statistic over channels, and so answers otherwise when some of them go."""

    node: str
    """Name of the node's first output."""
    axis: int
    """Axis of the node's first input along which they stand, counted from its end (negative)."""
    units: npt.NDArray[np.int64]
    """Unit of each position, -1 where the position stays."""
    carries: bool
    """Whether the output has the channels on the same axis (a norm), or they end here (a mean)."""
    stretched: bool = False
    """Whether every position stands for a stretch of the axis, equally long for all."""


def stays(units: npt.NDArray[np.int64], kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which positions stay: those of kept units and those of no unit."""
    found: npt.NDArray[np.bool_] = (units < 0) | np.append(kept, True)[units]
    return found


@dataclass(frozen=True, eq=False)
class DimensionEdit:
    """A number that a node holds and that follows from how many units are kept."""

    node: str
    """Name of the node's first output."""
    slot: str | int
    """Name of an attribute, or position of an input."""
    position: int | None
    """Index of the number in a list; None for a single number."""
    units: npt.NDArray[np.int64]
    """The new number is how many of these stay (-1 stays always)."""


@dataclass(frozen=True)
class Copy:
    """A vector that a node of the slice has for itself, as its channels are not those of the vector's other readers."""

    initializer: str
    """The teacher's."""
    node: str
    """Name of the reader's first output."""
    name: str
    """Name of the copy; `WeightAxis.initializer` has it."""


@dataclass(frozen=True)
class ChannelGroup:
    """Units `start ... stop - 1`, interchangeable, of which a part is kept."""

    name: str
    """Value that the channels are made in."""
    start: int
    stop: int

    @property
    def width(self) -> int:
        """Number of units."""
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class ChannelGroups:
    """All that can be shrunk in one slice."""

    groups: tuple[ChannelGroup, ...]
    axes: tuple[WeightAxis, ...]
    edits: tuple[DimensionEdit, ...]
    statistics: tuple[ChannelStatistic, ...] = ()
    copies: tuple[Copy, ...] = ()
    """Vectors that the slice is to hold several times."""
    multiplied: frozenset[int] = frozenset()
    """Units that a product of two activations sums over (queries and keys), whatever a weight sums over besides."""

    @property
    def units(self) -> int:
        """Number of units over all groups."""
        return self.groups[-1].stop if self.groups else 0

    def weights(self) -> set[str]:
        """Names of the initializers that have an axis in a group."""
        return {axis.initializer for axis in self.axes}


UNREAD = "unread"
"""The cause of a width that stays since nothing sums over it."""


@dataclass(frozen=True)
class FrozenWidth:
    """Channels of a slice all of which have to stay."""

    value: str
    """Name of the value that they are made in."""
    width: int
    operator: str
    """Type of the operator that does not let them be followed; `end` where they reach an end of the slice, `unread`
    where no weight sums over them."""
    node: str
    """Name of that operator (of its first output, where it has none); empty where there is none to blame."""
