"""How near a student's outputs are to the teacher's, each in the measure of its task."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndonnx.distill.task import Form, OutputTask, Task, fitting_temperature
from ndonnx.metrics.intervals import Interval, of_mean, of_part

Array = NDArray[Any]
Float = NDArray[np.float64]

_CHUNK_NUMBERS = 2**16
"""Numbers of an output, about, that are compared at a time."""
_LEAST = 1e-30
"""Least norms of two vectors, multiplied: a vector of zeros has no angle."""


@dataclass(frozen=True)
class OutputFidelity:
    """One output of a student against the teacher's; None where a measure has no meaning for it."""

    task: str
    """What the output was taken for."""
    agreement: float | None = None
    """Part of the samples, or of all their positions, whose largest class score is where the teacher's is."""
    kl: float | None = None
    """Kullback-Leibler divergence of the classes from the teacher's, in nats, mean over samples and positions."""
    cosine: float | None = None
    """Mean cosine of the angle to the teacher's vector."""
    nmse: float | None = None
    """Squared error over the teacher's variance."""
    softened_kl: float | None = None
    """As `kl`, of classes softened as for distillation (see `ndonnx.distill.task.fitting_temperature`): what few
    samples tell of a student, in which a single confident mistake does not outweigh all others."""
    interval: Interval | None = None
    """95% confidence interval of the measure of its task: of `agreement`, `cosine` or `nmse`. Samples are taken to be
    independent, the positions of one sample are not. None where there are too few."""

    @property
    def loss(self) -> float:
        """One figure by which students are compared, less is better: softened divergence, one minus the cosine, or the
        NMSE."""
        if self.softened_kl is not None:
            return self.softened_kl
        found = 1 - self.cosine if self.cosine is not None else self.nmse
        return math.inf if found is None else found


class Fidelity:
    """Error of one output against the teacher's, and the spread of the teacher's around its mean."""

    def __init__(self) -> None:
        self.error = 0.0
        """Sum of squared differences."""
        self.spread = 0.0
        """Sum of the teacher's squared deviations from its mean over all elements."""
        self.largest = 0.0
        self._count = 0
        self._mean = 0.0
        self._rows = 0
        self._squares = 0.0

    def add(self, student: Array, teacher: Array) -> Float:
        """Take in one batch; the squared error of each row of its first axis, (rows,), or of all where it has none.

        Where the teacher itself is not finite (masks), the student may be anything.
        """
        if not teacher.ndim:
            return np.asarray(self._add(student.reshape(1, 1), teacher.reshape(1, 1))[0])
        shape = len(teacher), math.prod(teacher.shape[1:])
        ours, theirs = (values.reshape(shape) for values in (student, teacher))
        parts = [self._add(ours[rows], theirs[rows]) for rows in _chunks(len(theirs), theirs.shape[1])]
        errors = np.concatenate(parts) if parts else np.zeros(0)
        self._rows += len(errors)
        with np.errstate(over="ignore"):
            self._squares += float(np.sum(np.square(errors)))
        return errors

    def interval(self) -> Interval | None:
        """95% confidence interval of the error over the spread, by how the errors of the rows differ."""
        found = of_mean(self.error, self._squares, self._rows)
        if found is None or self.spread <= 0:
            return None
        low, high = (end * self._rows / self.spread for end in found)
        return max(0.0, low), high

    def _add(self, student: Array, teacher: Array) -> Float:
        finite = np.isfinite(teacher)
        if finite.all():
            squares, known = np.subtract(student, teacher, dtype=np.float64), teacher
        else:
            squares, known = np.zeros(teacher.shape), teacher[finite]
            np.subtract(student, teacher, out=squares, where=finite, dtype=np.float64)
        np.square(squares, out=squares)
        squares[np.isnan(squares)] = np.inf
        if known.size:
            self.error += float(np.sum(squares))
            self.largest = max(self.largest, math.sqrt(float(squares.max())))
            self._spread_by(known.astype(np.float64))
        return np.asarray(squares.sum(axis=1))

    def _spread_by(self, values: Float) -> None:
        # Chan's update: summing squares and subtracting the mean at the end would cancel digits.
        mean = float(values.mean())
        shift = mean - self._mean
        total = self._count + values.size
        self.spread += float(np.sum(np.square(values - mean))) + shift * shift * self._count * values.size / total
        self._mean += shift * values.size / total
        self._count = total


