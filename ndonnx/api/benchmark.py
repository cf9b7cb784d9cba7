"""`benchmark`: how fast a model is in onnxruntime, and how much it weighs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from ndonnx.api.models import Model, Placed, placed
from ndonnx.api.settings import RecipeLike, recipe_of
from ndonnx.assemble.quantise_pieces import how_executed
from ndonnx.config.recipe import Recipe
from ndonnx.data import Data, DataSource, InputSpec, input_specs, open_source
from ndonnx.data.inputs import interface_of, settle
from ndonnx.data.split import draw
from ndonnx.data.synthetic import made_up_samples
from ndonnx.errors import DataError
from ndonnx.graph import load
from ndonnx.graph.bound import one_sample
from ndonnx.metrics.baselines import CALIBRATION, Baselines, Comparison, Material
from ndonnx.metrics.evaluation import Batching, Evaluation
from ndonnx.metrics.evaluation import evaluate as measure
from ndonnx.metrics.latency import AGAINST, MODEL, PROCESSES, Plan, common_batch_size, feeds_for
from ndonnx.metrics.latency import measure as measure_speed
from ndonnx.report.speed import ModelSize, Speed, check_picture
from ndonnx.runtime.machine import usable_cores
from ndonnx.runtime.progress import Listener, Progress, listening
from ndonnx.teacher import make_session
from ndonnx.teacher.synthetic_inputs import settings_for
from ndonnx.teacher.trying import hold_if_mixed

_CHOSEN_ON = 256
"""Samples by which the calibration of a baseline is chosen."""


def benchmark(
    model: Model,
    *,
    against: Model | None = None,
    data: Data | None = None,
    recipe: RecipeLike | None = None,
    batch_sizes: Sequence[int] = (1, 8, 32),
    providers: Sequence[str] = ("cpu",),
    threads: int | None = None,
    processes: int = PROCESSES,
    rounds: int | None = None,
    samples: int | None = None,
    memory: bool = True,
    picture: str | Path | None = None,
    progress: Listener | None = None,
    **settings: Any,
) -> Speed:
    """Time a model in onnxruntime, alone or in turn with another one that has the same inputs.

    The recipe's `baselines` (`baselines="int8,fp16"`) are made of `against`, or else of the model, and stand beside
    both at the first batch size; ranges, the choice of a calibration and fidelity are had on other rows each.
    Everything is loaded and timed anew in several processes. Where weights come to lie in memory stays the same
    for the life of a process and moves all of its ratios, so that only further processes tell how sure they are.

    Args:
        model: path, `onnx.ModelProto` or `onnx_ir.Model`.
        against: what to compare with, as `model`. None: nothing.
        data: what is run on, as `compress` takes it; with labels or `against`, the answers are measured too. None: made
            up.
        recipe: how the data become inputs, as a `Recipe`, its keys in a mapping, or the path of a TOML file.
        batch_sizes: samples in a run; a model with a fixed batch is run at its own, and a note says so.
        providers: execution providers of onnxruntime by the beginning of their names, `cpu` or `cuda`.
        threads: inside one operator, for each model. None: the cores that this process may use.
        processes: how often everything is repeated, at least 2.
        rounds: timed runs of each model in each process. None: what a second has room for, from 3 to 30.
        samples: most samples of the comparison of answers. None: all of the data.
        memory: also measure the peak memory, in one more process for each model.
        picture: a .png or .svg file to draw latency over batch sizes into.
        progress: who is told what goes on, as a `Progress` or a callable that takes an `Event`. None: the logger
            `ndonnx`.
        settings: keys of the recipe, laid over it, as `seed=1`.

    Raises:
        UsageError: a model or the data cannot be read, they do not fit each other, or a provider is not there.
    """
    chosen, told = recipe_of(recipe, settings), listening(progress)
    if picture is not None:
        check_picture(Path(picture))
    plan = Plan(
        tuple(dict.fromkeys(batch_sizes)),
        tuple(dict.fromkeys(providers)),
        usable_cores() if threads is None else threads,
        processes,
        rounds,
        memory,
    )
    given = {MODEL: model} | ({} if against is None else {AGAINST: against})
    with ExitStack() as stack:
        places = {name: stack.enter_context(placed(each)) for name, each in given.items()}
        speed = _timed(places, data, chosen, plan, samples, told)
    if picture is not None:
        from ndonnx.report.speed_picture import write  # noqa: PLC0415 - matplotlib is slow to import

        write(speed, Path(picture))
    return speed


def _timed(
    places: Mapping[str, Placed],
    data: Data | None,
    recipe: Recipe,
    plan: Plan,
    samples: int | None,
    progress: Progress,
) -> Speed:
    models = {name: place.path for name, place in places.items()}
    graphs = {name: load(path) for name, path in models.items()}
    sessions = {name: _opened_on(models[name], plan.providers) for name in models}
    specs = {name: input_specs(session) for name, session in sessions.items()}
    source, graph = None, graphs[MODEL].graph
    settings = settings_for(data, sessions[MODEL], graph, recipe)
    if data is not None:
        source = open_source(data, specs[MODEL], recipe.data, seed=recipe.seed, graph=graph, settings=settings)
        hold_if_mixed(sessions[MODEL], source)
        inputs, fixed = list(source.inputs), source.fixed
    else:
        inputs, fixed = settle(specs[MODEL], settings)
    del sessions
    plan = replace(plan, interface=interface_of(inputs, fixed))
    notes = []
    common = common_batch_size({str(models[name]): _sampled(entry, recipe, fixed) for name, entry in specs.items()})
    size = common or plan.interface.batch  # the graph's own numbers may hold what the inputs leave open
    if size is not None:
        if plan.batch_sizes != (size,):
            notes.append(f"the batch size is fixed in the model: timed at {size} only")
        plan = replace(plan, batch_sizes=(size,))
    batch = _one_batch(inputs, source, graph, recipe, max(plan.batch_sizes))
    arrays = {name: array.shape for name, array in batch.items()}
    sizes = {
        name: replace(
            ModelSize.of(models[name], graph, one_sample(graph, arrays, plan.interface)), path=places[name].name
        )
        for name, graph in graphs.items()
    }
    for name, entry in specs.items():
        feeds_for(str(models[name]), entry, plan.interface.feeds(batch))
    found = measure_speed(models, batch, plan, progress)
    if not all(timing.is_steady for entry in found for timing in entry.batches):
        notes.append("runs took very unequal times: other work on these cores? the intervals hold for it, too")
    in_bits = how_executed(graphs[MODEL])
    notes += () if in_bits is None else in_bits[1]
    beside = None
    if recipe.baselines:
        beside = _baselines(models, source, recipe, replace(plan, batch_sizes=plan.batch_sizes[:1]), batch, progress)
    return Speed(
        model=sizes[MODEL],
        against=sizes.get(AGAINST),
        threads=plan.threads,
        processes=plan.processes,
        providers=found,
        fidelity=None if source is None else _fidelity(models, source, samples, progress),
        notes=notes,
        executed=None if in_bits is None else in_bits[0],
        baselines=beside,
    )


def _baselines(
    models: Mapping[str, Path],
    source: DataSource | None,
    recipe: Recipe,
    plan: Plan,
    feeds: Mapping[str, NDArray[np.generic]],
    progress: Progress,
) -> Baselines:
    """Baselines of the model that is compared with, or of the only one, beside both of them."""
    teacher = models.get(AGAINST, models[MODEL])
    students = {"student": models[MODEL]} if AGAINST in models else {}
    fits = chooses = compares = None
    if source is not None:
        split = draw(source, CALIBRATION, seed=recipe.seed, holdout=recipe.holdout, choosing=_CHOSEN_ON)
        fits, chooses, compares = split.to_fit(CALIBRATION), split.to_choose(), split.to_compare()
    with TemporaryDirectory(prefix="ndonnx-", ignore_cleanup_errors=True) as folder:
        material = Material(teacher, Path(folder), fits, chooses, recipe.task, recipe.metric)
        comparison = Comparison(teacher, students, compares, recipe, progress)
        return comparison.run(recipe.baselines, material, plan, feeds)


def _opened_on(model: Path, providers: Sequence[str]) -> ort.InferenceSession:
    """A model on the first provider, after it was opened on every one: what cannot be, is told before any timing."""
    first, *_ = [make_session(model, device=provider) for provider in providers]
    return first


def _sampled(specs: Sequence[InputSpec], recipe: Recipe, fixed: Mapping[str, object]) -> list[InputSpec]:
    """The inputs of a model that have samples."""
    return [spec for spec in settle(specs, recipe.model_inputs)[0] if spec.name not in fixed]


def _one_batch(
    specs: Sequence[InputSpec], source: DataSource | None, graph: ir.Graph, recipe: Recipe, size: int
) -> dict[str, NDArray[np.generic]]:
    if source is None:
        return made_up_samples(specs, graph, recipe.data, size, seed=recipe.seed)
    batch = next(iter(source.batches(size, samples=size)), None)
    if batch is None or not len(batch):
        raise DataError(f"{source.spec}: expected samples to run on, found none")
    return batch.inputs


def _fidelity(
    models: Mapping[str, Path], source: DataSource, samples: int | None, progress: Progress | None
) -> dict[str, Evaluation] | None:
    """How good the models are; None where there is nothing to measure them by."""
    found = {}
    if AGAINST in models or source.has_labels:
        found[MODEL] = measure(
            models[MODEL], source, teacher=models.get(AGAINST), batching=Batching(samples=samples), progress=progress
        )
    if AGAINST in models and source.has_labels:
        found[AGAINST] = measure(models[AGAINST], source, batching=Batching(samples=samples), progress=progress)
    return found or None
