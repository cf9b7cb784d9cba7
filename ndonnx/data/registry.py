"""Which kind of data source opens what the user gives: every kind is declared in the file that implements it."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import onnx_ir as ir
from numpy.typing import NDArray

from ndonnx.config.recipe import DataRecipe
from ndonnx.data.source import DataSource
from ndonnx.data.specs import InputSpec
from ndonnx.errors import DataError


class Rows(Protocol):
    """Samples by their number, as in a torch `Dataset` or a Hugging Face `Dataset`."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int, /) -> Any:
        """The sample with this number, from 0."""


Data: TypeAlias = str | Path | NDArray[Any] | Mapping[str, Any] | Iterable[Any] | Rows
"""What the verbs take as data: a source by its name or path, arrays, or an iterable of samples or batches."""


@dataclass(frozen=True)
class Opening:
    """What a data source is opened with."""

    given: Any
    """What the user gave: a `str` for a name or a path, otherwise the object itself."""
    inputs: tuple[InputSpec, ...]
    """Inputs of the model that have samples, with the samples along the first axis."""
    recipe: DataRecipe
    """How a raw sample becomes a model input."""
    seed: int = 0
    """Seed of made-up samples."""
    graph: ir.Graph | None = None
    """Graph of the model, which tells what made-up whole numbers an input can take."""

    @property
    def spec(self) -> str:
        """Name of the source in messages: what the user wrote, or the type of the object."""
        return self.given if isinstance(self.given, str) else f"data of type {type(self.given).__name__}"


Open = Callable[[Opening], DataSource]


@dataclass(frozen=True)
class SourceKind:
    """One kind of data source."""

    says: str
    """What it takes, in words for messages: `a .csv file of numbers`."""
    opens: Callable[[Any], bool]
    """Whether it is for what the user gave: a `str`, or an object."""
    open: Open
    """Makes the source, or raises `DataError`."""


_registered: list[SourceKind] = []


def register_source(says: str, opens: Callable[[Any], bool]) -> Callable[[Open], Open]:
    """Declare a kind of data source: a decorator for the function, or class, that makes a source of an `Opening`.

    The kind that was registered last is asked first, and those that come with ndonnx after all others. The decorated
    function should raise `DataError`, in one line with the way out, for what does not fit the model.

    Args:
        says: what the kind takes, in words for messages, such as `a .csv file of numbers`.
        opens: whether it is for what the user gave: a `str` for a name or a path, otherwise the object itself.
    """

    def register(open_: Open) -> Open:
        _registered.append(SourceKind(says, opens, open_))
        return open_

    return register


def has_suffix(*suffixes: str) -> Callable[[Any], bool]:
    """A test for names of files, present or not, that end in one of these suffixes, whatever their case."""

    def opens(given: Any) -> bool:
        return isinstance(given, str) and Path(given).suffix.lower() in suffixes and not Path(given).is_dir()

    return opens


def check_file(spec: str) -> Path:
    """The path of a file that is there and holds something.

    Raises:
        DataError: there is no such file, or it is empty.
    """
    path = Path(spec)
    if not path.is_file():
        raise DataError(f"{spec}: no such file")
    if path.stat().st_size == 0:
        raise DataError(f"{spec}: the file is empty (0 bytes)")
    return path


def as_given(data: object) -> object:
    """What the kinds of source are asked about: paths as text, everything else as it is."""
    return os.fspath(data) if isinstance(data, os.PathLike) else data


def open_kind(opening: Opening) -> DataSource:
    """Open a source by the first kind that is for it.

    Raises:
        DataError: it cannot be read, no kind is for it, or its kind refuses it.
    """
    if opening.given is None or (isinstance(opening.given, str) and not opening.given):
        raise DataError(f"the data source is empty; expected {_known()}")
    return _kind_for(opening).open(opening)


def _kind_for(opening: Opening) -> SourceKind:
    given, fault = opening.given, None
    for kind in _kinds():
        try:
            if kind.opens(given):
                return kind
        except (OSError, ValueError) as error:  # a name of which the file system cannot tell whether it is a file
            fault = error
    found = repr(given) if isinstance(given, str) else opening.spec
    if fault is not None:
        raise DataError(f"{found}: cannot be read: {fault}") from fault
    raise DataError(f"{found}: unknown kind of data source; expected {_known()}")


def _kinds() -> list[SourceKind]:
    """All kinds, in the order in which they are asked."""
    _import_shipped()
    shipped = sorted(filter(_is_shipped, _registered), key=lambda kind: kind.open.__module__)
    return [*(kind for kind in reversed(_registered) if not _is_shipped(kind)), *shipped]


def _known() -> str:
    return ", ".join(kind.says for kind in sorted(_kinds(), key=lambda kind: not _is_shipped(kind)))


def _is_shipped(kind: SourceKind) -> bool:
    return kind.open.__module__.startswith(f"{_SHIPPED}.")


_SHIPPED = "ndonnx.data.sources"
"""Package of which every file may register a kind."""


@cache
def _import_shipped() -> None:
    for module in pkgutil.iter_modules(importlib.import_module(_SHIPPED).__path__):
        importlib.import_module(f"{_SHIPPED}.{module.name}")
