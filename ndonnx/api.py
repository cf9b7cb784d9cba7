"""The smaller verbs of the public API: what `inspect`, `evaluate` and the timing of `demo` show, from Python.

Nothing here needs torch, which takes seconds to import, but `inspect` with `check`: `compress` lives in
`ndonnx.pipeline`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndonnx.benchmark import Latency, Ratio, made_up_feeds, ratio
from ndonnx.benchmark import benchmark as time_models
from ndonnx.data import input_specs, open_source
from ndonnx.errors import DataError
from ndonnx.evaluate import Evaluation
from ndonnx.evaluate import evaluate as measure
from ndonnx.graph import fold_constants, load
from ndonnx.partition import Partition
from ndonnx.partition import partition as partition_graph
from ndonnx.progress import Progress
from ndonnx.recipe import Recipe
from ndonnx.report.inspection import Inspection
from ndonnx.teacher import make_session


def partition(model: str | Path, recipe: Recipe | None = None) -> Partition:
    """The neighbourhoods of a model, in order, with what each holds and why it would be kept.

    Raises:
        UsageError: the model cannot be read, or the recipe names values that it does not have.
    """
    recipe = recipe or Recipe()
    working = fold_constants(load(model))
    return partition_graph(working, granularity=recipe.granularity, cut=recipe.cut, freeze=recipe.freeze)


def inspect(
    model: str | Path,
    recipe: Recipe | None = None,
    *,
    check: bool = False,
    data: str | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """The partition of a model as plain data: numbers and names, a JSON document, a drawing.

    Args:
        model: path of the model.
        recipe: how it is partitioned, and what `check` shrinks by.
        check: also take every neighbourhood through the gates that a distillation has before it trains;
            one that does not pass is kept, and its reason names the operator.
        data: source of the few samples that `check` runs on. None: made up.
        progress: told what `check` does.

    Raises:
        UsageError: as `partition`; with `check`, the data do not fit the model.
    """
    parts = partition(model, recipe)
    if not check:
        return Inspection.of(str(model), parts)

    from ndonnx.check import check as pass_gates  # noqa: PLC0415 - needs torch

    checked = pass_gates(Path(model), parts, recipe or Recipe(), data=data, progress=progress)
    return Inspection.of(str(model), checked.parts, checked.parity)


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
    source = open_source(data, input_specs(make_session(Path(model))), recipe.data, seed=recipe.seed)
    return measure(model, source, teacher=teacher, progress=progress)


@dataclass(frozen=True)
class Speed:
    """Times of a model, and of the one that it was compared with in alternating runs."""

    batch_size: int
    """Samples in every run."""
    model: Latency
    against: Latency | None
    ratio: Ratio | None
    """Time of the model over that of the other one."""

    def to_json(self) -> dict[str, Any]:
        """As one JSON document, without the single times."""
        document = asdict(self)
        for latency in (document["model"], document["against"]):
            if latency is not None:
                del latency["times_ms"]
        return document


def benchmark(
    model: str | Path,
    *,
    against: str | Path | None = None,
    data: str | None = None,
    recipe: Recipe | None = None,
    batch_size: int = 1,
    rounds: int = 50,
) -> Speed:
    """Time a model in onnxruntime, alone or in turn with another one that has the same inputs.

    Args:
        model: path of the model.
        against: path of what to compare with.
        data: source of the one batch that every run gets. None: made up.
        recipe: says how the data become inputs.
        batch_size: samples in that batch, where the model leaves it open and there is data.
        rounds: timed runs of each model.

    Raises:
        UsageError: a model or the data cannot be read, or they do not fit each other.
    """
    feeds = _one_batch(model, data, recipe or Recipe(), batch_size)
    models = {"model": model} if against is None else {"model": model, "against": against}
    times = time_models(models, feeds, rounds=rounds)
    other = times.get("against")
    return Speed(
        batch_size=next((len(value) for value in feeds.values() if value.ndim), 1),
        model=times["model"],
        against=other,
        ratio=None if other is None else ratio(times["model"], other),
    )


def _one_batch(model: str | Path, data: str | None, recipe: Recipe, batch_size: int) -> dict[str, NDArray[np.generic]]:
    specs = input_specs(make_session(Path(model)))
    if data is None:
        return made_up_feeds(specs)
    fixed = [spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], int)]
    size = fixed[0] if fixed else batch_size
    source = open_source(data, specs, recipe.data, seed=recipe.seed)
    batch = next(iter(source.batches(size, samples=size)), None)
    if batch is None or len(batch) < size:
        raise DataError(f"{data}: expected a batch of {size} samples to time, found {len(batch) if batch else 0}")
    return batch.inputs
