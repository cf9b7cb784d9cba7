"""How a data source is fed to a teacher: in which batches, and how large a sample is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ndonnx.data import DataSource
from ndonnx.errors import ModelError
from ndonnx.teacher import capture_bytes

CAPTURE_BATCH = 64
PROBE = 8
"""Samples on which the finished student is checked."""


def fixed_batch(source: DataSource) -> int | None:
    """Samples in a batch where the model fixes them."""
    fixed = (spec.shape[0] for spec in source.inputs if spec.shape)
    return next((size for size in fixed if isinstance(size, int)), None)


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
    fixed = fixed_batch(source)
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
    try:
        return capture_bytes(model, names, 1, dtype)
    except ModelError:  # a shape is not in the graph: run one batch and look
        return capture_bytes(model, names, 1, dtype, batch=probe(source))
