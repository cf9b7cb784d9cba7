"""What an output means, and so which loss and which measure are right for it: the one place that decides it.

That an output has the shape of class scores says little: embeddings, boxes and regressions have it too. So something
else has to speak for it: answers that are probabilities, labels, the output's own name, or the user. Where nothing
does, an output is taken for numbers.
"""

from __future__ import annotations

import enum
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndonnx.data.user_code import import_function
from ndonnx.errors import RecipeError

Array = NDArray[Any]

_SCORES_RANK = 2
"""Rank of class scores of whole samples: (samples, classes)."""
_MAPS_RANK = 4
"""Rank of maps, (samples, channels, height, width), which may have their classes along the channels."""
_NAMES = re.compile(r"logits?(?![a-z])|softmax", re.IGNORECASE)
"""Names that exporters give to class scores and to nothing else."""
_SUM = 1e-2
"""How far the sum of a sample's probabilities, rounded in float16, may be from 1."""
_TEMPERATURES = (4.0, 3.0, 2.0, 1.5)
"""Usual in distillation, the softest first."""
_KNOWN = 0.5
"""Part of the first class's mean probability that is left at a temperature, at least."""
_LEAST_PROBABILITY = 1e-30
"""What is less is taken for this before its logarithm."""
_MOST_ROWS = 2048
"""Vectors by which an output is told; more say nothing else."""
_NORM = 1e-3
"""How far the norm of a normalised embedding may be from 1."""


class Task(enum.Enum):
    """What the values of an output are."""

    CLASSIFICATION = "classification"
    """Scores of classes that exclude each other, as logits, probabilities or their logarithms."""
    EMBEDDING = "embedding"
    """Vectors of which only the direction counts."""
    REGRESSION = "regression"
    """Numbers of which nothing else is known; they are compared by their error."""


class Form(enum.Enum):
    """How class scores are written."""

    LOGITS = "logits"
    PROBABILITIES = "probabilities"
    LOG_PROBABILITIES = "log-probabilities"


@dataclass(frozen=True)
class OutputTask:
    """What one output means."""

    task: Task
    axis: int = -1
    """Along which classes lie, or the numbers of a vector: the last, or 1 of maps."""
    form: Form = Form.LOGITS
    """Of class scores."""
    custom: str | None = None
    """`module:function` of the user's own loss."""

    def __str__(self) -> str:
        """In a few words: `classification (probabilities)`."""
        if self.custom is not None:
            return self.custom
        along = "" if self.axis == -1 else f" along axis {self.axis}"
        form = f" ({self.form.value}{along})" if self.task is Task.CLASSIFICATION else ""
        return f"{self.task.value}{form}"


def tasks_of(
    outputs: Mapping[str, Array], samples: int, *, labelled: bool = False, told: Sequence[str] = ()
) -> dict[str, OutputTask]:
    """What each float output with samples along its first axis means.

    Args:
        outputs: the teacher's answers to some samples, by name.
        samples: how many.
        labelled: whether the data hold a class for each sample.
        told: what the user says, as `--task` takes it: `embedding` of all outputs, `boxes=regression` of one;
            `module:function` is a loss of the user's own.

    Raises:
        RecipeError: the user speaks of an output that there is not.
    """
    given = _told(told, outputs)
    found = {}
    for name, values in outputs.items():
        if values.dtype.kind != "f" or not values.ndim or len(values) != samples:
            continue
        said = given.get(name, given.get(None, "auto"))
        found[name] = _as_told(said, values) if said != "auto" else _by_values(name, values, labelled=labelled)
    return found


def check_told(told: Sequence[str], outputs: Sequence[str]) -> None:
    """Refuse what the user says of outputs, before anything is run.

    Args:
        told: as `--task` takes it.
        outputs: names of the model's.

    Raises:
        RecipeError: there is no such output, or no such loss.
    """
    for kind in _told(told, outputs).values():
        if ":" in kind:
            import_function(kind, os.getcwd(), RecipeError)


def _told(told: Sequence[str], outputs: Collection[str]) -> dict[str | None, str]:
    found: dict[str | None, str] = {}
    for each in told:
        name, _, kind = each.rpartition("=")
        if name and name not in outputs:
            raise RecipeError(f"--task {each}: the model has no output '{name}'; it has {', '.join(outputs)}")
        found[name or None] = kind
    return found


def _as_told(said: str, values: Array) -> OutputTask:
    if ":" in said:
        return OutputTask(Task.REGRESSION, custom=said)
    task = Task(said)
    return _scores(values) or OutputTask(task) if task is Task.CLASSIFICATION else OutputTask(task)


