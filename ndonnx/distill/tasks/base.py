"""The interface of a kind of task: how its outputs are recognised, trained and compared.

A kind is a class. Defining one registers it under its name, which `--task`, the recipe's `task` and reports then know.
"""

from __future__ import annotations

import inspect
from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ndonnx.distill.tasks.fidelity import MeanDistance, Measure
from ndonnx.distill.tasks.scores import Form

if TYPE_CHECKING:
    from torch import Tensor

    from ndonnx.distill.losses import Objective

Array = NDArray[Any]

REGISTERED: dict[str, type[TaskKind]] = {}
"""All kinds that have been defined, by name."""


@dataclass(frozen=True)
class Output:
    """What is known of an output before it is taken for anything."""

    name: str
    values: Array
    """The teacher's answers to some samples, floats (samples, ...)."""
    labelled: bool = False
    """Whether the data hold a class for each sample."""


@dataclass(frozen=True)
class OutputTask:
    """What one output means."""

    kind: type[TaskKind]
    axis: int = -1
    """Along which classes lie, or the numbers of a vector: the last, or 1 of maps."""
    form: Form = Form.LOGITS
    """Of class scores."""
    custom: str | None = None
    """`module:function` of the user's own loss."""

    def __str__(self) -> str:
        """In a few words: `classification (probabilities)`."""
        return self.custom or self.kind.words(self)

    @property
    def measure(self) -> Measure:
        """Empty sums of its measure."""
        return self.kind.measure_of(self)


@dataclass(frozen=True)
class Recognised:
    """What a kind makes of an output."""

    task: OutputTask
    by_values: bool = True
    """Whether the values themselves speak for it; what is only likely waits until all other kinds were asked."""


@dataclass(frozen=True)
class TrainedOutput:
    """What a loss is made of, beside the output's task."""

    name: str
    """Of the output; under it the loss finds the teacher's values."""
    rows: Array
    """The teacher's answers to some samples, floats (samples, ...)."""
    variance: float
    """Of the output; 1 where it is constant."""
    temperature: float | None = None
    """As the recipe says."""
    label_weight: float = 0.0
    """Part of the labels' own loss, 0 to 1, where there are labels for this output."""


class TaskKind(ABC):
    """A kind of task. A subclass has a `name`, and overrides what is not right for it.

    Attributes:
        name: as `--task` takes it.
        measure: what `distance` is called in reports and in `--require`; empty without one.
    """

    name: ClassVar[str]
    measure: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        """Register the kind under its name."""
        super().__init_subclass__()
        if not inspect.isabstract(cls):
            REGISTERED[cls.name] = cls

    @classmethod
    def recognise(cls, output: Output) -> Recognised | None:
        """What an output is taken for where the user does not say: None, by default, where it is not of this kind."""
        del output
        return None

    @classmethod
    def told(cls, output: Output) -> OutputTask:
        """The task of an output of which the user says that it is of this kind."""
        del output
        return OutputTask(cls)

    @staticmethod
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of a batch, a scalar, of float32 (samples, ...): by default the mean squared error."""
        return (student - teacher).square().mean()

    @staticmethod
    def distance(student: Array, teacher: Array) -> Array:
        """How far each sample is from the teacher's, (samples,), of (samples, ...): by default the squared error."""
        squares = np.square(student.astype(np.float64) - teacher)
        return np.asarray(squares.reshape(len(teacher), -1).mean(axis=1))

    @classmethod
    def objective(cls, task: OutputTask, output: TrainedOutput) -> Objective:
        """What is trained: by default `loss`, against the teacher's values."""
        del task
        return function_loss(output.name, cls.loss)

    @classmethod
    def measure_of(cls, task: OutputTask) -> Measure:
        """Empty sums of what is told of the output: by default the mean `distance`, and the NMSE beside it."""
        return MeanDistance(str(task), cls.measure or "distance", cls.distance)

    @classmethod
    def words(cls, task: OutputTask) -> str:
        """The task in a few words."""
        del task
        return cls.name


def function_loss(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> Objective:
    """A function of the student's and the teacher's tensors as what is trained."""
    from ndonnx.distill.losses import FunctionLoss  # noqa: PLC0415 - needs torch, which no comparison does

    return FunctionLoss(name, function)
