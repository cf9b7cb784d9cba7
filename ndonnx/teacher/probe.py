"""Run a model for values inside it, on as many samples at a time as a bounded number of bytes holds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ndonnx.graph.working_copy import slice_batch
from ndonnx.teacher.sessions import make_session
from ndonnx.teacher.stored_rows import StoredRows

Arrays = Mapping[str, npt.NDArray[Any]]
"""Values by name; the first axis is the sample, except for constants."""
Rows = Mapping[str, npt.NDArray[Any] | StoredRows]
"""The same, in memory or on the disk."""

BATCH_BYTES = 32 * 2**20
"""Bytes, about, of the values that one batch gives."""
_FIRST_BATCH = 8
"""Samples of the first batch, whose size tells how many the others may have."""


class Probe:
    """A model cut down to some of its values."""

    def __init__(self, model: ir.Model, values: Sequence[str], *, threads: int) -> None:
        """Open it in onnxruntime.

        Args:
            model: not changed.
            values: names of inputs, inner values or outputs.
            threads: for onnxruntime.

        Raises:
            ModelError: onnxruntime refuses the model.
        """
        self._names = tuple(dict.fromkeys(values))
        inputs = {value.name for value in model.graph.inputs}
        self._computed = [name for name in self._names if name not in inputs]
        self._session = None
        self._batch = slice_batch(model)
        if self._computed:
            cut = _cut(model, self._computed)
            self._inputs = [value.name or "" for value in cut.graph.inputs]
            self._session = make_session(cut, threads=threads)

    def run(self, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        """The values by name.

        Raises:
            OrtError: onnxruntime fails.
        """
        found: dict[str, npt.NDArray[Any]] = {}
        if self._session is not None:
            given = {name: feeds[name] for name in self._inputs if name in feeds}
            found = dict(zip(self._computed, run_held(self._session, self._computed, given, self._batch), strict=True))
        return {name: found[name] if name in found else feeds[name] for name in self._names}


def run_held(
    session: ort.InferenceSession, names: Sequence[str], feeds: Arrays, batch: int | None
) -> list[npt.NDArray[Any]]:
    """What a session gives for any number of samples, where its model takes just `batch` of them at a time.

    Args:
        session: of a slice.
        names: of its outputs.
        feeds: its inputs; those that are as long as the first one hold the samples.
        batch: None: the model takes any number.

    Returns:
        The outputs of all runs one behind the other, along the first axis.

    Raises:
        OrtError: onnxruntime fails.
    """
    rows = max((len(array) for array in feeds.values() if array.ndim), default=0)
    if batch is None or rows == batch:
        found: list[npt.NDArray[Any]] = session.run(list(names), dict(feeds))
        return found
    runs = []
    for start in range(0, rows, batch):
        numbers = np.minimum(np.arange(start, start + batch), rows - 1)  # the last ones are filled up
        held = {n: array[numbers] if array.ndim and len(array) == rows else array for n, array in feeds.items()}
        runs.append(session.run(list(names), held))
    return [_behind(pieces, batch, rows) for pieces in zip(*runs, strict=True)]


def _behind(pieces: Sequence[npt.NDArray[Any]], batch: int, rows: int) -> npt.NDArray[Any]:
    if not pieces[0].ndim:
        return pieces[0]
    joined = np.concatenate(pieces)
    return joined[:rows] if len(pieces[0]) == batch else joined


def run_batches(
    runs: Sequence[tuple[Callable[[Arrays], dict[str, npt.NDArray[Any]]], Rows]],
    constants: Collection[str] = (),
    samples: range | None = None,
    size: int | None = None,
) -> Iterator[tuple[range, list[dict[str, npt.NDArray[Any]]]]]:
    """Run several probes side by side over their samples; floats are fed as float32.

    Args:
        runs: what takes feeds and gives values, and what it is fed with.
        constants: names of feeds that all samples share.
        samples: which samples; all by default.
        size: samples of every batch where the models fix it. None: as many as a bounded number of bytes holds.

    Yields:
        The samples of each batch, and the values that each probe gives.
    """
    if samples is None:
        samples = range(min(sample_count(feeds, constants) for _, feeds in runs))
    start, step = samples.start, size or _FIRST_BATCH
    while start < samples.stop:
        stop = min(start + step, samples.stop)
        found = [run(_part(feeds, constants, slice(start, stop))) for run, feeds in runs]
        yield range(start, stop), found
        bytes_ = sum(array.nbytes for values in found for array in values.values())
        if start == samples.start and size is None:
            step = max(1, BATCH_BYTES * (stop - start) // max(1, bytes_))
        del found
        start = stop


def sample_count(feeds: Rows, constants: Collection[str] = ()) -> int:
    """Samples that all feeds have."""
    return min(len(array) for name, array in feeds.items() if name not in constants)


def _part(feeds: Rows, constants: Collection[str], rows: slice) -> dict[str, npt.NDArray[Any]]:
    whole = {name: array for name, array in feeds.items() if name in constants and isinstance(array, np.ndarray)}
    return {name: _plain(whole[name] if name in whole else array[rows]) for name, array in feeds.items()}


def _plain(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.array(array, dtype=np.float32) if array.dtype.kind == "f" else np.array(array)


def _cut(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy of the model whose outputs are exactly the named values."""
    copy = model.clone()
    values = ir.convenience.create_value_mapping(copy.graph)
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(values[name] for name in names)
    RemoveUnusedNodesPass()(copy)
    return copy
