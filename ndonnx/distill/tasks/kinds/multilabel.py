"""Probabilities that do not exclude each other: maps of a detector, a voice detector's answers, tags of a picture."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ndonnx.distill.tasks.base import Output, OutputTask, Recognised, TaskKind, TrainedOutput
from ndonnx.distill.tasks.fidelity import Fidelity, Measure, OutputFidelity, or_worst
from ndonnx.distill.tasks.intervals import Interval, of_mean

if TYPE_CHECKING:
    from ndonnx.distill.losses import Objective

Array = NDArray[Any]

_DECIDED = 0.5
"""Most that is left of a coin's variance, m (1 - m), of numbers that are answers; boxes over a picture leave more."""
_LEAST = 1e-6
"""Least probability of either answer whose logarithm is taken."""


class Multilabel(TaskKind):
    """Trained by the divergence of each number's two answers, compared by the part of equal answers."""

    name = "multilabel"

    @classmethod
    def recognise(cls, output: Output) -> Recognised | None:
        """Numbers from 0 to 1, on both sides of a half, most of them near an end."""
        values = output.values[np.isfinite(output.values)].astype(np.float64)
        if not values.size or values.min() < 0 or values.max() > 1:
            return None
        mean, left = values.mean(), (values * (1 - values)).mean()
        answers = values.min() < 0.5 < values.max() and left < _DECIDED * mean * (1 - mean)
        return Recognised(OutputTask(cls), by_values=False) if answers else None

    @classmethod
    def objective(cls, task: OutputTask, output: TrainedOutput) -> Objective:
        from ndonnx.distill.losses import MultilabelLoss  # noqa: PLC0415 - needs torch, which no comparison does

        mean = float(np.clip(output.rows.astype(np.float64), 0, 1).mean())
        constant = binary_nats(np.full(output.rows.shape, mean), output.rows)
        return MultilabelLoss(output.name, float(constant.mean()) or 1.0, _LEAST)

    @classmethod
    def measure_of(cls, task: OutputTask) -> Measure:
        return _AnswersMeasure(str(task))


def binary_nats(student: Array, teacher: Array) -> NDArray[np.float64]:
    """Kullback-Leibler divergence of each number's two answers from the teacher's, in nats, of the shape of both."""
    ours, theirs = (np.clip(values.astype(np.float64), _LEAST, 1 - _LEAST) for values in (student, teacher))
    yes = theirs * (np.log(theirs) - np.log(ours))
    return np.asarray(yes + (1 - theirs) * (np.log1p(-theirs) - np.log1p(-ours)))


class _AnswersMeasure(Measure):
    """How many answers are the teacher's, and their divergence."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._samples = 0
        self._agreed = self._squares = self._nats = 0.0

    def add(self, student: Array, teacher: Array) -> None:
        shape = len(teacher), max(1, math.prod(teacher.shape[1:]))
        ours, theirs = (values.reshape(shape) for values in (student, teacher))
        agreed = ((ours > 0.5) == (theirs > 0.5)).mean(axis=1, dtype=np.float64)
        self._samples += len(theirs)
        self._agreed += float(agreed.sum())
        self._squares += float(np.square(agreed).sum())
        self._nats += sum(float(binary_nats(a, b).mean()) for a, b in zip(ours, theirs, strict=True))

    def result(self, squares: Fidelity) -> OutputFidelity:
        if not self._samples:
            return OutputFidelity(self.name, nmse=squares.nmse, interval=squares.interval())
        nats = or_worst(self._nats / self._samples, math.inf)
        agreement = self._agreed / self._samples
        return OutputFidelity(
            self.name, agreement, nats, nmse=squares.nmse, softened_kl=nats, interval=self._interval()
        )

    def _interval(self) -> Interval | None:
        return of_mean(self._agreed, self._squares, self._samples)
