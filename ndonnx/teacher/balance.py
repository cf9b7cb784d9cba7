"""Made-up samples that a classifier sees as all its classes: few of them, unchosen, look like most.

The teacher itself says what it takes each sample for, so nothing but the model is needed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ndonnx.data.source import RowSource
from ndonnx.data.subset import Subset
from ndonnx.errors import ModelError, first_line
from ndonnx.teacher.sessions import OrtError, make_session

POOL = 4
"""Samples that are looked at for each one that is taken."""
_BATCH = 64
_CLASS_RANK = 2
"""Rank of class scores: (samples, classes)."""


def balanced(
    source: RowSource,
    model: ir.Model,
    samples: int,
    *,
    threads: int | None = None,
    on_batch: Callable[[int], None] = lambda count: None,
) -> RowSource | Subset:
    """`samples` of the source's samples, as equally many of each of the teacher's classes as there are.

    Args:
        source: to choose from; should hold `POOL` times as many samples as are wanted.
        model: the teacher.
        samples: how many to take.
        threads: for onnxruntime; None takes the cores of the process's affinity.
        on_batch: told the number of samples of every batch that was looked at.

    Returns:
        The chosen samples, in the source's order; the source itself where the teacher has no class scores, or
        where there is nothing to choose.

    Raises:
        ModelError: onnxruntime refuses the model or fails.
    """
    if source.length <= samples:
        return source
    session = make_session(model, threads=threads)
    first = session.get_inputs()[0].shape[0]
    size = first if isinstance(first, int) and first > 0 else _BATCH
    found: list[NDArray[np.int64]] = []
    for batch in source.batches(size):
        count = len(batch)
        # A fixed batch size is met by repeating; the answers to the repeated are cut off.
        feeds = {name: np.take(array, range(size), axis=0, mode="wrap") for name, array in batch.inputs.items()}
        try:
            outputs = session.run(None, feeds)
        except OrtError as error:
            raise ModelError(f"onnxruntime failed on made-up samples: {first_line(error)}") from error
        scores = next((value for value in outputs if _is_scores(value, size)), None)
        if scores is None:
            return source
        found.append(np.argmax(scores[:count], axis=1).astype(np.int64))
        on_batch(count)
    return Subset(source, choose(np.concatenate(found), samples))


def choose(classes: NDArray[np.int64], samples: int) -> NDArray[np.int64]:
    """Places of the first few of each class, as equal in number as can be: int64 (samples,), ascending."""
    by_class = np.argsort(classes, kind="stable")
    ordered = classes[by_class]
    begins = np.searchsorted(ordered, ordered)
    rank = np.empty(len(classes), np.int64)
    rank[by_class] = np.arange(len(classes)) - begins  # how many of its class came before
    return np.sort(np.argsort(rank, kind="stable")[:samples])


def _is_scores(value: object, rows: int) -> bool:
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        return False
    return value.ndim == _CLASS_RANK and len(value) == rows and value.shape[1] > 1
