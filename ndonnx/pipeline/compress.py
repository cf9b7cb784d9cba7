"""The stages in order: load, partition, capture, distil, splice, verify, report.

This module alone knows all the others. Stages talk through the run directory, so a run that
was interrupted continues with what is done there, whichever executor did it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from ndonnx.data import DATA_FREE, DataSource, input_specs, open_source
from ndonnx.data.source import RowSource
from ndonnx.distil import load_student
from ndonnx.errors import DataError, ModelError
from ndonnx.evaluate import Evaluation, evaluate
from ndonnx.graph import fold_constants, load, save, slice_cost
from ndonnx.graph.load import check_writable, declared_values, forget_inferred, infer_shapes
from ndonnx.machine import peak_rss_bytes
from ndonnx.partition import Partition, partition
from ndonnx.pipeline.batches import count_samples, probe
from ndonnx.pipeline.clock import Clock
from ndonnx.pipeline.distilling import Distillation
from ndonnx.pipeline.finishing import Finishing
from ndonnx.pipeline.schedule import Schedule
from ndonnx.progress import Progress, Silent
from ndonnx.recipe import Recipe
from ndonnx.report import CompressReport, FinetuneReport, ModelSummary
from ndonnx.rundir import RunDir
from ndonnx.splice import is_changed, splice
from ndonnx.teacher import make_session
from ndonnx.teacher.balance import POOL, balanced
from ndonnx.verify import verify

_CHECK_SAMPLES = 2000
"""Samples of the calibration data on which teacher and student are compared without `--eval`."""


@dataclass(frozen=True)
class Student:
    """The compressed model."""

    model: ir.Model
    path: Path | None
    """Where it was written; None if no output was asked for."""

    def save(self, path: str | Path) -> None:
        """Write it under its final name only when complete (see `ndonnx.graph.save`)."""
        save(self.model, path)


@dataclass(frozen=True)
class CompressResult:
    """What `compress` returns: the student, and the report as `--json` prints it."""

    student: Student
    report: CompressReport


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
        data: unlabelled inputs to distil on, as a data source (`calib.npz`, `images/`).
            None: made up, which the recipe's `data_free` must allow.
        recipe: what to build and how; the defaults otherwise.
        output: where the student is written. None: nowhere, see `CompressResult.student`.
        eval_data: data source for the final comparison; labels give accuracy. None: part of `data`.
        run_dir: where the run keeps its state, to be continued after an interruption.
            None: beside `output` (or the model), with the suffix `.run`.
        progress: told what goes on.

    Raises:
        UsageError: bad input; one line that names the file, node or value and the way out.
    """
    recipe = recipe or Recipe()
    progress = progress or Silent()
    clock = Clock()
    with clock.measure("load"):
        progress.stage("load")
        given = _open(Path(model), output, data, eval_data, recipe)
        teacher, source = given.teacher, given.source
        schedule = Schedule(recipe, finetunable=len(teacher.graph.outputs) == 1)
    folder = Path(run_dir) if run_dir is not None else Path(output or model).with_suffix(".run")
    with RunDir(folder) as run:
        with clock.measure("partition"):
            progress.stage("partition")
            parts = partition_model(teacher, recipe)
        distillation = Distillation(run, given.path, parts, source, given.samples, recipe, schedule, progress, clock)
        finishing = Finishing(run, parts, source, given.samples, recipe, schedule, progress)
        outcomes = distillation.distil()
        # In the teacher's order, not in that of completion: the same students are the same bytes.
        entries = {n.name: entry for n in parts.neighbourhoods if (entry := outcomes[n.name].entry)}
        key: tuple[str, ...] = (*distillation.data, *(entry.path.name for entry in entries.values()))
        trained = {name: load_student(entry) for name, entry in entries.items()}
        slices = {n.name: parts.slice_of(n) for n in parts.neighbourhoods if n.name in trained}
        students = {name: student for name, student in trained.items() if is_changed(student, slices[name])}
        if recipe.inputs == "refit" and students:
            with clock.measure("refit"):
                students = finishing.refit(students, key)
        with clock.measure("splice"):
            progress.stage("splice")
            student = splice(teacher, students) if students else teacher.clone()
        tuned: FinetuneReport | None = None
        if schedule.finetunes and students:
            with clock.measure("finetune"):
                student, tuned = finishing.finetune(student, students, (*key, recipe.inputs))
        with clock.measure("splice"):
            # Fine-tuning compares the student as a whole; its slices are no longer those that were trained.
            unchanged = students if tuned is None or tuned.reason is not None else {}
            verify(teacher, student, parts, unchanged, probe(source), recipe.parity)
            forget_inferred(student, declared_values(teacher))
            if output is not None:
                save(student, output)
        with clock.measure("evaluate"):
            limit = None if eval_data is not None else _CHECK_SAMPLES
            metrics = _metrics(given.path, student, given.judge, limit, progress)
        report = CompressReport(
            teacher=_summary(teacher, given.path),
            student=_summary(student, Path(output) if output is not None else None),
            metrics=metrics,
            neighbourhoods=[outcomes[n.name].report(n) for n in parts.neighbourhoods],
            finetune=tuned,
            seconds=clock.seconds(),
            peak_rss_bytes=peak_rss_bytes() + max(distillation.workers_rss, finishing.workers_rss),
            run_dir=str(folder),
        )
        report.write(run.path / "report.json")
    return CompressResult(Student(student, Path(output) if output is not None else None), report)


