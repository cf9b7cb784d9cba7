"""`evaluate`: how good a model is on data, by labels or beside its teacher."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from ndonnx.api.models import Model, placed
from ndonnx.api.settings import RecipeLike, recipe_of
from ndonnx.data import Data, input_specs, is_made_up, open_source
from ndonnx.graph import load
from ndonnx.metrics.evaluation import Evaluation
from ndonnx.metrics.evaluation import evaluate as measure
from ndonnx.runtime.progress import Listener, listening
from ndonnx.teacher import make_session
from ndonnx.teacher.synthetic_inputs import settings_for
from ndonnx.teacher.trying import hold_if_mixed


def evaluate(
    model: Model,
    data: Data,
    *,
    teacher: Model | None = None,
    recipe: RecipeLike | None = None,
    progress: Listener | None = None,
    **settings: Any,
) -> Evaluation:
    """Measure a model on data: accuracy where the data has labels, agreement and error where there is a teacher.

    Args:
        model: path, `onnx.ModelProto` or `onnx_ir.Model`.
        data: a data source by name, an array (n, ...), a dict of arrays by input, or an iterable of samples or batches.
        teacher: what to compare with, as `model`, with the same inputs and outputs. None: nothing.
        recipe: how the data become inputs, as a `Recipe`, its keys in a mapping, or the path of a TOML file.
        progress: who is told what goes on, as a `Progress` or a callable that takes an `Event`. None: the logger
            `ndonnx`.
        settings: keys of the recipe, laid over it, as `metric=my_module.my_function`.

    Raises:
        UsageError: a model or the data cannot be read, or they do not fit each other; or the recipe's `metric` fails.
    """
    chosen = recipe_of(recipe, settings)
    with ExitStack() as stack:
        path = stack.enter_context(placed(model)).path
        reference = None if teacher is None else stack.enter_context(placed(teacher)).path
        session = make_session(path)
        graph = load(path).graph if is_made_up(data) else None
        inputs = chosen.model_inputs if graph is None else settings_for(data, session, graph, chosen)
        source = open_source(data, input_specs(session), chosen.data, seed=chosen.seed, graph=graph, settings=inputs)
        hold_if_mixed(session, source)
        told = listening(progress)
        return measure(path, source, teacher=reference, tasks=chosen.task, metric=chosen.metric, progress=told)
