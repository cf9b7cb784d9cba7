"""How large values are: read off the graph, and where it does not tell, off one run of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ndonnx.errors import DataError, ModelError, first_line
from ndonnx.graph.dataflow import reads, real_inputs
from ndonnx.graph.interface import first_sizes, sample_axis, samples_first
from ndonnx.graph.shapes.sizes import Size, factors
from ndonnx.graph.working_copy import batch_size
from ndonnx.teacher.sessions import OrtError, make_session

Batch = Mapping[str, npt.NDArray[Any]]

BATCH_BYTES = 64 * 2**20
"""Bytes of activations, about, that a batch of a sweep may hold at a time."""
_RUN_BYTES = 256 * 2**20
"""Bytes of values, about, that are asked of one run."""
_FEW = 2
"""Samples by which the size of a batch is found."""
_FIRST_RUN = 64
"""Values asked of the first run, whose size tells how many the next one may give."""


class Layout(NamedTuple):
    """How a value is laid out."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    """Samples first where it has any."""
    rows: bool
    """Whether the first axis is the sample."""

    def sample_bytes(self, dtype: npt.DTypeLike | None = None) -> int:
        """Bytes of one sample, or of all of it where all samples share it.

        Args:
            dtype: what float32 is stored as; None: as it is.
        """
        size = np.dtype(dtype).itemsize if dtype is not None and self.dtype == np.float32 else self.dtype.itemsize
        return math.prod(self.shape[1:] if self.rows else self.shape) * size


def capture_bytes(
    model: ir.Model,
    values: Sequence[str],
    samples: int,
    dtype: npt.DTypeLike = np.float16,
    *,
    batch: Batch | None = None,
) -> int:
    """Bytes that `capture` will take on disk, values that overflow float16 not counted double.

    Args:
        model: the teacher.
        values: names of the values to be captured.
        samples: number of samples.
        dtype: what float32 values are stored as; graph inputs keep their own type.
        batch: one batch to run; needed when the graph does not tell every type and shape.

    Raises:
        ModelError: a value is not in the graph, or its shape is unknown and no batch was given.
    """
    inputs = {value.name for value in model.graph.inputs}
    total = 0
    for name, layout in layouts_of(model, values, batch).items():
        size = layout.sample_bytes(None if name in inputs else dtype)
        total += size * samples if layout.rows else size
    return total


def layouts_of(model: ir.Model, values: Collection[str], batch: Batch | None = None) -> dict[str, Layout]:
    """The layout of each value, from the graph or else from a run: one for all, or as few as memory asks.

    Args:
        model: a working copy.
        values: names of inputs and of values of its main graph. What a run does not give as an array is left out.
        batch: a few samples to run, first axis the sample; None: nothing is run.

    Raises:
        ModelError: a value is not in the graph; or the graph does not tell its shape, and there is no batch, or
            onnxruntime fails on it.
    """
    found = find_values(model, values)
    names = _Names.of(model, batch)
    told = names.layouts(found)
    if len(told) == len(found):
        return told
    if batch is None:
        name = next(name for name in found if name not in told)
        raise ModelError(f"value '{name}': the graph does not tell its shape; a batch is needed to estimate its size")
    # Values share the names of their open sizes, so that a few of them tell all.
    open_ = {name: value for name, value in found.items() if name not in told}
    measured = _measured(model, names.representatives(open_), batch)
    names.learn(open_, measured)
    told = names.layouts(found) | measured
    measured = _measured(model, [name for name in found if name not in told], batch)
    return {name: layout for name in found if (layout := told.get(name) or measured.get(name)) is not None}


def find_values(model: ir.Model, names: Collection[str]) -> dict[str, ir.Value]:
    """Inputs and values of the main graph by name.

    Raises:
        ModelError: there is none of a name.
    """
    inputs = (value for value in model.graph.inputs if value.name not in model.graph.initializers)
    inner = (value for node in model.graph for value in node.outputs)
    values = {value.name or "": value for value in (*inputs, *inner)}
    for name in names:
        if name not in values:
            raise ModelError(f"graph '{model.graph.name or ''}': no activation named '{name}' to capture")
    return {name: values[name] for name in names}


@dataclass(frozen=True)
class BoundedBatches:
    """Batches of as many samples at a time as a model runs in bounded memory."""

    batches: Callable[[], Iterable[Batch]]
    inputs: tuple[str, ...]
    rows: int | None
    """Most samples of a batch; None: as they come."""

    @classmethod
    def of(cls, model: ir.Model, names: Collection[str], batches: Callable[[], Iterable[Batch]]) -> BoundedBatches:
        """Split what is too large; nothing where the model fixes the size of its batch.

        Args:
            model: a working copy, or a model with the samples first.
            names: values that a run gives.
            batches: inputs by name, samples first; the same on every call.
        """
        inputs = tuple(value.name or "" for value in real_inputs(model.graph))
        whole = cls(batches, inputs, None)
        first = next(iter(batches()), None)
        if first is None or batch_size(model.graph) is not None:
            return whole
        rows = whole.count(first)
        few = {name: array[:_FEW] if whole.has_rows(array, rows) else array for name, array in first.items()}
        try:
            most = rows_at_once(model, names, few, rows)
        except (DataError, ModelError):  # the sweep itself tells what is wrong with the data
            return whole
        return whole if most >= rows else cls(batches, inputs, most)

    def __call__(self) -> Iterator[Batch]:
        """The batches."""
        for batch in self.batches():
            rows = self.count(batch)
            if self.rows is None or self.rows >= rows:
                yield batch
                continue
            for start in range(0, rows, self.rows):
                part = slice(start, start + self.rows)
                yield {name: array[part] if self.has_rows(array, rows) else array for name, array in batch.items()}

    def count(self, batch: Batch) -> int:
        """Samples of a batch."""
        return next((len(batch[name]) for name in self.inputs if name in batch and batch[name].ndim), 0)

    @staticmethod
    def has_rows(array: npt.NDArray[Any], rows: int) -> bool:
        """Whether an input has a sample axis in a batch of so many."""
        return array.ndim > 0 and len(array) == rows


def rows_at_once(model: ir.Model, kept: Collection[str], batch: Batch, most: int, copies: int = 1) -> int:
    """Samples of a batch, at least 1 and at most so many, that the model runs within a bounded number of bytes.

    Args:
        model: a working copy.
        kept: names of the values that a run gives.
        batch: a few samples, which are run where the graph does not tell all sizes.
        most: samples of a batch where memory does not matter.
        copies: times that the values that a run gives are in memory.

    Raises:
        ModelError: onnxruntime fails on the batch.
    """
    inner = [value.name for node in model.graph for value in node.outputs if value.name and value.type is not None]
    layouts = layouts_of(model, list(dict.fromkeys([*_input_names(model), *inner, *kept])), batch)
    given = sum(layouts[name].sample_bytes() for name in kept if name in layouts and layouts[name].rows)
    each = live_bytes(model, layouts, kept) + (copies - 1) * given
    return max(1, min(most, BATCH_BYTES // max(1, each)))


def live_bytes(model: ir.Model, layouts: Mapping[str, Layout], kept: Collection[str] = ()) -> int:
    """Bytes of one sample's values that are in memory at the same time at most, when nodes run in order.

    Args:
        model: values are kept from the node that makes them to the last one that reads them.
        layouts: of its values; those that are missing count nothing.
        kept: names of values that are kept to the end.
    """
    sizes = {name: layout.sample_bytes() for name, layout in layouts.items() if layout.rows}
    last = {value.name: number for number, node in enumerate(model.graph) for value in reads(node)}
    ending: dict[int, list[str]] = {}
    for name, number in last.items():
        if name in sizes and name not in kept:
            ending.setdefault(number, []).append(name or "")
    live = sum(sizes.get(name, 0) for name in _input_names(model))
    most = live
    for number, node in enumerate(model.graph):
        live += sum(sizes.get(value.name or "", 0) for value in node.outputs)
        most = max(most, live)
        live -= sum(sizes[name] for name in ending.get(number, ()))
        live -= sum(sizes.get(v.name or "", 0) for v in node.outputs if v.name not in last and v.name not in kept)
    return most


def _input_names(model: ir.Model) -> list[str]:
    return [value.name or "" for value in real_inputs(model.graph)]


@dataclass(frozen=True)
class _Names:
    """What the names of open sizes stand for in one batch."""

    sizes: dict[str, int]
    first: object
    """Length of the inputs' first axis as the graph has it: a number or a name."""
    rows: int | None
    """Samples of the batch; None where there is no batch."""

    @classmethod
    def of(cls, model: ir.Model, batch: Batch | None) -> _Names:
        """What the inputs tell."""
        inputs = real_inputs(model.graph)
        first = next((first_sizes(v.shape, sample_axis(v))[0] for v in model.graph.inputs if v.shape), None)
        names = cls({}, first, None if batch is None else _count(batch, _input_names(model)))
        if batch is not None:
            names.learn(
                {v.name or "": v for v in inputs},
                {v.name or "": _layout(batch[v.name or ""], 0) for v in inputs if v.name in batch},
            )
        return names

    def learn(self, values: Mapping[str, ir.Value], layouts: Mapping[str, Layout]) -> None:
        """Take in the sizes of values that were seen."""
        for name, layout in layouts.items():
            sizes = _sizes(values[name])
            if sizes is not None and len(sizes) == len(layout.shape):
                self.sizes.update((s, n) for s, n in zip(sizes, layout.shape, strict=True) if isinstance(s, str))

    def representatives(self, values: Mapping[str, ir.Value]) -> list[str]:
        """Values that together have all names that are not known; of those without a name for each size, all."""
        known, found = set(self.sizes), []
        for name, value in values.items():
            sizes = _sizes(value)
            new = set() if sizes is None else {size for size in sizes if isinstance(size, str)} - known
            if sizes is None or None in sizes or value.dtype is None or new:
                found.append(name)
                known |= new
        return found

    def layouts(self, values: Mapping[str, ir.Value]) -> dict[str, Layout]:
        """Layouts of those values whose sizes are all known; along the samples any will do."""
        return {name: layout for name, value in values.items() if (layout := self._layout(value)) is not None}

    def _layout(self, value: ir.Value) -> Layout | None:
        sizes = _sizes(value)
        if value.dtype is None or sizes is None:
            return None
        numbers = [self._number(size) for size in sizes]
        if None in numbers[1:]:
            return None
        first = sizes[0] if sizes else None
        open_ = bool(sizes) and not isinstance(first, int)
        rows = numbers[0] in (None, self.rows) if open_ else first is not None and first == self.first
        shape = tuple(1 if number is None else number for number in numbers)
        return Layout(value.dtype.numpy(), shape, rows)

    def _number(self, size: Size | None) -> int | None:
        if size is None or isinstance(size, int):
            return size
        if size in self.sizes:
            return self.sizes[size]
        number, names = factors(size)
        known = [self.sizes.get(name) for name in names.elements()]
        return None if None in known else number * math.prod(n for n in known if n is not None)


