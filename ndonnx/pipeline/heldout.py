"""Rows that no training sees: a search measures its candidates and keeps its promises on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ndonnx.data import Batch, DataSource
from ndonnx.data.chosen import ChosenSource
from ndonnx.data.source import RowSource, row_order
from ndonnx.errors import DataError

_PART = 10
"""Where no rows are left over, every tenth is set aside; more of a small source."""
_LEAST, _MOST_PART = 500, 4
"""So many rows are needed to show a drop of one percent, but no more than every fourth is taken from the training."""


@dataclass(frozen=True)
class Split:
    """Three views of the data, of which the last one shares no row with the others."""

    training: DataSource
    """For the neighbourhoods: the user's own source where enough rows are left over, so that a run without a target
    finds the same students."""
    samples: int
    """Of the training."""
    finishing: DataSource
    """For what is done to the students together, which takes more samples: all but the held-out ones."""
    heldout: DataSource
    count: int
    """Held-out samples."""

    def key(self) -> str:
        """What measurements depend on."""
        return f"{self.heldout.fingerprint()} {self.count}"


def split(
    source: DataSource, samples: int, wanted: int, seed: int, further: Callable[[int], DataSource] | None = None
) -> Split:
    """Keep rows out of the training.

    Args:
        source: all data.
        samples: as many as the neighbourhoods are trained on, drawn with the seed.
        wanted: held-out samples, at most.
        seed: of what is drawn.
        further: makes more samples up, where the data are made up themselves.

    Raises:
        DataError: there are too few rows for both.
    """
    if further is not None:
        more = further(wanted)
        return Split(source, samples, source, more, wanted if more.length is None else min(wanted, more.length))
    if isinstance(source, RowSource):
        return _of_rows(source, samples, wanted, seed)
    available = source.length
    if available is None:
        available = sum(len(batch) for batch in source.batches(64, samples=samples + wanted))
    count = min(wanted, max(available - samples, _enough(source, available, wanted)))
    samples = min(samples, available - count)
    rest = _Span(source, 0, available - count)
    return Split(source, samples, rest, _Span(source, available - count, available), count)


def _of_rows(source: RowSource, samples: int, wanted: int, seed: int) -> Split:
    rows = np.arange(source.length, dtype=np.int64)
    trained = row_order(source.length, samples, seed)
    free = np.setdiff1d(rows, trained)
    needed = _enough(source, source.length, wanted)
    rng = np.random.default_rng((seed, 1))
    if len(free) >= min(needed, _LEAST):
        kept = np.sort(rng.permutation(free)[:wanted])
        return Split(source, samples, *_chosen(source, rows, kept), len(kept))
    kept = np.sort(rng.permutation(rows)[:needed])
    rest, heldout = _chosen(source, rows, kept)
    return Split(rest, min(samples, rest.length), rest, heldout, len(kept))


def _chosen(source: RowSource, rows: NDArray[np.int64], kept: NDArray[np.int64]) -> tuple[RowSource, RowSource]:
    return ChosenSource(source, np.setdiff1d(rows, kept)), ChosenSource(source, kept)


def _enough(source: DataSource, available: int, wanted: int) -> int:
    if available < 4:
        raise DataError(f"{source.spec}: holds {available} samples; a search needs 4 at least, better some thousands")
    return min(wanted, max(2, available // _PART, min(_LEAST, available // _MOST_PART)))


class _Span(DataSource):
    """The samples from one number to another, of a source that only gives them in order."""

    def __init__(self, source: DataSource, start: int, stop: int) -> None:
        super().__init__(source.spec, source.inputs, source.recipe)
        self._source, self._start, self._stop = source, start, stop
        self.length = stop - start
        self.has_labels = source.has_labels

    def batches(self, batch_size: int, *, samples: int | None = None, seed: int | None = None) -> Iterator[Batch]:
        """In order, whatever the seed. The first and the last batch may be smaller."""
        stop = self._stop if samples is None else min(self._stop, self._start + samples)
        number = 0
        for batch in self._source.batches(batch_size, samples=stop):
            first, number = number, number + len(batch)
            if number > self._start:
                yield _rows(batch, slice(max(0, self._start - first), stop - first))

    def _content(self) -> Iterator[bytes]:
        yield self._source.fingerprint().encode()
        yield f"{self._start} {self._stop}".encode()


def _rows(batch: Batch, part: slice) -> Batch:
    inputs = {name: values[part] for name, values in batch.inputs.items()}
    return Batch(inputs, None if batch.labels is None else batch.labels[part])
