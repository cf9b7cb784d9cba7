"""Scores of classes that exclude each other, as logits, probabilities or their logarithms."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ndonnx.distill.tasks.base import Output, OutputTask, Recognised, TaskKind, TrainedOutput
from ndonnx.distill.tasks.fidelity import Fidelity, Measure, OutputFidelity, VectorMeasure, or_worst
from ndonnx.distill.tasks.intervals import Interval, of_part
from ndonnx.distill.tasks.scores import (
    LEAST_PROBABILITY,
    Form,
    are_log_probabilities,
    are_probabilities,
    finite_rows,
    fitting_temperature,
    nats,
    top_class,
)

if TYPE_CHECKING:
    from ndonnx.distill.losses import Objective

Array = NDArray[Any]

SCORES_RANK = 2
"""Rank of class scores of whole samples: (samples, classes)."""
_MAPS_RANK = 4
"""Rank of maps, (samples, channels, height, width), which may have their classes along the channels."""
_NAMES = re.compile(r"logits?(?![a-z])|softmax", re.IGNORECASE)
"""Names that exporters give to class scores and to nothing else."""


class Classification(TaskKind):
    """Trained by the softened divergence from the teacher's classes, compared by the part of equal first classes."""

    name = "classification"

    @classmethod
    def recognise(cls, output: Output) -> Recognised | None:
        """Probabilities, or their logarithms; where only labels or the name speak for it, it is likely."""
        values = output.values
        has_vectors = values.ndim >= SCORES_RANK and values.shape[-1] > 1
        found = cls._by_values(values, last=has_vectors)
        if found is not None:
            return Recognised(found)
        named = _NAMES.search(output.name) is not None
        likely = has_vectors and (named or (output.labelled and values.ndim == SCORES_RANK))
        return Recognised(OutputTask(cls), by_values=False) if likely else None

    @classmethod
    def told(cls, output: Output) -> OutputTask:
        return cls._by_values(output.values) or OutputTask(cls)

    @classmethod
    def _by_values(cls, values: Array, *, last: bool = True) -> OutputTask | None:
        """Probabilities or their logarithms, along the last axis or the channels of maps; None where there are none."""
        axes = [-1] if last else []
        if values.ndim >= _MAPS_RANK:
            axes.append(1)
        for axis in axes:
            if values.shape[axis] < 2:
                continue
            rows = finite_rows(values, axis)
            if len(rows) and are_probabilities(rows):
                return OutputTask(cls, axis, Form.PROBABILITIES)
            if len(rows) and are_log_probabilities(rows):
                return OutputTask(cls, axis, Form.LOG_PROBABILITIES)
        return None

    @classmethod
    def objective(cls, task: OutputTask, output: TrainedOutput) -> Objective:
        from ndonnx.distill.losses import DistillationLoss  # noqa: PLC0415 - needs torch, which no comparison does

        temperature = output.temperature or fitting_temperature(output.rows, task.axis, task.form)
        least = LEAST_PROBABILITY if task.form is Form.PROBABILITIES else None
        return DistillationLoss(output.name, temperature, output.label_weight, axis=task.axis, least_probability=least)

    @classmethod
    def measure_of(cls, task: OutputTask) -> Measure:
        return _ClassMeasure(task)

    @classmethod
    def words(cls, task: OutputTask) -> str:
        along = "" if task.axis == -1 else f" along axis {task.axis}"
        return f"{cls.name} ({task.form.value}{along})"


class _ClassMeasure(VectorMeasure):
    """How many classes are the teacher's, and their divergence."""

    def __init__(self, task: OutputTask) -> None:
        super().__init__(str(task), task.axis)
        self._form = task.form
        self._agreed = 0
        self._nats = self._softened = 0.0
        self._temperature: float | None = None

    def start(self, teacher: Array) -> None:
        if self._temperature is None:
            self._temperature = fitting_temperature(teacher, -1, self._form)

    def of_vectors(self, student: Array, teacher: Array) -> NDArray[np.float64]:
        """1 where the class is the teacher's."""
        agreed = top_class(student) == top_class(teacher)
        self._agreed += int(np.sum(agreed))
        probabilities = self._form is Form.PROBABILITIES
        self._nats += nats(student, teacher, probabilities=probabilities)
        self._softened += nats(student, teacher, probabilities=probabilities, temperature=self._temperature or 1.0)
        return np.asarray(agreed, dtype=np.float64)

    def interval(self) -> Interval | None:
        return of_part(self._agreed / self.count, self.count) if self.one_a_sample else super().interval()

    def told(self, squares: Fidelity) -> OutputFidelity:
        kl, softened = (or_worst(max(0.0, found) / self.count, math.inf) for found in (self._nats, self._softened))
        agreement = self._agreed / self.count
        return OutputFidelity(self.name, agreement, kl, nmse=squares.nmse, softened_kl=softened)
