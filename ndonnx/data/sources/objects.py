"""What a Python user holds: arrays, dicts of arrays, and iterables of samples or batches, which are read once."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ndonnx.data.registry import Opening, register_source
from ndonnx.data.source import DataSource, RowSource, first_line
from ndonnx.data.sources.arrays import LABELS, ArraySource, array_bytes, check_keys, label_key, only_input
from ndonnx.data.sources.items import ItemSource
from ndonnx.data.specs import Batch, describe
from ndonnx.errors import DataError

IN_MEMORY = 2**30
"""Bytes of one input's values up to which those of an iterable are kept in memory; beyond, in a temporary file."""
MOST_BYTES = 2**36
"""Bytes of one input's values that are read from an iterable at most: one without an end would fill the disk."""

_CLASSES = "label"
"""Column of the class labels."""


def _is_object(given: Any) -> bool:
    return not isinstance(given, str | bytes) and any(
        hasattr(given, name) for name in ("__array__", "__iter__", "__getitem__")
    )


@register_source("an array, a dict of arrays by input, an iterable of samples or batches", opens=_is_object)
def open_object(opening: Opening) -> DataSource:
    """Open arrays where they lie, and read everything else once, from its start to its end.

    Raises:
        DataError: a sample does not fit the model, or has another shape than those before it.
    """
    given = opening.given
    if isinstance(given, Mapping):
        check_keys(opening, given)
        wanted = {*LABELS, *(entry.name for entry in opening.inputs)}.intersection(given)
        return ArraySource(opening, {name: as_array(given[name], f"{opening.spec}: '{name}'") for name in wanted})
    if hasattr(given, "__array__"):
        return ArraySource(opening, {only_input(opening, "give a dict of arrays"): as_array(given, opening.spec)})
    return DrawnSource(_Items(opening))


def as_array(value: Any, where: str) -> NDArray[Any]:
    """An array, tensor or nested list as a numpy array; a torch tensor on the CPU shares its memory.

    Raises:
        DataError: it is none of numbers of one shape.
    """
    try:
        return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{where}: cannot be read as an array: {first_line(error)}") from error


class _Items(ItemSource):
    """Items of an iterable in any of the usual forms; after the first look there is a single pass."""

    def __init__(self, opening: Opening) -> None:
        self._names = [entry.name for entry in opening.inputs]
        self._left = _in_order(opening.given)
        self._seen: list[Any] | None = []
        super().__init__(opening)

    def drawn(self) -> Iterator[Batch]:
        """All samples, from the first on; can be called once."""
        seen, self._seen = self._seen or [], None
        self._left = chain(seen, self._left)
        return self._alike()

    def _raw_items(self) -> Iterator[Any]:
        yield from self._seen or ()
        # A loader may raise anything; whatever it is, it is a fault of the data.
        try:
            for item in self._left:
                if self._seen is not None:
                    self._seen.append(item)
                yield item
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{self.spec}: raised {first_line(error)}") from error

    def _split(self, raw: object, where: str) -> tuple[Mapping[str, ArrayLike], ArrayLike | None]:
        found, label = self._named_fields(raw, where)
        if label is None and (key := label_key(found, self._names)) is not None:
            label = found[key]
        arrays = {name: as_array(found[name], f"{where}: '{name}'") for name in self._names if name in found}
        missing = [name for name in self._names if name not in found]
        if missing:
            raise DataError(
                f"{where}: expected the inputs {self._names}, found {list(found)}; missing {missing}; rename them"
            )
        return arrays, None if label is None else as_array(label, f"{where}: label")

    def _named_fields(self, raw: Any, where: str) -> tuple[Mapping[str, Any], Any]:
        """The values of an item by input, and its labels: from a dict, an array, or a tuple of these and labels."""
        if isinstance(raw, Mapping):
            return raw, None
        if not _is_tuple(raw):
            return self._by_position([raw], where), None
        if len(raw) == 2 and isinstance(raw[0], Mapping):
            return raw[0], raw[1]
        if len(raw) == 2 and _is_tuple(raw[0]):
            return self._by_position(raw[0], where), raw[1]
        if len(raw) == len(self._names) + 1:
            return self._by_position(raw[:-1], where), raw[-1]
        return self._by_position(raw, where), None

    def _by_position(self, values: Iterable[Any], where: str) -> dict[str, Any]:
        values = list(values)
        if len(values) != len(self._names):
            raise DataError(
                f"{where}: expected values of the inputs {self._names}, and maybe labels after them, found "
                f"{len(values)}; give a dict of arrays by input"
            )
        return dict(zip(self._names, values, strict=True))

    def _content(self) -> Iterator[bytes]:
        raise NotImplementedError("an iterable has no contents before it is read")


