"""Rows of a stored value, read as they are asked for: nothing of the rest comes into memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from ndonnx.errors import RunDirError
from ndonnx.teacher.blocks import Array
from ndonnx.teacher.manifest import nbytes_of


class StoredRows:
    """A stored value `(samples, ...)` whose rows are read from the disk, so that none of it stays in memory.

    Pages of a memory map count as this process's memory until they are given back.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> None:
        self.dtype = dtype
        self.shape = shape
        self._path = path
        self._offset = offset
        self._row = nbytes_of(dtype, shape[1:])
        self._lock = Lock()
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise RunDirError(f"{path}: cannot open the value: {error.strerror}") from error

    @property
    def ndim(self) -> int:
        """Number of axes, the samples' included."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | npt.NDArray[np.integer[Any]]) -> Array:
        """Rows as a new array, in any order.

        Raises:
            RunDirError: the file cannot be read, or ends early.
        """
        numbers = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows)
        if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < len(self):
            raise IndexError(f"{self._path}: rows {numbers.min()} to {numbers.max()} of {len(self)}")
        found = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        if found.nbytes:
            into = memoryview(found.reshape(-1).view(np.uint8).data)
            breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
            for run in np.split(np.arange(len(numbers)), breaks):  # neighbours come as one read
                first, count = int(run[0]), len(run)
                start = self._offset + int(numbers[first]) * self._row
                self._read(into[first * self._row : (first + count) * self._row], start)
        return found

    def _read(self, into: memoryview, start: int) -> None:
        try:
            while into:
                count = self._read_some(into, start)
                if not count:
                    raise RunDirError(f"{self._path}: ends early; capture again")
                into, start = into[count:], start + count
        except OSError as error:
            raise RunDirError(f"{self._path}: cannot read the value: {error.strerror}") from error

    def _read_some(self, into: memoryview, start: int) -> int:
        if sys.platform != "win32":
            return os.preadv(self._file.fileno(), [into], start)
        with self._lock:
            self._file.seek(start)
            return self._file.readinto(into) or 0
