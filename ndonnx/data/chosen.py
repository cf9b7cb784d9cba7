"""Some samples of another source, by their numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ndonnx.data.source import RowSource
from ndonnx.data.specs import Batch


class ChosenSource(RowSource):
    """The samples `rows` of a source that gives them by number, in this order."""

    def __init__(self, source: RowSource, rows: NDArray[np.int64]) -> None:
        """Take int64 (n,) numbers of samples; a number may come twice."""
        super().__init__(source.spec, source.inputs, source.recipe)
        self._source = source
        self._rows = rows
        self.length = len(rows)
        self.has_labels = source.has_labels

    def _fetch(self, rows: NDArray[np.int64]) -> Batch:
        return self._source._fetch(self._rows[rows])

    def _content(self) -> Iterator[bytes]:
        yield self._source.fingerprint().encode()
        yield self._rows.astype("<i8").tobytes()