class TaskFidelity:
    """Sums of an output's measure, batch after batch."""

    def __init__(self, task: OutputTask) -> None:
        self._task = task
        self._count = 0
        self._agreed = 0
        self._nats = self._softened = 0.0
        self._temperature: float | None = None
        self._cosines = 0.0
        self._samples = 0
        self._sum = self._squares = 0.0

    def add(self, student: Array, teacher: Array) -> None:
        """Take in one batch; nothing is learnt from outputs that are numbers."""
        if self._task.task is Task.REGRESSION:
            return
        ours, theirs = (_vectors(values, self._task.axis) for values in (student, teacher))
        self._count += len(theirs)
        if self._temperature is None and self._task.task is Task.CLASSIFICATION:
            self._temperature = fitting_temperature(theirs, -1, self._task.form)
        parts = [self._add(ours[rows], theirs[rows]) for rows in _chunks(len(theirs), theirs.shape[1])]
        if parts:
            self._by_sample(np.concatenate(parts), len(teacher))

    def _by_sample(self, found: Float, samples: int) -> None:
        """Take in the measure of each vector; those of one sample stand together."""
        means = found.reshape(samples, -1).mean(axis=1)
        self._samples += samples
        self._sum += float(means.sum())
        self._squares += float(np.square(means).sum())

    def _interval(self) -> Interval | None:
        if self._task.task is Task.CLASSIFICATION and self._samples == self._count:
            return of_part(self._agreed / self._count, self._count)
        return of_mean(self._sum, self._squares, self._samples)

    def _add(self, student: Array, teacher: Array) -> Float:
        """The measure of each vector: its cosine, or 1 where its class is the teacher's."""
        if self._task.task is Task.EMBEDDING:
            ours, theirs = student.astype(np.float64), teacher.astype(np.float64)
            product = (ours * theirs).sum(axis=1)
            norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
            cosines = product / np.maximum(norms, _LEAST)
            self._cosines += float(np.sum(cosines))
            return np.asarray(cosines)
        agreed = top_class(student) == top_class(teacher)
        self._agreed += int(np.sum(agreed))
        probabilities = self._task.form is Form.PROBABILITIES
        self._nats += nats(student, teacher, probabilities=probabilities)
        self._softened += nats(student, teacher, probabilities=probabilities, temperature=self._temperature or 1.0)
        return np.asarray(agreed, dtype=np.float64)

    def result(self, squares: Fidelity) -> OutputFidelity:
        """Everything so far, with the squared error that was summed beside it."""
        nmse, name = ratio(squares.error, squares.spread), str(self._task)
        if not self._count:
            return OutputFidelity(name, nmse=nmse, interval=squares.interval())
        told = self._interval()
        if self._task.task is Task.EMBEDDING:
            cosine = _or_worst(self._cosines / self._count, -1.0)
            return OutputFidelity(name, cosine=cosine, nmse=nmse, interval=told)
        kl, softened = (_or_worst(max(0.0, found) / self._count, math.inf) for found in (self._nats, self._softened))
        return OutputFidelity(name, self._agreed / self._count, kl, nmse=nmse, softened_kl=softened, interval=told)


def ratio(error: float, spread: float) -> float:
    """Error over spread; a constant output is met exactly (0) or not at all (inf)."""
    if error == 0:
        return 0.0
    return error / spread if spread > 0 else math.inf


def top_class(scores: Array) -> NDArray[np.int64]:
    """The class with the largest score; -1, which is no class, where a score is NaN."""
    top = np.argmax(scores, axis=1).astype(np.int64)
    top[np.isnan(scores).any(axis=1)] = -1
    return np.asarray(top)


def _vectors(values: Array, axis: int) -> Array:
    """Vectors along an axis, (vectors, length)."""
    last = np.moveaxis(values, axis, -1)
    return last.reshape(math.prod(last.shape[:-1]), last.shape[-1])


def _chunks(rows: int, each: int) -> Iterator[slice]:
    """All rows, so many at a time that what is computed of them stays in a core's cache."""
    step = max(1, _CHUNK_NUMBERS // max(1, each))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


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


def _or_worst(value: float, worst: float) -> float:
    return worst if math.isnan(value) else value
