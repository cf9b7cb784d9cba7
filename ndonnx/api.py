"""The smaller verbs of the public API: what `inspect`, `evaluate` and the timing of `demo` show, from Python.

Nothing here needs torch, which takes seconds to import, but `threshold` and `inspect` with `check`: `compress` lives in
`ndonnx.pipeline`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from ndonnx.benchmark import AGAINST, MODEL, PROCESSES, Plan, common_batch_size, feeds_for
from ndonnx.benchmark import measure as measure_speed
from ndonnx.data import DataSource, InputSpec, input_specs, is_made_up, open_source
from ndonnx.data.inputs import interface_of, settle
from ndonnx.data.made_up import made_up_samples
from ndonnx.data.specs import declared_specs
from ndonnx.data.split import draw
from ndonnx.errors import DataError, ModelError
from ndonnx.evaluate import Evaluation
from ndonnx.evaluate import evaluate as measure
from ndonnx.graph import load
from ndonnx.graph.bound import one_sample
from ndonnx.graph.branches import open_branches
from ndonnx.graph.interface import Interface
from ndonnx.graph.working_copy import working_copy
from ndonnx.machine import usable_cores
from ndonnx.partition import Partition
from ndonnx.partition import partition as partition_graph
from ndonnx.progress import Progress, Silent
from ndonnx.recipe import Recipe
from ndonnx.report.inspection import Inspection
from ndonnx.report.speed import ModelSize, Speed, check_picture
from ndonnx.teacher import make_session
from ndonnx.teacher.made_up_inputs import settings_for
from ndonnx.teacher.trying import hold_if_mixed

if TYPE_CHECKING:
    from ndonnx.threshold import ThresholdReport


def partition(model: str | Path, recipe: Recipe | None = None) -> Partition:
    """The neighbourhoods of a model, in order, with what each holds and why it would be kept.

    Raises:
        UsageError: the model cannot be read, or the recipe names values that it does not have.
    """
    recipe = recipe or Recipe()
    teacher = load(model)
    inputs, fixed = settle(declared_specs(teacher.graph), recipe.model_inputs)
    bound = {spec.name: spec.sizes for spec in inputs if spec.sizes is not None}
    return _partitioned(teacher, recipe, interface_of(inputs, fixed), bound)


def _partitioned(
    teacher: ir.Model, recipe: Recipe, interface: Interface, shapes: Mapping[str, Sequence[int]]
) -> Partition:
    """The neighbourhoods of a loaded model, with MACs told for these shapes of its inputs, samples first."""
    working = working_copy(open_branches(teacher, interface.fixed), interface)
    parts = partition_graph(
        working, granularity=recipe.granularity, cut=recipe.cut, freeze=recipe.freeze, methods=(recipe.method,)
    )
    return replace(parts, stated=one_sample(working, shapes, interface)) if shapes else parts


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
    if not check:
        return Inspection.of(str(model), partition(model, recipe), recipe=recipe)

    from ndonnx.check import check as pass_gates  # noqa: PLC0415 - needs torch
    from ndonnx.check import few_samples  # noqa: PLC0415

    recipe, teacher = recipe or Recipe(), load(model)
    given = few_samples(Path(model), teacher.graph, recipe, data)
    parts = _partitioned(teacher, recipe, given.interface, {name: a.shape for name, a in given.arrays.items()})
    checked = pass_gates(Path(model), parts, recipe, data=data, progress=progress, given=given)
    return Inspection.of(str(model), checked.parts, checked.parity, recipe)


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


def benchmark(
    model: str | Path,
    *,
    against: str | Path | None = None,
    data: str | None = None,
    recipe: Recipe | None = None,
    batch_sizes: Sequence[int] = (1, 8, 32),
    providers: Sequence[str] = ("cpu",),
    threads: int | None = None,
    processes: int = PROCESSES,
    rounds: int | None = None,
    samples: int | None = None,
    memory: bool = True,
    picture: str | Path | None = None,
    progress: Progress | None = None,
) -> Speed:
    """Time a model in onnxruntime, alone or in turn with another one that has the same inputs.

    Everything is loaded and timed anew in several processes. Where weights come to lie in memory stays the same
    for the life of a process and moves all of its ratios, so that only further processes tell how sure they are.

    Args:
        model: path of the model.
        against: path of what to compare with.
        data: source of what is run on; with labels or `against`, the answers are measured too. None: made up.
        recipe: says how the data become inputs.
        batch_sizes: samples in a run; a model with a fixed batch is run at its own, and a note says so.
        providers: execution providers of onnxruntime by the beginning of their names, `cpu` or `cuda`.
        threads: inside one operator, for each model. None: the cores that this process may use.
        processes: how often everything is repeated, at least 2.
        rounds: timed runs of each model in each process. None: what a second has room for, from 3 to 30.
        samples: most samples of the comparison of answers. None: all of the data.
        memory: also measure the peak memory, in one more process for each model.
        picture: a .png or .svg file to draw latency over batch sizes into.
        progress: told what is measured.

    Raises:
        UsageError: a model or the data cannot be read, they do not fit each other, or a provider is not there.
    """
    recipe = recipe or Recipe()
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
    models = {MODEL: Path(model)} | ({} if against is None else {AGAINST: Path(against)})
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
        name: ModelSize.of(models[name], graph, one_sample(graph, arrays, plan.interface))
        for name, graph in graphs.items()
    }
    for name, entry in specs.items():
        feeds_for(str(models[name]), entry, plan.interface.feeds(batch))
    found = measure_speed(models, batch, plan, progress)
    if not all(timing.is_steady for entry in found for timing in entry.batches):
        notes.append("runs took very unequal times: other work on these cores? the intervals hold for it, too")
    speed = Speed(
        model=sizes[MODEL],
        against=sizes.get(AGAINST),
        threads=plan.threads,
        processes=plan.processes,
        providers=found,
        fidelity=None if source is None else _fidelity(models, source, samples, progress),
        notes=notes,
    )
    if picture is not None:
        speed.write_picture(picture)
    return speed


def threshold(
    model: str | Path,
    *,
    data: str,
    recipe: Recipe | None = None,
    samples: int = 2000,
    amplitudes: Sequence[float] | None = None,
    repeats: int | None = None,
    keep: Sequence[float] | None = None,
    max_drop: float | str = "1%",
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> ThresholdReport:
    """Measure how much error a model bears, and where: the thresholding effect (figures 1, 4 and 6).

    Noise goes in behind one, half and all neighbourhoods, and on the weights of one after the other; each
    neighbourhood is replaced, alone, by untrained students of several widths. All is judged by accuracy where the
    data has labels, else by agreement with the model, or by the NMSE of its outputs where it has no class scores.

    Args:
        model: path of the teacher; never modified.
        data: inputs to measure on, as a data source.
        recipe: the partition, `round_to`, `cache_budget`, `seed` and how the data become inputs.
        samples: most samples on which answers are judged, three quarters of those at hand; students are shaped on
            others. Fewer where the activations would not fit into half of `cache_budget`.
        amplitudes: of the noise, as parts of each value's deviation. None: 0.05 to 1.6.
        repeats: draws of the noise at each amplitude. None: 3.
        keep: multipliers of the students, above 0 to 1. None: 0.25, 0.5 and 0.75.
        max_drop: what the tolerances are for, in the unit of the measure; `1%` is a point of accuracy.
        output: folder for the JSON document, the CSV files and the pictures. None: nothing is written.
        progress: told how far it has got.

    Raises:
        UsageError: the model or the data cannot be read, a number is out of range, or nothing can be distilled.
    """
    from ndonnx.partial import PartialModels  # noqa: PLC0415 - torch
    from ndonnx.pipeline import partition_model  # noqa: PLC0415
    from ndonnx.pipeline.measuring import Rows  # noqa: PLC0415
    from ndonnx.pipeline.workbench import held_out  # noqa: PLC0415
    from ndonnx.report.threshold import make_folder, write_threshold  # noqa: PLC0415
    from ndonnx.search import parse_drop  # noqa: PLC0415
    from ndonnx.threshold import AMPLITUDES, KEEP, REPEATS, SHAPING_SAMPLES, STUDIED, check_study, study  # noqa: PLC0415

    began = time.perf_counter()
    recipe, progress = recipe or Recipe(), progress or Silent()
    amplitudes, keep = AMPLITUDES if amplitudes is None else amplitudes, KEEP if keep is None else keep
    repeats, drop = REPEATS if repeats is None else repeats, parse_drop(max_drop)
    check_study(samples, amplitudes, repeats, keep)
    progress.stage("load")
    path, teacher = Path(model), load(model)
    session = make_session(path)
    settings = settings_for(data, session, teacher.graph, recipe)
    specs = input_specs(session)
    source = open_source(data, specs, recipe.data, seed=recipe.seed, graph=teacher.graph, settings=settings)
    hold_if_mixed(session, source)
    split = draw(
        source,
        round(samples / STUDIED),
        seed=recipe.seed,
        holdout=STUDIED,
        confirming=held_out(recipe, data, True).confirming,  # what a run with `--max-drop` will test its promise on
    )
    progress.stage("partition")
    interface = interface_of(source.inputs, source.fixed)
    parts = partition_model(open_branches(teacher, interface.fixed), recipe, interface)
    if not parts.distillable:
        raise ModelError(f"{path}: no neighbourhood can be distilled; `ndonnx inspect {path}` says why")
    folder = None if output is None else make_folder(Path(output))
    judged, shaping = Rows(split.to_choose(), parts), Rows(split.to_fit(SHAPING_SAMPLES), parts)
    progress.stage("capture", judged.count + shaping.count, "samples")

    def captured(rows: Rows, folder: Path, labels: NDArray[np.int64] | None) -> PartialModels:
        return PartialModels(
            parts,
            rows.batches,
            folder,
            rows.count,
            threads=usable_cores(),
            labels=labels,
            budget=recipe.cache_budget // 2,
            on_batch=progress.advance,
        )

    with (
        tempfile.TemporaryDirectory(prefix=".ndonnx-", dir=folder, ignore_cleanup_errors=True) as scratch,
        captured(judged, Path(scratch) / "judged", judged.labels) as partials,
        captured(shaping, Path(scratch) / "shaping", None) as shaped_on,
    ):
        if partials.samples < judged.count:
            progress.note(
                f"{partials.samples} of {judged.count} samples fit into half of the cache budget; "
                "--cache-budget raises it"
            )
        report = study(
            partials,
            shaping=shaped_on,
            model=str(model),
            data=data,
            amplitudes=amplitudes,
            repeats=repeats,
            keep=keep,
            max_drop=drop,
            round_to=recipe.round_to,
            seed=recipe.seed,
            threads=usable_cores(),
            progress=progress,
        )
    report = replace(report, seconds=time.perf_counter() - began)
    return report if folder is None else write_threshold(report, folder)


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
        found[MODEL] = measure(models[MODEL], source, teacher=models.get(AGAINST), samples=samples, progress=progress)
    if AGAINST in models and source.has_labels:
        found[AGAINST] = measure(models[AGAINST], source, samples=samples, progress=progress)
    return found or None
