"""Vectors of which only the direction counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ndonnx.distill.tasks.base import Output, OutputTask, Recognised, TaskKind, TrainedOutput
from ndonnx.distill.tasks.fidelity import Fidelity, Measure, OutputFidelity, VectorMeasure, or_worst
from ndonnx.distill.tasks.scores import finite_rows

if TYPE_CHECKING:
    from ndonnx.distill.losses import Objective

_NORM = 1e-3
"""How far the norm of a normalised embedding may be from 1."""
_LEAST = 1e-30
"""Least norms of two vectors, multiplied: a vector of zeros has no angle."""


class Embedding(TaskKind):
    """Trained by the angle to the teacher's vector and the squared error, compared by the cosine."""

    name = "embedding"

    @classmethod
    def recognise(cls, output: Output) -> Recognised | None:
        """Vectors of norm 1."""
        if output.values.ndim < 2 or output.values.shape[-1] < 2:
            return None
        rows = finite_rows(output.values, -1)
        if not len(rows) or not np.allclose(np.linalg.norm(rows, axis=1), 1, atol=_NORM):
            return None
        return Recognised(OutputTask(cls))

    @classmethod
    def objective(cls, task: OutputTask, output: TrainedOutput) -> Objective:
        from ndonnx.distill.losses import EmbeddingLoss  # noqa: PLC0415 - needs torch, which no comparison does

        return EmbeddingLoss(output.name, output.variance)

    @classmethod
    def measure_of(cls, task: OutputTask) -> Measure:
        return _CosineMeasure(str(task), task.axis)


class _CosineMeasure(VectorMeasure):
    """Cosine of the angle to the teacher's vector."""

    def __init__(self, name: str, axis: int) -> None:
        super().__init__(name, axis)
        self._cosines = 0.0

    def of_vectors(self, student: NDArray[Any], teacher: NDArray[Any]) -> NDArray[np.float64]:
        ours, theirs = student.astype(np.float64), teacher.astype(np.float64)
        product = (ours * theirs).sum(axis=1)
        norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        cosines = product / np.maximum(norms, _LEAST)
        self._cosines += float(np.sum(cosines))
        return np.asarray(cosines)

    def told(self, squares: Fidelity) -> OutputFidelity:
        return OutputFidelity(self.name, cosine=or_worst(self._cosines / self.count, -1.0), nmse=squares.nmse)