def _sizes(value: ir.Value) -> tuple[Size | None, ...] | None:
    """A value's sizes, samples first: numbers, names, or None for what has no name."""
    if value.shape is None:
        return None
    sizes = first_sizes(value.shape, sample_axis(value))
    return tuple(size if isinstance(size, int) else size.value for size in sizes)


def _measured(model: ir.Model, names: Sequence[str], batch: Batch) -> dict[str, Layout]:
    inputs = _input_names(model)
    rows = _count(batch, inputs)
    layouts = {name: _layout(batch[name], rows) for name in names if name in inputs and name in batch}
    for values in _runs(model, [name for name in names if name not in inputs], batch):
        layouts |= {name: _layout(value, rows) for name, value in values.items() if isinstance(value, np.ndarray)}
    return layouts


def _runs(model: ir.Model, names: Sequence[str], batch: Batch) -> Iterator[dict[str, object]]:
    """Runs that give these values: a first few, and then as many at a time as memory holds, mostly all."""
    start, size = 0, _FIRST_RUN
    while start < len(names):
        some = names[start : start + size]
        values = _run(model, some, batch)
        yield values
        given = sum(value.nbytes for value in values.values() if isinstance(value, np.ndarray))
        size = max(1, len(some) * _RUN_BYTES // max(1, given))
        start += len(some)


def _run(model: ir.Model, names: Sequence[str], batch: Batch) -> dict[str, object]:
    copy = model.clone()
    copy.graph.outputs[:] = find_values(copy, names).values()
    RemoveUnusedNodesPass()(copy)
    session = make_session(samples_first(copy), optimise=False)
    fed = {value.name for value in session.get_inputs()}
    try:
        found = session.run(list(names), {name: array for name, array in batch.items() if name in fed})
    except OrtError as error:
        name = model.graph.name or ""
        raise ModelError(f"graph '{name}': onnxruntime failed on a batch: {first_line(error)}") from error
    return dict(zip(names, found, strict=True))


def _count(batch: Batch, inputs: Sequence[str]) -> int:
    for name in inputs:
        if name not in batch:
            raise DataError(f"a batch has no array for the model's input '{name}', only {', '.join(batch)}")
        if batch[name].ndim:
            return len(batch[name])
    raise DataError("no input of the model has an axis, so samples cannot be counted")


def _layout(value: npt.NDArray[Any], rows: int) -> Layout:
    return Layout(value.dtype, value.shape, value.ndim > 0 and len(value) == rows)
