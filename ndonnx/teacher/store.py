"""Captured values on disk: one memory-mapped file per value, checksummed, never read half-written.

A store is a folder of `.npy` files and a `manifest.json` that is written last. Without its
manifest a folder is no store, whatever lies in it. The checksum is a sum of 64-bit words,
chosen because it costs 4 us per 200 KB where a cryptographic one would halve the capture's
speed; it is against bad disks and cut-off writes, not against an adversary.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from ndonnx.errors import RunDirError
from ndonnx.teacher.blocks import Array, Bytes, checksum, chunk_is_finite, chunks, fold
from ndonnx.teacher.manifest import (
    MANIFEST,
    VALUE_FILE,
    DtypeName,
    Manifest,
    StoredValue,
    check_file,
    disk_error,
    nbytes_of,
    read_manifest,
    write_manifest,
)
from ndonnx.teacher.stored_rows import StoredRows

STORABLE: frozenset[str] = frozenset(get_args(DtypeName))
"""numpy names of the element types that a store holds."""


class ActivationStore:
    """Captured values of one model on the same samples, opened for reading.

    Attributes:
        path: the store's folder.
        samples: how many samples every value holds, but for the constant ones.
        nonfinite: values that hold an Inf or a NaN.
        unstorable: values that were asked for and could not be stored, with the reason.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self._manifest = manifest
        self._maps: dict[str, mmap.mmap] = {}
        self._arrays: dict[str, Array] = {}

    @classmethod
    def create(
        cls, directory: Path, values: Mapping[str, tuple[npt.DTypeLike, tuple[int, ...]]], samples: int
    ) -> StoreWriter:
        """Begin a store: `values` gives each value's dtype and its shape without the sample axis.

        Raises:
            RunDirError: the folder cannot be written, or the disk is full.
        """
        writer = StoreWriter(directory, samples)
        for name, (dtype, shape) in values.items():
            writer.add(name, dtype, shape)
        return writer

    @classmethod
    def open(cls, directory: Path, names: Collection[str] | None = None) -> ActivationStore:
        """Open a finished store.

        Args:
            directory: its folder.
            names: values that will be read; files of others need not be there. None: all.

        Raises:
            RunDirError: the manifest is missing or damaged, or a file is not what it says.
        """
        manifest = read_manifest(directory / MANIFEST)
        for name, entry in manifest.values.items():
            if names is None or name in names:
                check_file(directory / entry.file, name, entry)
        return cls(directory, manifest)

    @staticmethod
    def files(directory: Path, names: Collection[str] | None = None) -> list[Path]:
        """The files that `open` looks at, the manifest first.

        Raises:
            RunDirError: the manifest is missing or damaged.
        """
        values = read_manifest(directory / MANIFEST).values
        files = [entry.file for name, entry in values.items() if names is None or name in names]
        return [directory / file for file in (MANIFEST, *files)]

    @property
    def samples(self) -> int:
        return self._manifest.samples

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._manifest.values)

    @property
    def nbytes(self) -> int:
        """Bytes of all values, without the headers."""
        return sum(entry.nbytes for entry in self._manifest.values.values())

    @property
    def nonfinite(self) -> tuple[str, ...]:
        return tuple(self._manifest.nonfinite)

    @property
    def unstorable(self) -> dict[str, str]:
        return dict(self._manifest.unstorable)

    def is_constant(self, name: str) -> bool:
        """Whether one copy of the value serves all samples (it has no sample axis of its own)."""
        return self._entry(name).constant

    def array(self, name: str) -> Array:
        """The whole value, `(samples, ...)`, mapped read-only; a constant has its own shape.

        Raises:
            RunDirError: the store does not hold the value, or its file cannot be mapped.
        """
        if name not in self._arrays:
            entry = self._entry(name)
            file_path = self.path / entry.file
            try:
                with file_path.open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise RunDirError(f"{file_path}: cannot map value '{name}': {error.strerror}") from error
            self._maps[name] = mapped
            self._arrays[name] = np.ndarray(
                tuple(entry.shape), np.dtype(entry.dtype), buffer=mapped, offset=len(entry.header)
            )
        return self._arrays[name]

    def rows(self, name: str) -> StoredRows:
        """The value as rows that are read when they are asked for, and then are nobody's memory but the caller's.

        Raises:
            RunDirError: the store does not hold the value, its file cannot be opened, or it is a constant.
        """
        entry = self._entry(name)
        if entry.constant:
            raise RunDirError(f"{self.path}: value '{name}' has no rows, one array serves all samples")
        return StoredRows(self.path / entry.file, np.dtype(entry.dtype), tuple(entry.shape), len(entry.header))

    def read(self, name: str, start: int, stop: int) -> Array:
        """Samples `start` to `stop` as a view of the file, nothing copied; a constant comes whole."""
        array = self.array(name)
        if not 0 <= start <= stop <= self.samples:
            raise IndexError(f"value '{name}': samples {start}:{stop} of {self.samples}")
        return array if self.is_constant(name) else array[start:stop]

    def verify(self, name: str) -> None:
        """Read the value once and compare its checksums.

        Raises:
            RunDirError: a block differs from what was written.
        """
        entry = self._entry(name)
        array = self.array(name)
        for start, stop, expected in entry.blocks:
            block = array if entry.constant else array[start:stop]
            if checksum(block, start) != expected:
                raise RunDirError(
                    f"{self.path / entry.file}: value '{name}' is damaged in samples {start} to {stop}; "
                    "delete this folder and capture again"
                )
            self.release()

    def release(self) -> None:
        """Give the mapped pages back, so that resident memory does not grow with what was read."""
        if sys.platform != "win32":
            for mapped in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)

    def drop(self, name: str) -> None:
        """Delete a value whose jobs are done. For the store's owner only, never for its readers."""
        entry = self._entry(name)
        del self._manifest.values[name]
        self._arrays.pop(name, None)
        self._maps.pop(name, None)
        write_manifest(self.path / MANIFEST, self._manifest)
        _unlink(self.path / entry.file)

    def remove(self) -> None:
        """Delete the store, and its folder when nothing else lies in it."""
        self._arrays.clear()
        self._maps.clear()
        self._manifest.values.clear()
        _clear(self.path)
        _rmdir_if_empty(self.path)

    def _entry(self, name: str) -> StoredValue:
        entry = self._manifest.values.get(name)
        if entry is None:
            reason = self._manifest.unstorable.get(name, "it was not captured, or was dropped")
            raise RunDirError(f"{self.path}: no value '{name}' in this store: {reason}")
        return entry


