"""`evaluate`: how good a model is on data, by labels or beside its teacher."""

from __future__ import annotations

from pathlib import Path

from ndonnx.config.recipe import Recipe
from ndonnx.data import input_specs, is_made_up, open_source
from ndonnx.graph import load
from ndonnx.metrics.evaluation import Evaluation
from ndonnx.metrics.evaluation import evaluate as measure
from ndonnx.runtime.progress import Progress
from ndonnx.teacher import make_session
from ndonnx.teacher.synthetic_inputs import settings_for
from ndonnx.teacher.trying import hold_if_mixed


def evaluate(
    model: str | Path,
    data: str,
    *,
    teacher: str | Path | None = None,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Accuracy where the data has labels; agreement and error where there is a teacher.

    Raises:
        UsageError: a model or the data cannot be read, or they do not fit each other.
    """
    recipe = recipe or Recipe()
    session = make_session(Path(model))
    graph = load(model).graph if is_made_up(data) else None
    settings = recipe.model_inputs if graph is None else settings_for(data, session, graph, recipe)
    source = open_source(data, input_specs(session), recipe.data, seed=recipe.seed, graph=graph, settings=settings)
    hold_if_mixed(session, source)
    return measure(model, source, teacher=teacher, progress=progress)