def _in_order(given: Any) -> Iterator[Any]:
    """The items of an iterable, or of what has them by number; those of a Hugging Face data set as numpy arrays."""
    if hasattr(given, "with_format"):
        given = given.with_format("numpy")
    if hasattr(given, "__iter__"):
        yield from given
    else:
        yield from (given[number] for number in range(len(given)))


def _is_tuple(item: Any) -> bool:
    """Whether an item is several values, as loaders give them, and not one value written as a list of numbers."""
    if not isinstance(item, tuple | list):
        return False
    inner = (tuple, list, Mapping) if isinstance(item, tuple) else Mapping
    return any(isinstance(value, inner) or _is_tuple(value) or getattr(value, "ndim", 0) > 0 for value in item)


class DrawnSource(RowSource):
    """Samples that were read once, as the model takes them: in memory, or in a temporary file where they are many."""

    def __init__(self, items: _Items) -> None:
        """Read all items.

        Raises:
            DataError: an item does not fit the model, or its samples have another shape than those before it.
        """
        super().__init__(items.spec, items.inputs, items.recipe, items.fixed)
        columns = {name: _Column(f"{self.spec}: '{name}'") for name in (*(e.name for e in self.inputs), _CLASSES)}
        for batch in items.drawn():
            for name, array in batch.inputs.items():
                columns[name].add(array)
            if batch.labels is not None:
                columns[_CLASSES].add(batch.labels)
        self.has_labels = items.has_labels
        self._arrays = {entry.name: columns[entry.name].whole() for entry in self.inputs}
        self._labels = columns[_CLASSES].whole() if self.has_labels else None
        self.length = len(next(iter(self._arrays.values())))

    def _fetch(self, rows: NDArray[np.int64]) -> Batch:
        inputs = {name: np.array(array[rows]) for name, array in self._arrays.items()}
        return Batch(inputs, None if self._labels is None else self._labels[rows])

    def _content(self) -> Iterator[bytes]:
        arrays = list(self._arrays.items()) + ([] if self._labels is None else [(_CLASSES, self._labels)])
        return chain.from_iterable(array_bytes(name, array) for name, array in arrays)


class _Column:
    """Values of one input that come a part at a time, all of one shape behind the first axis."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._parts: list[NDArray[Any]] = []
        self._like: NDArray[Any] | None = None
        self._count = self._bytes = 0
        self._file: IO[bytes] | None = None

    def add(self, part: NDArray[Any]) -> None:
        """Add values (n, ...), which are copied."""
        like = self._like = part[:0] if self._like is None else self._like
        if part.shape[1:] != like.shape[1:]:
            first, found = (describe(array.dtype, array.shape[1:]) for array in (like, part))
            raise DataError(
                f"{self._where}: sample {self._count} is {found}, those before it are {first}; pad them to one shape, "
                "or give module:function"
            )
        self._parts.append(np.array(part))
        self._count += len(part)
        self._bytes += part.nbytes
        if self._bytes > MOST_BYTES:
            raise DataError(
                f"{self._where}: more than {MOST_BYTES:,} bytes in {self._count:,} samples; give fewer, as "
                "itertools.islice(data, N) does, or a .npy file"
            )
        if self._bytes > IN_MEMORY:
            self._set_aside()

    def whole(self) -> NDArray[Any]:
        """All values (N, ...)."""
        if self._file is None:
            return np.concatenate(self._parts)
        self._file.flush()
        assert self._like is not None
        return np.memmap(self._file, self._like.dtype, "r", shape=(self._count, *self._like.shape[1:]))

    def _set_aside(self) -> None:
        """Write what is in memory into a file without a name, which goes when nothing reads it any more."""
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="ndonnx-")  # noqa: SIM115 - the memory map outlives a block
            for part in self._parts:
                self._file.write(part.tobytes())
        except OSError as error:
            free = shutil.disk_usage(tempfile.gettempdir()).free
            raise DataError(
                f"{self._where}: cannot be set aside in {tempfile.gettempdir()} ({free:,} bytes free): "
                f"{error.strerror}; set TMPDIR to a larger disk, or give fewer samples"
            ) from error
        self._parts.clear()
