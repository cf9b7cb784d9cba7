"""Numbers of which nothing else is known: what every output is taken for that nothing speaks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ndonnx.distill.tasks.base import OutputTask, TaskKind, TrainedOutput
from ndonnx.distill.tasks.fidelity import Measure, SquaredError

if TYPE_CHECKING:
    from ndonnx.distill.losses import Objective


class Regression(TaskKind):
    """Trained and compared by the squared error over the teacher's variance."""

    name = "regression"

    @classmethod
    def objective(cls, task: OutputTask, output: TrainedOutput) -> Objective:
        from ndonnx.distill.losses import RegressionLoss  # noqa: PLC0415 - needs torch, which no comparison does

        return RegressionLoss(output.name, output.variance)

    @classmethod
    def measure_of(cls, task: OutputTask) -> Measure:
        return SquaredError(str(task))
