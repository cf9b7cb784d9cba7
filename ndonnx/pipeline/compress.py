"""The stages in order: load, partition, capture, distil, splice, verify, report.

This module alone knows all the others. Stages talk through the run directory, so a run that
was interrupted continues with what is done there, whichever executor did it.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from ndonnx.graph import save
from ndonnx.graph.declared import copy_of, state_as_in_file
from ndonnx.machine import peak_rss_bytes, usable_cores
from ndonnx.partition import Partition
from ndonnx.pipeline.answers import answers_a_second
from ndonnx.pipeline.clock import Clock
from ndonnx.pipeline.composing import Composition
from ndonnx.pipeline.distilling import Distillation, Outcome, unchanged_outcomes
from ndonnx.pipeline.finishing import Finishing
from ndonnx.pipeline.opening import Given, learning_on, open_all, partition_model, priced_for
from ndonnx.pipeline.results import CompressResult, Student, compare, summaries, told_shapes
from ndonnx.pipeline.schedule import Schedule
from ndonnx.pipeline.tolerating import Tolerances, study_of
from ndonnx.progress import Progress, Silent
from ndonnx.recipe import Recipe
from ndonnx.report import CompressReport, FinetuneReport
from ndonnx.rundir import RunDir, fingerprint, fingerprint_file


def compress(
    model: str | Path,
    *,
    data: str | None = None,
    recipe: Recipe | None = None,
    output: str | Path | None = None,
    eval_data: str | None = None,
    run_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> CompressResult:
    """Compress an ONNX model by neighbourhood distillation.

    Args:
        model: path of the teacher; never modified.
        data: unlabelled inputs to distil on, as a data source (`calib.npz`, `images/`). At least 3 samples.
            None: made up, which the recipe's `data_free` must allow.
        recipe: what to build and how; the defaults otherwise.
        output: where the student is written. None: nowhere, see `CompressResult.student`.
        eval_data: data source for the final comparison; labels give accuracy. None: rows of `data` that nothing
            else has seen, a tenth of them, at most 2,000.
        run_dir: where the run keeps its state, to be continued after an interruption.
            None: beside `output` (or the model), with the suffix `.run`.
        progress: told what goes on.

    Raises:
        UsageError: bad input; one line that names the file, node or value and the way out.
    """
    recipe = recipe or Recipe()
    progress = progress or Silent()
    if recipe.target or recipe.max_drop is not None:
        from ndonnx.pipeline.targeted import compress_to_target  # noqa: PLC0415 - it needs what is below

        return compress_to_target(Path(model), data, recipe, output, eval_data, run_dir, progress)
    clock = Clock()
    with clock.measure("load"):
        progress.stage("load")
        given = open_all(Path(model), output, data, eval_data, recipe)
        teacher = given.teacher
        for remark in given.remarks:
            progress.note(remark)
        schedule = Schedule(recipe, finetunable=len(teacher.graph.outputs) == 1)
        recipe = learning_on(recipe, teacher, alone=schedule.alone)
        study = study_of(recipe)
    folder = Path(run_dir) if run_dir is not None else Path(output or model).with_suffix(".run")
    with RunDir(folder) as run:
        with clock.measure("partition"):
            progress.stage("partition")
            parts = priced_for(given.split.source, partition_model(teacher, recipe, given.interface))
            tolerances = None if study is None else Tolerances(study, parts)
        if recipe.changes_nothing:
            same = state_as_in_file(copy_of(given.original), given.original)
            made = _Made(same, unchanged_outcomes(parts))
        else:
            made = _distilled(run, given, parts, recipe, schedule, tolerances, progress, clock)
        student, outcomes = made.model, made.outcomes
        with clock.measure("splice"):
            if output is not None:
                save(student, output)
        with clock.measure("evaluate"):
            metrics = compare(given.path, student, given.judge, progress)
            written = Path(output) if output is not None else None
            before, after = summaries(teacher, given.path, student, written, parts)
        report = CompressReport(
            teacher=before,
            student=after,
            metrics=metrics,
            neighbourhoods=[outcomes[n.name].report(n, parts) for n in parts.neighbourhoods],
            finetune=made.tuned,
            seconds=clock.seconds(),
            peak_rss_bytes=peak_rss_bytes() + made.workers_rss,
            run_dir=str(folder),
            unchanged=recipe.changes_nothing,
            shapes=told_shapes(parts),
        )
        report.write(run.path / "report.json")
    return CompressResult(Student(student, Path(output) if output is not None else None), report)


@dataclass(frozen=True)
class _Made:
    """A student, and how its neighbourhoods ended."""

    model: ir.Model
    outcomes: dict[str, Outcome]
    tuned: FinetuneReport | None = None
    workers_rss: int = 0


def _distilled(
    run: RunDir,
    given: Given,
    parts: Partition,
    recipe: Recipe,
    schedule: Schedule,
    tolerances: Tolerances | None,
    progress: Progress,
    clock: Clock,
) -> _Made:
    """Train the neighbourhoods and put them together."""
    if recipe.time_budget is not None:
        schedule = replace(schedule, rate=_rate(run, given))
    samples = schedule.distil_samples(given.samples)
    distillation = Distillation(
        run, given.path, parts, given.split, samples, recipe, schedule, progress, clock, tolerances
    )
    finishing = Finishing(run, parts, given.split, samples, recipe, schedule, progress)
    composition = Composition(
        given.original, given.teacher, parts, given.split.source, recipe, schedule, finishing, progress, clock
    )
    outcomes = distillation.distil()
    entries = {n.name: entry for n in parts.trained if (entry := outcomes[n.name].entry)}
    composed = composition.compose(entries, distillation.data)
    outcomes |= {name: Outcome.kept(name, fault, run) for name, fault in composed.refused.items()}
    rss = max(distillation.workers_rss, finishing.workers_rss)
    return _Made(composed.model, outcomes, composed.tuned, rss)


def _rate(run: RunDir, given: Given) -> float:
    """Samples that are answered in a second; measured once, so that a continued run draws the same ones."""
    where = (platform.node(), str(usable_cores()))
    entry = run.entry("rates", fingerprint(fingerprint_file(str(given.path)), given.split.source.fingerprint(), *where))
    if not entry.done:
        entry.begin()
        entry.commit({"samples_a_second": min(answers_a_second(_fed(given), given.split.source), _FASTEST)})
    return float(entry.meta()["samples_a_second"])


def _fed(given: Given) -> Path | ir.Model:
    """The teacher as something that takes the batches of the source."""
    return given.path if given.interface.is_plain else given.interface.applied(given.teacher)


_FASTEST = 1e9
"""Where there are too few samples to measure."""