def _by_values(name: str, values: Array, *, labelled: bool) -> OutputTask:
    if values.ndim < _SCORES_RANK or values.shape[-1] < 2:
        return _scores(values, last=False) or OutputTask(Task.REGRESSION)
    found = _scores(values)
    if found is not None:
        return found
    rows = _finite_rows(values, -1)
    if len(rows) and np.allclose(np.linalg.norm(rows, axis=1), 1, atol=_NORM):
        return OutputTask(Task.EMBEDDING)
    named = _NAMES.search(name) is not None
    known = named or (labelled and values.ndim == _SCORES_RANK)
    return OutputTask(Task.CLASSIFICATION if known else Task.REGRESSION)


def _scores(values: Array, *, last: bool = True) -> OutputTask | None:
    """Probabilities or their logarithms, along the last axis or the channels of maps; None where there are none."""
    axes = [-1] if last else []
    if values.ndim >= _MAPS_RANK:
        axes.append(1)
    for axis in axes:
        if values.shape[axis] < 2:
            continue
        rows = _finite_rows(values, axis)
        if len(rows) and are_probabilities(rows):
            return OutputTask(Task.CLASSIFICATION, axis, Form.PROBABILITIES)
        if len(rows) and _are_log_probabilities(rows):
            return OutputTask(Task.CLASSIFICATION, axis, Form.LOG_PROBABILITIES)
    return None


def _finite_rows(values: Array, axis: int) -> NDArray[np.float64]:
    """Vectors along an axis that hold no NaN or Inf, (rows, length)."""
    last = np.moveaxis(values, axis, -1)
    rows = last.reshape(math.prod(last.shape[:-1]), last.shape[-1])
    rows = rows[:: -(-len(rows) // _MOST_ROWS) or 1]
    return rows[np.isfinite(rows).all(axis=1)].astype(np.float64)


def fitting_temperature(scores: Array, axis: int, form: Form) -> float:
    """The highest usual temperature at which the teacher still knows its first class.

    Softening shows how the other classes compare. Of thousands of classes it soon shows nothing else: at 4, all
    characters that a reader of text has ruled out together outweigh the one that it has read.

    Args:
        scores: the teacher's.
        axis: along which its classes lie.
        form: how they are written.
    """
    rows = _finite_rows(scores, axis)
    if not len(rows):
        return 1.0
    logits = np.log(np.maximum(rows, _LEAST_PROBABILITY)) if form is Form.PROBABILITIES else rows
    first = _first_class(logits, 1.0)
    return next((t for t in _TEMPERATURES if _first_class(logits, t) >= _KNOWN * first), 1.0)


def _first_class(logits: NDArray[np.float64], temperature: float) -> float:
    """Mean probability of the first class at a temperature."""
    above = (logits - logits.max(axis=1, keepdims=True)) / temperature
    return float((1 / np.exp(above).sum(axis=1)).mean())


def task_of(name: str, values: Array, samples: int, *, labelled: bool = False) -> Task:
    """What an output means, as far as can be known without the user's word; see `tasks_of`."""
    found = tasks_of({name: values}, samples, labelled=labelled).get(name)
    return Task.REGRESSION if found is None else found.task


def class_scores(
    outputs: Mapping[str, Array], samples: int, *, labelled: bool = False, told: Sequence[str] = ()
) -> str | None:
    """The name of the first output that holds class scores of whole samples; None where none is known to.

    Args:
        outputs: the teacher's answers to some samples, by name.
        samples: how many.
        labelled: whether the data hold a class for each sample.
        told: what the user says of them, see `tasks_of`.
    """
    tasks = tasks_of(outputs, samples, labelled=labelled, told=told)
    scores = (name for name, found in tasks.items() if found.task is Task.CLASSIFICATION)
    return next((name for name in scores if has_shape_of_scores(outputs[name], samples)), None)


def doubt(
    outputs: Mapping[str, Array], samples: int, *, labelled: bool = False, told: Sequence[str] = ()
) -> str | None:
    """One line where an output might hold class scores and is taken for numbers; None where there is no such output,
    or the user says what they are."""
    if told or class_scores(outputs, samples, labelled=labelled) is not None:
        return None
    for name, values in outputs.items():
        if has_shape_of_scores(values, samples) and task_of(name, values, samples) is Task.REGRESSION:
            return (
                f"output '{name}' is taken for numbers and compared by its error; if it holds class scores, say "
                f"--task {name}=classification, give data with labels, or export the model with a softmax at its end"
            )
    return None


def has_shape_of_scores(values: Array, samples: int) -> bool:
    """Whether answers to so many samples are floats of shape (samples, classes), with at least 2 classes."""
    return values.dtype.kind == "f" and values.ndim == _SCORES_RANK and len(values) == samples and values.shape[1] > 1


def are_probabilities(scores: Array) -> bool:
    """Whether class scores, (rows, classes), come out of a softmax."""
    values = scores.astype(np.float64)
    return bool(np.all(values >= 0) and np.allclose(values.sum(axis=1), 1, atol=_SUM))


def _are_log_probabilities(rows: NDArray[np.float64]) -> bool:
    return bool(np.all(rows <= _SUM) and np.allclose(np.exp(rows).sum(axis=1), 1, atol=_SUM))