@dataclass(frozen=True)
class _Given:
    """What a run starts from."""

    path: Path
    teacher: ir.Model
    source: DataSource
    judge: DataSource
    samples: int


def _open(model: Path, output: str | Path | None, data: str | None, eval_data: str | None, recipe: Recipe) -> _Given:
    """Open everything that may be missing or damaged, before any work is done."""
    if output is not None:
        check_writable(output)
        if Path(output).exists() and Path(output).samefile(model):
            raise ModelError(f"{output}: is the teacher itself, which is never modified; choose another output")
    teacher = load(model)
    specs = input_specs(make_session(model))

    def source_of(spec: str) -> DataSource:
        return open_source(spec, specs, recipe.data, seed=recipe.seed, graph=teacher.graph)

    source = source_of(data) if data is not None else _made_up(source_of, teacher, recipe)
    judge = source_of(eval_data) if eval_data is not None else source
    return _Given(model, teacher, source, judge, count_samples(source, recipe.samples))


def _made_up(source_of: Callable[[str], DataSource], teacher: ir.Model, recipe: Recipe) -> DataSource:
    """Samples that nobody collected, as many as the recipe wants, of all that the teacher can tell apart."""
    if not recipe.data_free and recipe.inputs != "noise":
        raise DataError("no data: give a data source, or set data_free to make inputs up")
    pool = source_of(f"{DATA_FREE}:{POOL * recipe.samples}")
    # One thread: another last bit could choose other samples, and nothing of an earlier run would be found again.
    return balanced(pool, teacher, recipe.samples, threads=1) if isinstance(pool, RowSource) else pool


def partition_model(teacher: ir.Model, recipe: Recipe) -> Partition:
    """Partition a loaded teacher as a recipe says; the teacher is not changed."""
    working = fold_constants(teacher.clone())
    return partition(working, granularity=recipe.granularity, cut=recipe.cut, freeze=recipe.freeze)


def _metrics(
    teacher: Path, student: ir.Model, judge: DataSource, limit: int | None, progress: Progress
) -> dict[str, Evaluation]:
    ours = evaluate(student, judge, teacher=teacher, samples=limit, progress=progress)
    theirs = evaluate(teacher, judge, samples=limit)
    return {"teacher": theirs, "student": ours}


def _summary(model: ir.Model, path: Path | None) -> ModelSummary:
    cost = slice_cost(fold_constants(infer_shapes(model.clone())))
    size = None
    if path is not None:
        size = sum(part.stat().st_size for part in (path, path.with_name(f"{path.name}.data")) if part.exists())
    return ModelSummary(path=str(path) if path else None, parameters=cost.parameters, macs=cost.macs, bytes=size)
