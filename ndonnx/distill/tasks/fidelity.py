"""How near a student's outputs are to the teacher's, each in the measure of its task."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndonnx.distill.tasks.intervals import Interval, of_mean
from ndonnx.distill.tasks.scores import vectors
from ndonnx.errors import UsageError

Array = NDArray[Any]
Float = NDArray[np.float64]

_CHUNK_NUMBERS = 2**16
"""Numbers of an output, about, that are compared at a time."""


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
    """As `kl`, of classes softened as for distillation (see `ndonnx.distill.tasks.scores`): what few
    samples tell of a student, in which a single confident mistake does not outweigh all others."""
    interval: Interval | None = None
    """95% confidence interval of the measure of its task: of `agreement`, `cosine`, the distance or `nmse`. Samples are
    taken to be independent, the positions of one sample are not. None where there are too few."""
    distances: Mapping[str, float] = field(default_factory=dict)
    """Mean distance from the teacher in the measure that the task's kind declares, by its name: 0 is the same."""

    @property
    def loss(self) -> float:
        """One figure by which students are compared, less is better: softened divergence, one minus the cosine, the
        distance, or the NMSE."""
        if self.softened_kl is not None:
            return self.softened_kl
        if self.distances:
            return sum(self.distances.values())
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

    @property
    def nmse(self) -> float:
        """Error over spread."""
        return ratio(self.error, self.spread)

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


class Measure(ABC):
    """Sums of an output's measure, batch after batch."""

    @abstractmethod
    def add(self, student: Array, teacher: Array) -> None:
        """Take in one batch, the samples along the first axis."""

    @abstractmethod
    def result(self, squares: Fidelity) -> OutputFidelity:
        """Everything so far, with the squared error that was summed beside it."""


class SquaredError(Measure):
    """Of numbers of which nothing else is known: what is summed beside it is all."""

    def __init__(self, name: str) -> None:
        """Of an output with a task of this name."""
        self.name = name

    def add(self, student: Array, teacher: Array) -> None:
        """Nothing is learnt from a batch."""

    def result(self, squares: Fidelity) -> OutputFidelity:
        return OutputFidelity(self.name, nmse=squares.nmse, interval=squares.interval())


class VectorMeasure(Measure):
    """A number for each vector along an axis, of which the mean over all vectors is told."""

    def __init__(self, name: str, axis: int) -> None:
        """Of an output with a task of this name, whose vectors lie along an axis."""
        self.name = name
        self._axis = axis
        self.count = 0
        """Vectors so far."""
        self._samples = 0
        self._sum = self._squares = 0.0

    @abstractmethod
    def of_vectors(self, student: Array, teacher: Array) -> Float:
        """The measure of each vector, (vectors,), of (vectors, length)."""

    @abstractmethod
    def told(self, squares: Fidelity) -> OutputFidelity:
        """What there is to tell of at least one vector, without its interval."""

    def start(self, teacher: Array) -> None:
        """Look at all vectors of a batch before they are measured; by default at nothing."""

    def add(self, student: Array, teacher: Array) -> None:
        ours, theirs = (vectors(values, self._axis) for values in (student, teacher))
        self.count += len(theirs)
        self.start(theirs)
        parts = [self.of_vectors(ours[rows], theirs[rows]) for rows in _chunks(len(theirs), theirs.shape[1])]
        if parts:
            self._by_sample(np.concatenate(parts), len(teacher))

    def _by_sample(self, found: Float, samples: int) -> None:
        """Take in the measure of each vector; those of one sample stand together."""
        means = found.reshape(samples, -1).mean(axis=1)
        self._samples += samples
        self._sum += float(means.sum())
        self._squares += float(np.square(means).sum())

    @property
    def one_a_sample(self) -> bool:
        """Whether each sample has one vector."""
        return self._samples == self.count

    def interval(self) -> Interval | None:
        """95% confidence interval of the mean over the samples."""
        return of_mean(self._sum, self._squares, self._samples)

    def result(self, squares: Fidelity) -> OutputFidelity:
        if not self.count:
            return OutputFidelity(self.name, nmse=squares.nmse, interval=squares.interval())
        return replace(self.told(squares), interval=self.interval())


class MeanDistance(Measure):
    """The mean over samples of a distance between student and teacher: 0 where both are the same."""

    def __init__(self, name: str, measure: str, distance: Callable[[Array, Array], Array]) -> None:
        """Of an output.

        Args:
            name: of its task.
            measure: what the distance is called.
            distance: of student and teacher, (samples, ...), one number for each sample, (samples,).
        """
        self.name = name
        self._measure = measure
        self._distance = distance
        self._samples = 0
        self._sum = self._squares = 0.0

    def add(self, student: Array, teacher: Array) -> None:
        found = np.asarray(self._distance(student, teacher), dtype=np.float64)
        if found.shape != (len(teacher),):
            raise UsageError(
                f"task {self.name}: {self._measure} gave shape {list(found.shape)} for {len(teacher)} samples; "
                "give one number for each"
            )
        self._samples += len(found)
        self._sum += float(found.sum())
        self._squares += float(np.square(found).sum())

    def result(self, squares: Fidelity) -> OutputFidelity:
        mean = or_worst(self._sum / max(1, self._samples), math.inf)
        told = of_mean(self._sum, self._squares, self._samples)
        return OutputFidelity(self.name, nmse=squares.nmse, interval=told, distances={self._measure: mean})


def ratio(error: float, spread: float) -> float:
    """Error over spread; a constant output is met exactly (0) or not at all (inf)."""
    if error == 0:
        return 0.0
    return error / spread if spread > 0 else math.inf


def _chunks(rows: int, each: int) -> Iterator[slice]:
    """All rows, so many at a time that what is computed of them stays in a core's cache."""
    step = max(1, _CHUNK_NUMBERS // max(1, each))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def or_worst(value: float, worst: float) -> float:
    """The value, or the worst one where it is none."""
    return worst if math.isnan(value) else value
