"""Padding: positions behind a sample's own length, which the model is told to pass over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ndonnx.convert import relative_error
from ndonnx.graph.dataflow import float_outputs
from ndonnx.graph.working_copy import slice_batch
from ndonnx.teacher import make_session
from ndonnx.teacher.sessions import REFUSALS

Array = npt.NDArray[Any]
Lengths = npt.NDArray[np.int64]
"""Filled positions of each sample, (samples,)."""

_SAME = 1e-3
"""Largest difference, relative to an answer's scale, that is only rounding: another length is summed in another
order."""
_MOST_TRIED = 16
"""Samples, at most, by which it is tried whether padding says nothing."""


def find_padding(model: ir.Model, batch: Mapping[str, Array]) -> str | None:
    """Name of the input that says how many positions of each sample are filled; None where padding cannot be cut off.

    An attention mask is known by its numbers: ones, and behind them zeros. It counts if the model gives the same to
    samples without the positions that it leaves out.

    Args:
        model: a working copy of the teacher.
        batch: some samples of all its inputs, samples first.
    """
    if slice_batch(model) is not None:
        return None
    return next((name for name, array in batch.items() if is_mask(array) and _is_passed_over(model, batch, name)), None)


def lengths_of(mask: Array) -> Lengths:
    """Filled positions of each sample of a mask (samples, positions)."""
    found: Lengths = np.count_nonzero(mask, axis=1).astype(np.int64)
    return found


def cut(array: Array, full: int, length: int) -> Array:
    """An array without the positions behind a length, along every axis but the first that has them all."""
    index = tuple(slice(length) if axis and size == full else slice(None) for axis, size in enumerate(array.shape))
    return np.asarray(array[index])


def is_same(whole: Array, short: Array, lengths: Lengths, full: int) -> bool:
    """Whether an answer to samples without padding is that to whole ones, at their filled positions.

    Args:
        whole: the answer to samples with all positions, samples first.
        short: the answer to the same samples without padding.
        lengths: of the samples; none is longer than `short` has positions.
        full: number of positions of a whole sample.
    """
    if whole.shape != short.shape:
        most = int(lengths.max())
        if whole.ndim < 2 or whole.shape[1] != full or short.shape != (len(whole), most, *whole.shape[2:]):
            return False
        filled = np.arange(most) < lengths[:, None]
        whole, short = whole[:, :most][filled], short[filled]
    return not whole.size or relative_error(short, whole) <= _SAME


def shortest(lengths: Lengths, full: int) -> npt.NDArray[np.int64]:
    """Rows by which it is tried whether padding says nothing: the shortest ones; none where all are full."""
    order = np.argsort(lengths, kind="stable")[:_MOST_TRIED]
    found: npt.NDArray[np.int64] = np.sort(order[(lengths[order] < full) & (lengths[order] > 0)])
    return found


def is_mask(array: Array) -> bool:
    """Whether every row is ones and behind them zeros, at least one one: (samples, positions)."""
    if array.ndim != 2 or not array.size or array.dtype.kind not in "biuf":
        return False
    first = bool((array[:, 0] == 1).all())
    return first and bool(np.isin(array, (0, 1)).all() and (np.diff(array.astype(np.int8), axis=1) <= 0).all())


def _is_passed_over(model: ir.Model, batch: Mapping[str, Array], name: str) -> bool:
    """Whether the model answers the same without the positions that a mask leaves out."""
    full, lengths = batch[name].shape[1], lengths_of(batch[name])
    rows = shortest(lengths, full)
    outputs = float_outputs(model)
    if not len(rows) or not outputs:
        return False
    whole = {n: array[rows] if array.ndim and len(array) == len(lengths) else array for n, array in batch.items()}
    short = {n: cut(array, full, int(lengths[rows].max())) for n, array in whole.items()}
    try:
        session = make_session(model)
        answers = [session.run(outputs, feeds) for feeds in (whole, short)]
    except REFUSALS:  # samples of another length are not for this model
        return False
    return all(is_same(w, s, lengths[rows], full) for w, s in zip(*answers, strict=True))
