"""The interface that every data source keeps, and the part that sources with row access share."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndonnx.config.recipe import DataRecipe
from ndonnx.data.specs import Batch, InputSpec
from ndonnx.errors import DataError

CHUNK = 2**20
"""Bytes read at a time when a file is hashed."""


class DataSource(ABC):
    """Samples for a model, in batches of named arrays."""

    def __init__(
        self,
        spec: str,
        inputs: Sequence[InputSpec],
        recipe: DataRecipe,
        fixed: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        self.spec = spec
        """The source as the user wrote it."""
        self.inputs = tuple(inputs)
        """Inputs of the model that have samples."""
        self.fixed = dict(fixed or {})
        """Inputs of the model that have one value for all samples; batches do not hold them."""
        self.recipe = recipe
        self.length: int | None = None
        """Number of samples; None when only running through them would tell."""
        self.has_labels = False
        self._fingerprint: str | None = None

    @property
    def fixed_batch(self) -> int | None:
        """Samples in a batch where the model, or what is known of it, fixes them."""
        fixed = (spec.shape[0] for spec in self.inputs if spec.shape)
        return next((size for size in fixed if isinstance(size, int)), None)

    @abstractmethod
    def batches(self, batch_size: int, *, samples: int | None = None) -> Iterator[Batch]:
        """The first `samples` samples (None: all), `batch_size` at a time; the last batch may be smaller.

        Raises:
            DataError: a sample is corrupt or does not fit the model; names the sample.
        """

    @abstractmethod
    def take(self, rows: NDArray[np.int64], batch_size: int) -> Iterator[Batch]:
        """The samples with these numbers, int64 (n,), in this order, `batch_size` at a time.

        A source that only runs from its start makes a pass for each ascending run of numbers.

        Raises:
            DataError: a sample is corrupt, does not fit the model, or is not there.
        """

    def row_number(self, place: int) -> int:
        """The number that the sample at this place (from 0) has in what the user gave."""
        return place

    @abstractmethod
    def _content(self) -> Iterator[bytes]:
        """The bytes that decide what the samples are, in a fixed order."""

    def fingerprint(self) -> str:
        """Hex digest of the content and of the way it is turned into model inputs."""
        if self._fingerprint is None:
            digest = hashlib.blake2b(digest_size=16)
            digest.update(self.recipe.model_dump_json().encode())
            digest.update("; ".join(map(str, self.inputs)).encode())
            for name, array in sorted(self.fixed.items()):
                digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
            for part in self._content():
                digest.update(part)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


class RowSource(DataSource):
    """A source whose samples can be fetched by index."""

    length: int

    @abstractmethod
    def _fetch(self, rows: NDArray[np.int64]) -> Batch:
        """The samples with these indices, in this order."""

    def batches(self, batch_size: int, *, samples: int | None = None) -> Iterator[Batch]:
        count = self.length if samples is None else min(self.length, samples)
        return self.take(np.arange(count, dtype=np.int64), batch_size)

    def take(self, rows: NDArray[np.int64], batch_size: int) -> Iterator[Batch]:
        for start in range(0, len(rows), batch_size):
            yield self._fetch(rows[start : start + batch_size])


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message, for messages of one line."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def file_bytes(path: Path, where: str) -> Iterator[bytes]:
    """The file in pieces, after its length, so that two files never run into each other."""
    try:
        with path.open("rb") as file:
            yield f"{path.stat().st_size}:".encode()
            while chunk := file.read(CHUNK):
                yield chunk
    except OSError as error:
        raise DataError(f"{where}: cannot read the file: {error.strerror}") from error
