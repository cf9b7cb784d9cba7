"""What an output means, and so whether two answers can agree: the one place that decides it.

A top class is told of class scores only. That an output has the shape of class scores, (samples, classes), says little:
embeddings, boxes and regressions have it too. So something else has to speak for it: a softmax at the end, labels, or
the output's own name.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_SCORES_RANK = 2
"""Rank of class scores: (samples, classes)."""
_NAMES = re.compile(r"logits?(?![a-z])|softmax", re.IGNORECASE)
"""Names that exporters give to class scores and to nothing else."""
_SUM = 1e-2
"""How far the sum of a sample's probabilities, rounded in float16, may be from 1."""
_NORM = 1e-3
"""How far the norm of a normalised embedding may be from 1."""


class Task(enum.Enum):
    """What the values of an output are."""

    CLASSIFICATION = "classification"
    """Scores of classes that exclude each other, as logits, probabilities or their logarithms."""
    EMBEDDING = "embedding"
    """Vectors of unit norm."""
    REGRESSION = "regression"
    """Numbers of which nothing else is known; they are compared by their error."""


def task_of(name: str, values: Array, samples: int, *, labelled: bool = False) -> Task:
    """What an output means, as far as can be known.

    Args:
        name: of the output.
        values: the teacher's answers to some samples.
        samples: how many.
        labelled: whether the data hold a class for each sample.
    """
    if not has_shape_of_scores(values, samples):
        return Task.REGRESSION
    rows = values[np.isfinite(values).all(axis=1)].astype(np.float64)
    if len(rows) and (are_probabilities(rows) or _are_log_probabilities(rows)):
        return Task.CLASSIFICATION
    if len(rows) and np.allclose(np.linalg.norm(rows, axis=1), 1, atol=_NORM):
        return Task.EMBEDDING
    return Task.CLASSIFICATION if labelled or _NAMES.search(name) else Task.REGRESSION


def class_scores(outputs: Mapping[str, Array], samples: int, *, labelled: bool = False) -> str | None:
    """The name of the first output that holds class scores; None where none is known to.

    Args:
        outputs: the teacher's answers to some samples, by name.
        samples: how many.
        labelled: whether the data hold a class for each sample.
    """
    tasks = ((name, task_of(name, values, samples, labelled=labelled)) for name, values in outputs.items())
    return next((name for name, task in tasks if task is Task.CLASSIFICATION), None)


def doubt(outputs: Mapping[str, Array], samples: int, *, labelled: bool = False) -> str | None:
    """One line where an output might hold class scores and is taken for numbers; None where there is no such output."""
    if class_scores(outputs, samples, labelled=labelled) is not None:
        return None
    for name, values in outputs.items():
        if has_shape_of_scores(values, samples) and task_of(name, values, samples) is Task.REGRESSION:
            return (
                f"output '{name}' is taken for numbers and compared by its error; if it holds class scores, give data "
                "with labels, or export the model with a softmax at its end"
            )
    return None


def has_shape_of_scores(values: Array, samples: int) -> bool:
    """Whether answers to so many samples are floats of shape (samples, classes), with at least 2 classes."""
    return values.dtype.kind == "f" and values.ndim == _SCORES_RANK and len(values) == samples and values.shape[1] > 1


def are_probabilities(scores: Array) -> bool:
    """Whether class scores come out of a softmax."""
    values = scores.astype(np.float64)
    return bool(np.all(values >= 0) and np.allclose(values.sum(axis=1), 1, atol=_SUM))


def _are_log_probabilities(rows: NDArray[np.float64]) -> bool:
    return bool(np.all(rows <= _SUM) and np.allclose(np.exp(rows).sum(axis=1), 1, atol=_SUM))
