"""Captured activations as training batches: rows of a store in, tensors out."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ndonnx.distill.padding import Lengths, cut, shortest
from ndonnx.errors import TrainingError
from ndonnx.teacher import ActivationStore
from ndonnx.teacher.stored_rows import StoredRows

_BUCKETS = 3
"""Groups of samples of about one length, where padding is cut off."""
_GROUPED = 8
"""Batches whose samples are put in order of their lengths together, so that each has samples of about one length."""


@dataclass(frozen=True)
class Blocks:
    """Rows of the store: the first `holdout` choose the best state, the others train."""

    samples: int
    holdout: int

    @classmethod
    def split(cls, samples: int, part: float) -> Blocks:
        """Set at least one sample aside, and leave at least one to train on."""
        return cls(samples, min(max(1, round(part * samples)), samples - 1))


@dataclass(frozen=True)
class Rows:
    """Some rows of all values, as arrays; floats as float32."""

    arrays: Mapping[str, np.ndarray]
    constant: frozenset[str]
    """Names of values without a sample axis: one array for all samples."""


@dataclass(frozen=True)
class Source:
    """Where a value of the training is read: a store and the value's name in it."""

    store: ActivationStore
    name: str


class SliceSamples:
    """Inputs of a module and the values that its answers are compared with, read in batches."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        inputs: Sequence[str],
        holdout: float,
        arrays: Mapping[str, npt.NDArray[np.generic]] | None = None,
    ) -> None:
        """Open the values.

        Args:
            sources: where each value is stored, by the name it goes by here.
            inputs: those that the module reads, in its order.
            holdout: part of the samples set aside.
            arrays: further values that are not in a store (labels), with as many rows.

        Raises:
            TrainingError: a value cannot be trained on.
        """
        for name, source in sources.items():
            _check(source, is_context=name in inputs[1:], is_entry=name == inputs[0])
        stores = [source.store for source in sources.values()]
        self._constant = {name for name, source in sources.items() if source.store.is_constant(source.name)}
        self.inputs = tuple(inputs)
        self._values: dict[str, StoredRows | npt.NDArray[np.generic]] = {
            name: np.array(source.store.array(source.name))
            if name in self._constant
            else source.store.rows(source.name)
            for name, source in sources.items()
        }
        self._values.update(arrays or {})
        self.blocks = Blocks.split(min(store.samples for store in stores), holdout)
        self._lengths: Lengths | None = None
        self._full = 0

    @classmethod
    def of(cls, store: ActivationStore, inputs: Sequence[str], values: Sequence[str], holdout: float) -> SliceSamples:
        """All from one store."""
        return cls({name: Source(store, name) for name in (*inputs, *values)}, inputs, holdout)

    def without_padding(self, lengths: Lengths, full: int) -> SliceSamples:
        """The same samples, which come in batches of about one length, without the positions behind it.

        Args:
            lengths: filled positions of each sample, (samples,).
            full: number of positions of a whole sample: every axis as long as that, but the first, is one of positions.
        """
        found = copy.copy(self)
        found._lengths, found._full = lengths, full
        return found

    def tried(self, lengths: Lengths, full: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], Lengths]:
        """A few samples, whole and without their padding, and their lengths: for trying whether that says nothing."""
        rows = shortest(lengths[: self.blocks.samples], full)
        whole = {name: _float32(self._rows(name, rows)) for name in self._values}
        most = int(lengths[rows].max(initial=0))
        return whole, {name: cut(array, full, most) for name, array in whole.items()}, lengths[rows]

    @property
    def names(self) -> tuple[str, ...]:
        """All values."""
        return tuple(self._values)

    def arrays(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows of all values, floats as float32."""
        return {name: _float32(self._rows(name, slice(start, stop))) for name in self._values}

    def training_rows(self, count: int) -> dict[str, np.ndarray]:
        """The first `count` training rows (fewer if there are fewer), floats as float32."""
        start = self.blocks.holdout
        return self.arrays(start, min(self.blocks.samples, start + count))

    def is_constant(self, name: str) -> bool:
        """Whether one array serves all samples."""
        return name in self._constant

    def shapes(self, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """The shapes that values have for one sample."""
        whole = {name: self._values[name].shape for name in names}
        return {name: shape if self.is_constant(name) else (1, *shape[1:]) for name, shape in whole.items()}

    def heldout(self, count: int) -> list[Rows]:
        """The first `count` rows; a list, since not all need have the same shape where there are several places."""
        if self._lengths is None:
            return [Rows(self.arrays(0, count), frozenset(self._constant))]
        return self._buckets(0, count, self.blocks.holdout)

    def shaping(self, count: int) -> list[Rows]:
        """The first `count` training rows, by which a candidate is shaped; a list as with `heldout`."""
        if self._lengths is None:
            return [Rows(self.training_rows(count), frozenset(self._constant))]
        return self._buckets(self.blocks.holdout, count, self.blocks.samples)

    def order(self, rng: np.random.Generator, size: int) -> npt.NDArray[np.int64]:
        """The training rows of one epoch, of which each `size` in turn are a batch."""
        rows = self.blocks.holdout + rng.permutation(self.blocks.samples - self.blocks.holdout)
        if self._lengths is None:
            return rows
        batches: list[npt.NDArray[np.int64]] = []
        for start in range(0, len(rows), _GROUPED * size):
            some = rows[start : start + _GROUPED * size]
            some = some[np.argsort(self._lengths[some], kind="stable")]
            batches += [some[place : place + size] for place in range(0, len(some), size)]
        whole = [batch for batch in batches if len(batch) == size]
        rest = [batch for batch in batches if len(batch) < size]
        return np.concatenate([*(whole[place] for place in rng.permutation(len(whole))), *rest])

    def split(self, rows: np.ndarray, parts: int) -> list[np.ndarray]:
        """The rows in so many parts (fewer of few rows), each of which can be a batch."""
        if self._lengths is not None:
            rows = rows[np.argsort(self._lengths[rows], kind="stable")]
        return [part for part in np.array_split(rows, parts) if len(part)]

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        """All values of these rows, in the types in which they are stored."""
        arrays = self._cut({name: self._rows(name, rows) for name in self._values}, rows)
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}

    def form(self) -> Hashable:
        """Equal where rows of two places can stand in one batch: shapes, types, and the constants themselves."""
        constants = {name: np.asarray(self._rows(name, slice(0))).tobytes() for name in self._constant}
        return tuple(
            (name, values.dtype.kind, constants.get(name, values.shape[1:])) for name, values in self._values.items()
        )

    def bytes_per_sample(self) -> int:
        """Bytes of one sample of all values as float32."""
        return sum(int(np.prod(values.shape[1:])) * 4 for values in self._values.values())

    def _buckets(self, first: int, count: int, last: int) -> list[Rows]:
        """Rows from `first` on, with the filled positions of `count` whole ones; those of about one length together.

        The longest come first.
        """
        assert self._lengths is not None
        lengths = self._lengths[first:last]
        count = min(last - first, int(count * self._full / max(1.0, float(lengths.mean()))))
        rows = first + np.argsort(-lengths[:count], kind="stable")
        groups = [np.sort(group) for group in np.array_split(rows, _BUCKETS) if len(group)]
        found = [self._cut({n: _float32(self._rows(n, group)) for n in self._values}, group) for group in groups]
        return [Rows(arrays, frozenset(self._constant)) for arrays in found]

    def _cut(self, arrays: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
        """Values of these rows without the positions that none of them fills."""
        if self._lengths is None:
            return arrays
        most = int(self._lengths[rows].max(initial=1))
        return {name: cut(array, self._full, most) for name, array in arrays.items()}

    def _rows(self, name: str, rows: slice | np.ndarray) -> np.ndarray:
        values = self._values[name]
        return np.asarray(values) if isinstance(values, np.ndarray) and self.is_constant(name) else values[rows]


class SharedSamples:
    """The activations of several places in which one student stands, as one set of samples.

    A row is a sample at one of the places. All rows of a sample are neighbours, so that what is set aside is set aside
    at every place. Places whose values have the same shapes go into one batch.
    """

    def __init__(self, places: Sequence[SliceSamples]) -> None:
        """Take the places' samples together: the same samples, and the same names of values, at each."""
        self._places = list(places)
        self.inputs = places[0].inputs
        count = len(self._places)
        samples, holdout = (min(getattr(p.blocks, name) for p in places) for name in ("samples", "holdout"))
        self.blocks = Blocks(samples * count, holdout * count)
        self._alike: dict[object, list[int]] = {}
        for number, place in enumerate(self._places):
            self._alike.setdefault(place.form(), []).append(number)

    def is_constant(self, name: str) -> bool:
        """Whether one array serves all samples, at every place."""
        return all(place.is_constant(name) for place in self._places)

    def bytes_per_sample(self) -> int:
        """Most bytes of one row of all values as float32."""
        return max(place.bytes_per_sample() for place in self._places)

    def shapes(self, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """The shapes that values have for one sample at the first place."""
        return self._places[0].shapes(names)

    def heldout(self, count: int) -> list[Rows]:
        """About the first `count` rows, those of alike places together."""
        each = max(1, count // len(self._places))
        return [self._together(numbers, 0, each) for numbers in self._alike.values()]

    def shaping(self, count: int) -> list[Rows]:
        """About the first `count` training rows, those of alike places together, the largest first."""
        first = self.blocks.holdout // len(self._places)
        last = min(self.blocks.samples // len(self._places), first + max(1, count // len(self._places)))
        largest = sorted(self._alike.values(), key=lambda numbers: -self._places[numbers[0]].bytes_per_sample())
        return [self._together(numbers, first, last) for numbers in largest]

    def order(self, rng: np.random.Generator, size: int) -> npt.NDArray[np.int64]:
        """The training rows of one epoch, of which each `size` in turn are a batch."""
        del size
        return self.blocks.holdout + rng.permutation(self.blocks.samples - self.blocks.holdout)

    def split(self, rows: np.ndarray, parts: int) -> list[np.ndarray]:
        """The rows in parts of alike places, each of which can be a batch."""
        place = rows % len(self._places)
        return [
            part
            for numbers in self._alike.values()
            for part in np.array_split(rows[np.isin(place, numbers)], parts)
            if len(part)
        ]

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        """All values of these rows, of alike places, in the types in which they are stored."""
        place, sample = rows % len(self._places), rows // len(self._places)
        found = [(self._places[n], self._places[n].batch(sample[place == n])) for n in np.unique(place).tolist()]
        first, values = found[0]
        return {
            name: values[name] if first.is_constant(name) else torch.cat([batch[name] for _, batch in found])
            for name in values
        }

    def _together(self, numbers: Sequence[int], start: int, stop: int) -> Rows:
        """Rows of these samples at alike places, those of a sample next to each other."""
        found = [self._places[number].arrays(start, stop) for number in numbers]
        first = self._places[numbers[0]]
        constant = frozenset(name for name in first.names if first.is_constant(name))
        arrays = {
            name: found[0][name]
            if name in constant
            else np.stack([arrays[name] for arrays in found], axis=1).reshape(-1, *found[0][name].shape[1:])
            for name in first.names
        }
        return Rows(arrays, constant)


Samples = SliceSamples | SharedSamples


def _check(source: Source, *, is_context: bool, is_entry: bool) -> None:
    name, store = source.name, source.store
    if name in store.unstorable:
        raise TrainingError(f"value '{name}' cannot be captured: {store.unstorable[name]}")
    if is_entry and store.is_constant(name):
        raise TrainingError(f"value '{name}' cannot be captured: the samples do not lie along its first axis")
    # An attention mask may well hold -Inf; should NaN come of it, the gate refuses the slice's answer.
    if name in store.nonfinite and not is_context:
        raise TrainingError(f"the teacher's activation '{name}' holds NaN or Inf on this data")


def _float32(array: np.ndarray) -> np.ndarray:
    return np.array(array, dtype=np.float32) if array.dtype.kind == "f" else np.array(array)
