"""Sources made of other sources: some samples of one by their numbers, and one behind another."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ndonnx.data.source import DataSource, RowSource
from ndonnx.data.specs import Batch


class Subset(DataSource):
    """The samples `rows` of a source, in this order."""

    length: int

    def __init__(self, source: DataSource, rows: NDArray[np.int64]) -> None:
        """Take int64 (n,) numbers of samples; a number may come twice where the source gives samples by number."""
        super().__init__(source.spec, source.inputs, source.recipe, source.fixed)
        self._source = source
        self._rows = rows
        self.length = len(rows)
        self.has_labels = source.has_labels

    def batches(self, batch_size: int, *, samples: int | None = None) -> Iterator[Batch]:
        return self._source.take(self._rows[:samples], batch_size)

    def take(self, rows: NDArray[np.int64], batch_size: int) -> Iterator[Batch]:
        return self._source.take(self._rows[rows], batch_size)

    def row_number(self, place: int) -> int:
        return self._source.row_number(int(self._rows[place]))

    def _content(self) -> Iterator[bytes]:
        yield self._source.fingerprint().encode()
        yield self._rows.astype("<i8").tobytes()


class Remembered(Subset):
    """A subset whose batches stay in memory once they were all asked for, where a number of bytes holds them."""

    def __init__(self, source: Subset, most: int) -> None:
        """Take a subset, and the most bytes of inputs that are kept."""
        super().__init__(source, np.arange(source.length))
        self._most = most
        self._kept: dict[tuple[int, int | None], list[Batch]] = {}

    def batches(self, batch_size: int, *, samples: int | None = None) -> Iterator[Batch]:
        key = batch_size, samples
        if key in self._kept:
            yield from self._kept[key]
            return
        kept: list[Batch] | None = []
        room = self._most
        for batch in super().batches(batch_size, samples=samples):
            room -= sum(array.nbytes for array in batch.inputs.values())
            kept = kept if kept is not None and room >= 0 else None
            if kept is not None:
                kept.append(batch)
            yield batch
        if kept is not None:
            self._kept = {key: kept}


class Joined(DataSource):
    """The samples of one source, and behind them those of another one for the same model."""

    length: int

    def __init__(self, first: RowSource | Subset, second: RowSource | Subset) -> None:
        super().__init__(first.spec, first.inputs, first.recipe, first.fixed)
        self._first, self._second = first, second
        self.length = first.length + second.length
        self.has_labels = first.has_labels and second.has_labels

    def batches(self, batch_size: int, *, samples: int | None = None) -> Iterator[Batch]:
        return self.take(np.arange(self.length)[:samples], batch_size)

    def take(self, rows: NDArray[np.int64], batch_size: int) -> Iterator[Batch]:
        for start in range(0, len(rows), batch_size):
            yield self._fetch(rows[start : start + batch_size])

    def _fetch(self, rows: NDArray[np.int64]) -> Batch:
        behind = rows >= self._first.length
        parts = [
            *self._first.take(rows[~behind], len(rows)),
            *self._second.take(rows[behind] - self._first.length, len(rows)),
        ]
        places = np.argsort(np.argsort(behind, kind="stable"))
        inputs = {name: np.concatenate([part.inputs[name] for part in parts])[places] for name in parts[0].inputs}
        labels = [part.labels for part in parts if part.labels is not None]
        return Batch(inputs, np.concatenate(labels)[places] if self.has_labels else None)

    def _content(self) -> Iterator[bytes]:
        yield self._first.fingerprint().encode()
        yield self._second.fingerprint().encode()