class StoreWriter:
    """Fills a store block after block; nothing is readable before `finish`.

    Each value's file is allocated in full at once, so a disk that is too small is met
    before the sweep and not in the middle of it. Files are opened for each block: a graph
    may have more values than a process may have open files.
    """

    def __init__(self, directory: Path, samples: int) -> None:
        self.directory = directory
        self._manifest = Manifest(samples=samples)
        self._files = 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, directory) from error
        _clear(directory)

    def add(self, name: str, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> None:
        """Allocate a value; `shape` is without the sample axis.

        Raises:
            RunDirError: the disk is full, or the folder cannot be written.
        """
        self._add(name, np.dtype(dtype), (self._manifest.samples, *shape), constant=False)

    def add_constant(self, name: str, array: Array) -> None:
        """Store one array that serves all samples."""
        entry = self._add(name, array.dtype, array.shape, constant=True)
        self._write(name, entry, array, 0, self._manifest.samples)

    def append(self, name: str, block: Array) -> bool:
        """Write the next samples of a value, `(n, ...)`; False when an Inf or a NaN is among them.

        Raises:
            RunDirError: the disk is full, or the file cannot be written.
        """
        entry = self._manifest.values[name]
        start = entry.blocks[-1][1] if entry.blocks else 0
        stop = start + len(block)
        expected = [stop - start, *entry.shape[1:]]
        if [*block.shape] != expected or block.dtype.name != entry.dtype or stop > self._manifest.samples:
            raise ValueError(
                f"value '{name}': {block.dtype}{block.shape} at sample {start} does not fit "
                f"{entry.dtype}{tuple(entry.shape)}"
            )
        return self._write(name, entry, block, start, stop)

    def drop(self, name: str) -> None:
        """Forget a value and free its file."""
        entry = self._manifest.values.pop(name)
        if name in self._manifest.nonfinite:
            self._manifest.nonfinite.remove(name)
        _unlink(self.directory / entry.file)

    def finish(self, unstorable: Mapping[str, str] | None = None) -> ActivationStore:
        """Write the manifest and open the store.

        Raises:
            RunDirError: the manifest cannot be written.
        """
        for name, entry in self._manifest.values.items():
            written = entry.blocks[-1][1] if entry.blocks else 0
            if written != self._manifest.samples:
                raise ValueError(f"value '{name}': {written} of {self._manifest.samples} samples were written")
        self._manifest.unstorable = dict(unstorable or {})
        write_manifest(self.directory / MANIFEST, self._manifest)
        return ActivationStore.open(self.directory)

    def discard(self) -> None:
        """Delete all that was written."""
        _clear(self.directory)
        _rmdir_if_empty(self.directory)

    def _add(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], *, constant: bool) -> StoredValue:
        if dtype.name not in STORABLE:
            raise ValueError(f"value '{name}': element type {dtype} cannot be stored")
        file = f"v{self._files:05d}.npy"
        self._files += 1
        entry = StoredValue.model_validate(
            {"file": file, "dtype": dtype.name, "shape": [int(size) for size in shape], "constant": constant}
        )
        try:
            _allocate(self.directory / file, entry.header, entry.nbytes)
        except OSError as error:
            raise disk_error(error, self.directory) from error
        self._manifest.values[name] = entry
        return entry

    def _write(self, name: str, entry: StoredValue, block: Array, start: int, stop: int) -> bool:
        row = 0 if entry.constant else nbytes_of(block.dtype, block.shape[1:])
        total, finite = start, True
        try:
            with (self.directory / entry.file).open("r+b", buffering=0) as file:
                file.seek(len(entry.header) + start * row)
                for chunk in chunks(block):
                    total = fold(total, chunk)
                    finite = finite and chunk_is_finite(chunk, entry.dtype)
                    _write_all(file, chunk)
        except OSError as error:
            raise disk_error(error, self.directory) from error
        entry.blocks.append((start, stop, total))
        if not finite and name not in self._manifest.nonfinite:
            self._manifest.nonfinite.append(name)
        return finite


def _allocate(path: Path, header: bytes, nbytes: int) -> None:
    with path.open("wb", buffering=0) as file:
        file.write(header)
        size = len(header) + nbytes
        if sys.platform == "linux":
            try:
                os.posix_fallocate(file.fileno(), 0, size)
                return
            except OSError as error:
                if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL}:
                    raise
        file.truncate(size)


def _write_all(file: io.FileIO, chunk: Bytes) -> None:
    rest = chunk.data
    while rest:
        rest = rest[file.write(rest) or 0 :]


def _clear(directory: Path) -> None:
    """Delete a store's files, its manifest first: from then on the rest is nobody's."""
    _unlink(directory / MANIFEST)
    _unlink(directory / f"{MANIFEST}.tmp")
    for path in directory.iterdir() if directory.is_dir() else ():
        if VALUE_FILE.fullmatch(path.name):
            _unlink(path)


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise RunDirError(f"{path}: cannot delete: {error.strerror}") from error


def _rmdir_if_empty(directory: Path) -> None:
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()
