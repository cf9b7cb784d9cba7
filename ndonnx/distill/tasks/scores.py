"""Class scores as arrays: how they are written, their logarithms, their divergence, how far they are softened."""

from __future__ import annotations

import enum
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Float = NDArray[np.float64]

_SUM = 1e-2
"""How far the sum of a sample's probabilities, rounded in float16, may be from 1."""
_TEMPERATURES = (4.0, 3.0, 2.0, 1.5)
"""Usual in distillation, the softest first."""
_KNOWN = 0.5
"""Part of the first class's mean probability that is left at a temperature, at least."""
_MOST_ROWS = 2048
"""Vectors by which an output is told; more say nothing else."""
LEAST_PROBABILITY = 1e-30
"""What is less is taken for this before its logarithm."""


class Form(enum.Enum):
    """How class scores are written."""

    LOGITS = "logits"
    PROBABILITIES = "probabilities"
    LOG_PROBABILITIES = "log-probabilities"


def finite_rows(values: Array, axis: int) -> Float:
    """Vectors along an axis that hold no NaN or Inf, float64 (rows, length); of many some that stand for all."""
    rows = vectors(values, axis)
    rows = rows[:: -(-len(rows) // _MOST_ROWS) or 1]
    return rows[np.isfinite(rows).all(axis=1)].astype(np.float64)


def vectors(values: Array, axis: int) -> Array:
    """Vectors along an axis, (vectors, length)."""
    last = np.moveaxis(values, axis, -1)
    return last.reshape(math.prod(last.shape[:-1]), last.shape[-1])


def are_probabilities(scores: Array) -> bool:
    """Whether class scores, (rows, classes), come out of a softmax."""
    values = scores.astype(np.float64)
    return bool(np.all(values >= 0) and np.allclose(values.sum(axis=1), 1, atol=_SUM))


def are_log_probabilities(scores: Array) -> bool:
    """Whether class scores, (rows, classes), are logarithms of what comes out of a softmax."""
    return bool(np.all(scores <= _SUM) and np.allclose(np.exp(scores).sum(axis=1), 1, atol=_SUM))


def fitting_temperature(scores: Array, axis: int, form: Form) -> float:
    """The highest usual temperature at which the teacher still knows its first class.

    Softening shows how the other classes compare. Of thousands of classes it soon shows nothing else: at 4, all
    characters that a reader of text has ruled out together outweigh the one that it has read.

    Args:
        scores: the teacher's.
        axis: along which its classes lie.
        form: how they are written.
    """
    rows = finite_rows(scores, axis)
    if not len(rows):
        return 1.0
    logits = np.log(np.maximum(rows, LEAST_PROBABILITY)) if form is Form.PROBABILITIES else rows
    first = _first_class(logits, 1.0)
    return next((t for t in _TEMPERATURES if _first_class(logits, t) >= _KNOWN * first), 1.0)


def _first_class(logits: Float, temperature: float) -> float:
    """Mean probability of the first class at a temperature."""
    above = (logits - logits.max(axis=1, keepdims=True)) / temperature
    return float((1 / np.exp(above).sum(axis=1)).mean())


def top_class(scores: Array) -> NDArray[np.int64]:
    """The class with the largest score; -1, which is no class, where a score is NaN."""
    top = np.argmax(scores, axis=1).astype(np.int64)
    top[np.isnan(scores).any(axis=1)] = -1
    return np.asarray(top)


def nats(student: Array, teacher: Array, *, probabilities: bool, temperature: float = 1.0) -> float:
    """Kullback-Leibler divergence of the student's classes from the teacher's, the sum over rows (rows, classes)."""
    log_p, log_q = (log_probabilities(values, probabilities) for values in (teacher, student))
    if temperature != 1:
        log_p, log_q = (log_probabilities(values / temperature, False) for values in (log_p, log_q))
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        terms = p * (log_p - log_q)
    terms[~(p > 0)] = 0  # a class that the teacher masks adds nothing
    return float(np.sum(terms, dtype=np.float64))


def log_probabilities(scores: Array, probabilities: bool) -> Float:
    """Logarithms of the class probabilities, float64; `probabilities` says that the scores are such already."""
    values = scores.astype(np.float64)
    if probabilities:
        return np.asarray(np.log(np.maximum(values, np.finfo(np.float32).tiny)))
    with np.errstate(invalid="ignore"):  # Inf - Inf: a broken model, whose divergence is reported as inf
        values -= values.max(axis=1, keepdims=True)
        return np.asarray(values - np.log(np.sum(np.exp(values), axis=1, keepdims=True)))
