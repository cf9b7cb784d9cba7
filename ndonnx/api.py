"""The smaller verbs of the public API: what `inspect` and `evaluate` show, from Python."""

from __future__ import annotations

from pathlib import Path

import ndonnx.evaluate as _evaluate
from ndonnx.data import input_specs, open_source
from ndonnx.graph import load
from ndonnx.partition import Partition
from ndonnx.pipeline import partition_model
from ndonnx.progress import Progress
from ndonnx.recipe import Recipe
from ndonnx.teacher import make_session


def partition(model: str | Path, recipe: Recipe | None = None) -> Partition:
    """The neighbourhoods of a model, in order, with what each holds and why it would be kept.

    Raises:
        UsageError: the model cannot be read, or the recipe names values that it does not have.
    """
    return partition_model(load(model), recipe or Recipe())


def evaluate(
    model: str | Path,
    data: str,
    *,
    teacher: str | Path | None = None,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
) -> _evaluate.Evaluation:
    """Accuracy where the data has labels; agreement and error where there is a teacher.

    Raises:
        UsageError: a model or the data cannot be read, or they do not fit each other.
    """
    recipe = recipe or Recipe()
    source = open_source(data, input_specs(make_session(Path(model))), recipe.data, seed=recipe.seed)
    return _evaluate.evaluate(model, source, teacher=teacher, progress=progress)
