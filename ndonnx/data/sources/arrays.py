"""`.npz` and `.npy` files. Headers are checked before anything is allocated; nothing is unpickled.

Arrays are memory-mapped, in a `.npz` too where its members are stored uncompressed (`np.savez`).
"""

from __future__ import annotations

import math
import mmap
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any, Literal, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ndonnx.data.inputs import one_value, samples_first
from ndonnx.data.preprocess import check_array, prepare_array
from ndonnx.data.registry import Opening, check_file, has_suffix, register_source
from ndonnx.data.source import CHUNK, RowSource, file_bytes
from ndonnx.data.specs import Batch, InputSpec, check_labels
from ndonnx.errors import DataError

LABELS = ("label", "labels")
"""Keys of class labels, where no input of the model has that name."""
MOST_UNPACKED = 4 * 2**30
"""Bytes that the compressed arrays of one `.npz` may take in memory."""
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ZIP_FAULTS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError, ValueError)


class _Header(NamedTuple):
    """What a `.npy` stream says of its array."""

    shape: tuple[int, ...]
    order: Literal["C", "F"]
    dtype: np.dtype[np.generic]

    @property
    def size(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


class ArraySource(RowSource):
    """Samples in arrays named as the model's inputs, in memory or mapped from a file.

    The samples lie along the axis where the model has them, mostly the first. A scalar, or an array of its input's own
    fixed shape beside others with samples, is one value for all samples.
    """

    def __init__(
        self, opening: Opening, arrays: Mapping[str, NDArray[Any]], content: Callable[[], Iterator[bytes]] | None = None
    ) -> None:
        """Check every array's shape and element type, without reading its values.

        Args:
            opening: what the source is opened with.
            arrays: one for each input of the model, by name, as the model has it; maybe class labels, integers [n],
                under `label` or `labels`. They are not copied.
            content: gives the bytes that decide what the samples are. None: the arrays' own values.

        Raises:
            DataError: an input has no array, or an array does not fit the model.
        """
        super().__init__(opening.spec, opening.inputs, opening.recipe)
        spec, found = opening.spec, dict(arrays)
        names = [entry.name for entry in self.inputs]
        key = label_key(found, names)
        labels = None if key is None else found.pop(key)
        check_keys(opening, found)
        self._read_content = content
        self.fixed = one_value(self.inputs, found, spec)
        self.inputs = tuple(entry for entry in self.inputs if entry.name not in self.fixed)
        if not self.inputs:
            raise DataError(f"{spec}: holds one value for all samples and nothing else, so that there are no samples")
        self._arrays = {entry.name: samples_first(found[entry.name], entry) for entry in self.inputs}
        for entry in self.inputs:
            array = self._arrays[entry.name]
            check_array(array.shape, array.dtype, entry, self.recipe, self._where(entry))
        self.length = self._common_length()
        self._labels = None if labels is None else check_labels(labels, self.length, f"{spec}: '{key}'")
        self.has_labels = labels is not None

    def _common_length(self) -> int:
        lengths = {name: len(array) for name, array in self._arrays.items()}
        if len(set(lengths.values())) != 1:
            found = ", ".join(f"'{name}' {length}" for name, length in lengths.items())
            raise DataError(f"{self.spec}: expected as many samples in each array, found {found}")
        return next(iter(lengths.values()))

    def _fetch(self, rows: NDArray[np.int64]) -> Batch:
        # Neighbouring rows come as one read of the file instead of one per row.
        run = slice(rows[0], rows[-1] + 1) if np.all(np.diff(rows) == 1) else rows
        inputs = {}
        for entry in self.inputs:
            raw = np.array(self._arrays[entry.name][run])
            _give_back(self._arrays[entry.name])
            inputs[entry.name] = prepare_array(raw, entry, self.recipe, self._where(entry), rows)
        return Batch(inputs, None if self._labels is None else self._labels[rows])

    def _where(self, entry: InputSpec) -> str:
        return f"{self.spec}: '{entry.name}'"

    def _content(self) -> Iterator[bytes]:
        if self._read_content is not None:
            return self._read_content()
        labels = {} if self._labels is None else {LABELS[0]: self._labels}
        return chain.from_iterable(array_bytes(name, array) for name, array in (self._arrays | labels).items())


@register_source("a .npz or .npy file", opens=has_suffix(".npz", ".npy"))
def open_arrays(opening: Opening) -> ArraySource:
    """Open a `.npz` file, or a `.npy` file for a model with one input.

    Raises:
        DataError: the file is missing or corrupt, or an array does not fit the model.
    """
    path, names = check_file(opening.spec), [entry.name for entry in opening.inputs]
    if path.suffix.lower() == ".npz":
        arrays = open_npz(path, names, whole_shapes(opening.inputs))
    else:
        arrays = {only_input(opening, "give an .npz"): open_npy(path)}
    return ArraySource(opening, arrays, lambda: file_bytes(path, opening.spec))


def only_input(opening: Opening, way_out: str) -> str:
    """Name of the model's one input, which a source with one array is for.

    Raises:
        DataError: the model has several inputs; ends in this way out.
    """
    if len(opening.inputs) != 1:
        names = _quoted([entry.name for entry in opening.inputs])
        raise DataError(f"{opening.spec}: holds one array, but the model has the inputs {names}; {way_out}")
    return opening.inputs[0].name


def array_bytes(name: str, array: NDArray[Any]) -> Iterator[bytes]:
    """The bytes that decide what an array is, a part at a time: its name, element type and shape, then its values."""
    yield f"{name} {array.dtype.str} {array.shape};".encode()
    rows = max(1, CHUNK * len(array) // max(1, array.nbytes)) if array.ndim else 1
    for start in range(0, len(array) if array.ndim else 0, rows):
        yield np.ascontiguousarray(array[start : start + rows]).tobytes()


def label_key(found: Iterable[str], inputs: Collection[str]) -> str | None:
    """The key that holds class labels, where it is none of the model's inputs; None where there are no labels."""
    return next((key for key in LABELS if key in found and key not in inputs), None)


def check_keys(opening: Opening, found: Collection[str]) -> None:
    """Refuse a source that lacks an input of the model.

    Raises:
        DataError: it does; tells the keys and the way out.
    """
    names = [entry.name for entry in opening.inputs]
    if missing := [name for name in names if name not in found]:
        raise DataError(f"{opening.spec}: {missing_keys(names, found, missing, whole_shapes(opening.inputs))}")


def whole_shapes(inputs: Iterable[InputSpec]) -> list[str]:
    """Names of the inputs with a fixed shape, which could have one value for all samples."""
    return [entry.name for entry in inputs if all(isinstance(size, int) for size in entry.shape)]


def missing_keys(names: Sequence[str], found: Iterable[str], missing: Sequence[str], alone: Sequence[str]) -> str:
    """What is wrong with the keys of a source that lacks some of the model's inputs, and the way out."""
    return (
        f"expected the keys {_quoted(names)} (and '{LABELS[0]}' if there are labels), "
        f"found {_quoted(found) or 'none'}; missing {_quoted(missing)}{_way_out(alone, missing)}"
    )


def _give_back(array: NDArray[np.generic]) -> None:
    """Let the system have the pages of a mapped file that were read; they would count as this process's memory."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and sys.platform != "win32":
        mapped.madvise(mmap.MADV_DONTNEED)


def open_npy(path: Path) -> NDArray[np.generic]:
    """Memory-map a `.npy` file.

    Raises:
        DataError: it is no such file, is shorter than it declares, or holds pickled objects.
    """
    try:
        with path.open("rb") as file:
            header = _read_header(file, str(path))
            if not header.shape:
                raise DataError(f"{path}: expected a shape with the samples as first axis, found []")
            return _map(path, file.tell(), header, str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot read the file: {error.strerror}") from error


def open_npz(path: Path, names: Sequence[str], alone: Sequence[str] = ()) -> dict[str, NDArray[np.generic]]:
    """The arrays `names`, and class labels if they are there, out of a `.npz` file.

    Args:
        path: of the file.
        names: inputs of the model.
        alone: those of them that could have one value for all samples, for the message when one is missing.

    Raises:
        DataError: it is no such file, a key is missing, or an array is corrupt.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if missing := [name for name in names if name not in members]:
                raise DataError(f"{path}: {missing_keys(names, members, missing, alone)}")
            key = label_key(members, names)
            wanted = {name: members[name] for name in (*names, *([] if key is None else [key]))}
            unpacked = sum(info.file_size for info in wanted.values() if info.compress_type != zipfile.ZIP_STORED)
            if unpacked > MOST_UNPACKED:
                raise DataError(
                    f"{path}: would take {unpacked:,} bytes of memory to unpack, expected at most "
                    f"{MOST_UNPACKED:,}; save it uncompressed (np.savez)"
                )
            return {name: _open_member(archive, info, path, name) for name, info in wanted.items()}
    except _ZIP_FAULTS as error:
        raise DataError(f"{path}: not a readable .npz file: {error}; save it again with np.savez") from error


def _open_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, name: str) -> NDArray[np.generic]:
    where = f"{path}: '{name}'"
    with archive.open(info) as member:
        header = _read_header(member, where)
        start = member.tell()
        _check_size(header, info.file_size - start, where)
        if info.compress_type != zipfile.ZIP_STORED:
            flat = np.frombuffer(member.read(), dtype=header.dtype, count=math.prod(header.shape))
            return flat.reshape(header.shape, order=header.order)
        while member.read(CHUNK):  # reading to the end checks the CRC, which a memory map would not
            pass
    return _map(path, _data_offset(path, info) + start, header, where)


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin in the archive."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        _, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    return info.header_offset + _LOCAL_HEADER.size + int(name_length) + int(extra_length)


def _read_header(file: IO[bytes], where: str) -> _Header:
    """What a `.npy` stream declares; leaves it at the first value.

    Raises:
        DataError: it is no such stream, or holds pickled objects, no sample axis or no samples.
    """
    try:
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"format version {version[0]}.{version[1]}, expected 1.0 or 2.0")
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except (ValueError, TypeError, SyntaxError, TokenError, RecursionError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{where}: not a numpy array: {reason}; save it with np.save or np.savez") from error
    if dtype.hasobject:
        raise DataError(f"{where}: holds pickled objects, which are never read; expected a plain numeric array")
    if min(shape, default=0) < 0 or any(type(size) is not int for size in shape):
        raise DataError(f"{where}: expected a shape with the samples as first axis, found {list(shape)}")
    header = _Header(shape, "F" if fortran else "C", dtype)
    if header.size == 0:
        raise DataError(f"{where}: holds no samples (shape {list(shape)}); expected at least one")
    return header


def _map(path: Path, offset: int, header: _Header, where: str) -> NDArray[np.generic]:
    _check_size(header, path.stat().st_size - offset, where)
    return np.memmap(path, header.dtype, "r", offset, header.shape, header.order)


def _check_size(header: _Header, found: int, where: str) -> None:
    if header.size > found:
        declared = f"{header.dtype.name} {list(header.shape)}, {header.size:,} bytes"
        raise DataError(f"{where}: declares {declared}, found {found:,} bytes; it is cut off or corrupt, save it again")


def _way_out(alone: Sequence[str], missing: Sequence[str]) -> str:
    """What to do about a missing input that could have one value for all samples."""
    found = next((name for name in missing if name in alone), None)
    return "" if found is None else f"; if it has one value for all samples, give it by --input {found}=VALUE"


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
