"""Sources that give items, samples or batches, from a first to a last: what every kind of them shares."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ndonnx.data.inputs import samples_first, single_value
from ndonnx.data.preprocess import prepare_array
from ndonnx.data.registry import Opening
from ndonnx.data.source import DataSource, first_line
from ndonnx.data.specs import Batch, check_labels
from ndonnx.errors import DataError


class ItemSource(DataSource):
    """Items `{input: array}` or `({input: array}, label)`, passed through from the first to the last.

    An item whose arrays have one axis less than the model's inputs is a single sample; otherwise
    it is a batch, and its label an array.
    """

    def __init__(self, opening: Opening) -> None:
        """Look at the first item.

        Raises:
            DataError: there is none, or it does not fit the model.
        """
        super().__init__(opening.spec, opening.inputs, opening.recipe)
        self._find_fixed()
        first = next(self._items(), None)
        if first is None:
            raise DataError(f"{self.spec}: gives no samples; expected at least one")
        self.has_labels = first.labels is not None

    @abstractmethod
    def _raw_items(self) -> Iterator[Any]:
        """The items as the user gives them, from the first on.

        Raises:
            DataError: what gives them raised an error.
        """

    def _find_fixed(self) -> None:
        """Set apart the inputs of which the first item holds one value for all samples."""
        raw = next(self._raw_items(), None)
        if raw is None:
            return
        where = f"{self.spec}: item 0"
        found = self._named(self._split(raw, where)[0], where)
        whole = [e for e in self.inputs if e.shape and not e.sampled and found[e.name].shape == e.native]
        sampled = [e for e in self.inputs if e.shape and e not in whole]
        single = all(found[e.name].ndim < len(e.shape) for e in sampled)
        counts = {found[e.name].shape[e.axis] for e in sampled if found[e.name].ndim > e.axis}
        alone = [e for e in whole if sampled and (single or e.native[e.axis] not in counts)]
        alone += [e for e in self.inputs if not e.shape]
        self.fixed = {e.name: single_value(e, found[e.name], f"{where}: '{e.name}'") for e in alone}
        self.inputs = tuple(entry for entry in self.inputs if entry.name not in self.fixed)
        if not self.inputs:
            raise DataError(f"{self.spec}: gives one value for all samples and nothing else, so that there are none")

    def batches(self, batch_size: int, *, samples: int | None = None) -> Iterator[Batch]:
        return _regroup(self._limited(samples), batch_size)

    def take(self, rows: NDArray[np.int64], batch_size: int) -> Iterator[Batch]:
        ends = np.flatnonzero(np.diff(rows) <= 0) + 1
        runs = [run for run in np.split(rows, ends) if len(run)]
        return _regroup(chain.from_iterable(map(self._passed, runs)), batch_size)

    def _limited(self, samples: int | None) -> Iterator[Batch]:
        left = samples
        if left == 0:
            return
        for item in self._alike():
            yield item if left is None else _cut(item, 0, left)
            if left is not None and (left := left - len(item)) <= 0:
                return

    def _passed(self, rows: NDArray[np.int64]) -> Iterator[Batch]:
        """The samples with these ascending numbers, out of one pass."""
        start = 0
        for item in self._alike():
            first, last = np.searchsorted(rows, (start, start + len(item)))
            if last > first:
                yield _picked(item, rows[first:last] - start)
            start += len(item)
            if last == len(rows):
                return
        raise DataError(
            f"{self.spec}: ended after {start} samples, and gave more on an earlier pass; "
            "the function must give the same samples in the same order on every call"
        )

    def _alike(self) -> Iterator[Batch]:
        """Every item, labelled as the first one is or not."""
        for item in self._items():
            if (item.labels is not None) != self.has_labels:
                raise DataError(f"{self.spec}: some items have a label and some have none; expected one or the other")
            yield item

    def _items(self) -> Iterator[Batch]:
        """Every item as a batch, checked and prepared."""
        start = 0
        for number, raw in enumerate(self._raw_items()):
            batch = self._read(raw, f"{self.spec}: item {number}", start)
            start += len(batch)
            if len(batch):
                yield batch

    def _split(self, raw: object, where: str) -> tuple[Mapping[str, ArrayLike], ArrayLike | None]:
        """The arrays of an item by input, and its labels."""
        if isinstance(raw, Mapping):
            return raw, None
        if isinstance(raw, tuple) and len(raw) == 2 and isinstance(raw[0], Mapping):
            return raw[0], raw[1]
        raise DataError(f"{where}: expected {{input: array}} or ({{input: array}}, label), found {type(raw).__name__}")

    def _named(self, arrays: Mapping[str, ArrayLike], where: str) -> dict[str, NDArray[np.generic]]:
        names = [*self.fixed, *(entry.name for entry in self.inputs)]
        if missing := [name for name in names if name not in arrays]:
            raise DataError(f"{where}: expected the inputs {names}, found {list(arrays)}; missing {missing}")
        return {name: _array(arrays[name], f"{where}: '{name}'") for name in names}

    def _read(self, raw: object, where: str, start: int) -> Batch:
        arrays, label = self._split(raw, where)
        found = self._named(arrays, where)
        for name, value in self.fixed.items():
            if not np.array_equal(found.pop(name), value):
                raise DataError(f"{where}: '{name}' has one value for all samples, and another one here than in item 0")
        single = all(found[entry.name].ndim == len(entry.shape) - 1 for entry in self.inputs)
        if single:
            found = {name: array[None] for name, array in found.items()}
        else:
            found = {entry.name: samples_first(found[entry.name], entry) for entry in self.inputs}
        counts = {name: len(array) if array.ndim else 0 for name, array in found.items()}
        if len(set(counts.values())) != 1:
            raise DataError(f"{where}: expected as many samples in each array, found {counts}")
        count = next(iter(counts.values()))
        rows = np.arange(start, start + count)
        inputs = {
            entry.name: prepare_array(found[entry.name], entry, self.recipe, f"{where}: '{entry.name}'", rows)
            for entry in self.inputs
        }
        if label is None or count == 0:
            return Batch(inputs, None)
        labels = _array(label, f"{where}: label")
        return Batch(inputs, check_labels(labels.reshape(-1) if single else labels, count, f"{where}: label"))


def _array(value: ArrayLike, where: str) -> NDArray[np.generic]:
    try:
        array: NDArray[np.generic] = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{where}: cannot be read as an array: {first_line(error)}") from error
    return array


def _cut(batch: Batch, start: int, stop: int) -> Batch:
    return _picked(batch, slice(start, stop))


def _picked(batch: Batch, rows: slice | NDArray[np.int64]) -> Batch:
    inputs = {name: array[rows] for name, array in batch.inputs.items()}
    return Batch(inputs, None if batch.labels is None else batch.labels[rows])


def _join(parts: list[Batch]) -> Batch:
    inputs = {name: np.concatenate([part.inputs[name] for part in parts]) for name in parts[0].inputs}
    labels = [part.labels for part in parts if part.labels is not None]
    return Batch(inputs, np.concatenate(labels) if labels else None)


def _regroup(items: Iterator[Batch], batch_size: int) -> Iterator[Batch]:
    """The same samples in batches of `batch_size`; samples of another shape begin a new batch."""
    held: list[Batch] = []
    for item in items:
        if held and not _same_shape(held[0], item):
            yield _join(held)
            held = []
        for start in range(0, len(item), batch_size):
            held.append(_cut(item, start, start + batch_size))
            if sum(map(len, held)) >= batch_size:
                joined = _join(held)
                yield _cut(joined, 0, batch_size)
                held = [_cut(joined, batch_size, len(joined))] if len(joined) > batch_size else []
    if held:
        yield _join(held)


def _same_shape(one: Batch, other: Batch) -> bool:
    return all(array.shape[1:] == other.inputs[name].shape[1:] for name, array in one.inputs.items())
