"""How a data source is fed to a teacher: in which batches, and how large a sample is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ndonnx.data import DataSource
from ndonnx.errors import ModelError
from ndonnx.teacher.sizes import layouts_of

CAPTURE_BATCH = 64
"""Samples read at a time, fewer where they are large."""
_READ_BYTES = 64 * 2**20
"""Bytes of inputs read at a time."""
_FEW = 2
"""Samples by which sizes are found."""
PROBE = 8
"""Samples on which the finished student is checked."""


def read_batch(source: DataSource) -> int:
    """Samples read at a time: `CAPTURE_BATCH`, fewer where they are large, or as many as the model fixes."""
    each = 0
    for spec in source.inputs:
        sizes = [size for size in spec.shape[1:] if isinstance(size, int)]
        if len(sizes) < len(spec.shape[1:]):  # open sizes: a sample tells
            each = sum(array.nbytes for array in next(iter(source.batches(1, samples=1))).inputs.values())
            break
        each += math.prod(sizes) * spec.dtype.itemsize
    return source.fixed_batch or max(1, min(CAPTURE_BATCH, _READ_BYTES // max(1, each)))


def whole_batches(
    source: DataSource,
    size: int,
    *,
    samples: int | None = None,
    on_labels: Callable[[np.ndarray], None] = lambda labels: None,
) -> Iterator[Mapping[str, np.ndarray]]:
    """Batches of about this size; where the model fixes it, of that, the last one filled up with its last sample.

    `on_labels` is told the labels of each batch that has any, without the filling.
    """
    fixed = source.fixed_batch
    for batch in source.batches(fixed or size, samples=samples):
        if batch.labels is not None:
            on_labels(batch.labels)
        missing = fixed - len(batch) if fixed else 0
        yield {
            name: np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]) if missing > 0 else rows
            for name, rows in batch.inputs.items()
        }


def probe(source: DataSource) -> Mapping[str, np.ndarray]:
    """A few samples for the last check."""
    return next(whole_batches(source, PROBE, samples=PROBE))


def sample_bytes(model: ir.Model, names: Sequence[str], source: DataSource, dtype: npt.DTypeLike = np.float16) -> int:
    """Bytes that one sample of these values takes in a store; see `capture_bytes`."""
    return sum(value_bytes(model, names, source, dtype).values())


def value_bytes(
    model: ir.Model, names: Iterable[str], source: DataSource, dtype: npt.DTypeLike = np.float16
) -> dict[str, int]:
    """Bytes that one sample of each of these values takes in a store. Ask for all at once: a run may be needed.

    Args:
        model: a working copy.
        names: of values of its main graph.
        source: data to run where the graph does not tell all shapes.
        dtype: what computed float32 values are stored as.
    """
    wanted = list(dict.fromkeys(names))
    try:
        layouts = layouts_of(model, wanted)
    except ModelError:  # a shape is not in the graph: run a few samples and look
        layouts = layouts_of(model, wanted, next(whole_batches(source, _FEW, samples=_FEW)))
    inputs = {value.name for value in model.graph.inputs}
    return {name: layout.sample_bytes(None if name in inputs else dtype) for name, layout in layouts.items()}
