"""`evaluate`: how good a model is on data, by labels or beside its teacher, and whether that is what is required."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ndonnx.api.models import Model, placed
from ndonnx.api.settings import RecipeLike, recipe_of
from ndonnx.config.recipe import Recipe
from ndonnx.data import Data, DataSource, input_specs, is_made_up, open_source
from ndonnx.errors import UsageError
from ndonnx.graph import load
from ndonnx.graph.storage.files import file_bytes
from ndonnx.metrics.evaluation import Evaluation
from ndonnx.metrics.evaluation import evaluate as measure
from ndonnx.metrics.latency import PROCESSES, Plan, measure_beside, plan_for
from ndonnx.metrics.requirements import Measured, Requirement, read_requirements, verdicts_of
from ndonnx.report.junit import check_junit, write_junit
from ndonnx.report.summary import drop_of
from ndonnx.runtime.machine import usable_cores
from ndonnx.runtime.progress import Listener, Progress, listening
from ndonnx.teacher import make_session
from ndonnx.teacher.synthetic_inputs import settings_for
from ndonnx.teacher.trying import hold_if_mixed

_DIGITS = 12
"""Of a drop: the difference of two parts, 1 - 0.95, must not miss 5% by the rounding of its last bit."""


def evaluate(
    model: Model,
    data: Data,
    *,
    teacher: Model | None = None,
    require: Sequence[str] = (),
    junit: str | Path | None = None,
    threads: int | None = None,
    processes: int = PROCESSES,
    recipe: RecipeLike | None = None,
    progress: Listener | None = None,
    **settings: Any,
) -> Evaluation:
    """Measure a model on data: accuracy where the data has labels, agreement and error where there is a teacher.

    Args:
        model: path, `onnx.ModelProto` or `onnx_ir.Model`.
        data: a data source by name, an array (n, ...), a dict of arrays by input, or an iterable of samples or batches.
        teacher: what to compare with, as `model`, with the same inputs and outputs. None: nothing.
        require: what has to hold, each as `METRIC OP VALUE` with `>=`, `<=`, `>` or `<` and a number or a percentage:
            `agreement>=99%`, `latency<=0.6`. Metrics are `accuracy`, `agreement`, `cosine`, `divergence`, `error`,
            `max-error`, `metric` (the recipe's own), `drop`, and of the teacher's `latency` (median of one batch, timed
            in turn in new processes) and `size` in bytes. `cosine:OUTPUT>=0.98` is of one output; else the worst of
            several counts. See `Evaluation.requirements`.
        junit: file that the requirements are written to as JUnit XML, a test case for each. None: none.
        threads: inside one operator while `latency` is measured. None: the cores that this process may use.
        processes: in each of which both models are loaded and timed anew, at least 2.
        recipe: how the data become inputs, as a `Recipe`, its keys in a mapping, or the path of a TOML file.
        progress: who is told what goes on, as a `Progress` or a callable that takes an `Event`. None: the logger
            `ndonnx`.
        settings: keys of the recipe, laid over it, as `metric=my_module.my_function`.

    Raises:
        UsageError: a model or the data cannot be read, or they do not fit each other; or the recipe's `metric` fails;
            or a requirement is unknown, cannot hold, or is of something that is not told of this model.
    """
    began = time.perf_counter()
    chosen = recipe_of(recipe, settings)
    wanted = read_requirements(require, teacher=teacher is not None, metric=chosen.metric is not None)
    plan = Plan((1,), ("cpu",), usable_cores() if threads is None else threads, processes, memory=False)
    if junit is not None:
        if not wanted:
            raise UsageError(f"--junit {junit}: writes what became of requirements; give --require, or leave it out")
        check_junit(Path(junit))
    with ExitStack() as stack:
        place = stack.enter_context(placed(model))
        reference = None if teacher is None else stack.enter_context(placed(teacher)).path
        source = _opened(place.path, data, chosen)
        told = listening(progress)
        found = measure(place.path, source, teacher=reference, tasks=chosen.task, metric=chosen.metric, progress=told)
        if wanted:
            beside = _Beside(place.path, reference, source, chosen, plan, told)
            found = replace(found, requirements=verdicts_of(wanted, found, beside.measured(wanted, found)))
    if junit is not None:
        write_junit(Path(junit), place.name, found.requirements, time.perf_counter() - began)
    return found


def _opened(path: Path, data: Data, recipe: Recipe) -> DataSource:
    """The data, opened for a model."""
    session = make_session(path)
    graph = load(path).graph if is_made_up(data) else None
    inputs = recipe.model_inputs if graph is None else settings_for(data, session, graph, recipe)
    source = open_source(data, input_specs(session), recipe.data, seed=recipe.seed, graph=graph, settings=inputs)
    hold_if_mixed(session, source)
    return source


@dataclass(frozen=True)
class _Beside:
    """What requirements ask for beyond an evaluation: it takes the teacher's files and processes of their own."""

    model: Path
    teacher: Path | None
    source: DataSource
    recipe: Recipe
    plan: Plan
    progress: Progress

    def measured(self, wanted: Sequence[Requirement], found: Evaluation) -> dict[str, Measured]:
        """Values by the name of their measure, of those that are wanted only."""
        if self.teacher is None:
            return {}
        makers = {"drop": self._drop, "size": self._size, "latency": self._latency}
        asked = {requirement.measure for requirement in wanted}
        return {name: make(self.teacher, found) for name, make in makers.items() if name in asked}

    def _drop(self, teacher: Path, found: Evaluation) -> Measured:
        drop, _ = drop_of(found, measure(teacher, self.source, tasks=self.recipe.task))
        return Measured(round(drop, _DIGITS) if math.isfinite(drop) else drop)

    def _size(self, teacher: Path, found: Evaluation) -> Measured:
        return Measured(file_bytes(self.model) / file_bytes(teacher))

    def _latency(self, teacher: Path, found: Evaluation) -> Measured:
        models = {"student": self.model, "teacher": teacher}
        plan, feeds = plan_for(models, self.source, self.recipe.model_inputs, self.plan)
        ratio = measure_beside(models, "teacher", feeds, plan, self.progress)["student"].ratio
        assert ratio is not None
        return Measured(ratio.median, (ratio.low, ratio.high))
