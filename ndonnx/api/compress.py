"""`compress`: a smaller student of a model, distilled neighbourhood by neighbourhood."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from ndonnx.config.recipe import Recipe
from ndonnx.flow.build import build, build_to_target
from ndonnx.flow.prepare import Request, prepare
from ndonnx.graph import save
from ndonnx.metrics.evaluation import Evaluation
from ndonnx.report import CompressReport, Seconds, TargetReport
from ndonnx.report.summary import compare, drop_of, summaries, told_shapes
from ndonnx.runtime.machine import peak_rss_bytes
from ndonnx.runtime.progress import Progress, Silent


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
    recipe, progress = recipe or Recipe(), progress or Silent()
    path, written, folder = (None if each is None else Path(each) for each in (model, output, run_dir))
    assert path is not None
    searched = bool(recipe.target) or recipe.max_drop is not None
    with prepare(Request(path, data, eval_data, written, folder), recipe, progress, searched=searched) as run:

        def write(student: ir.Model) -> None:
            if written is not None:
                save(student, written)

        built = build_to_target(run, lambda whole: write(whole.model())) if searched else build(run)
        with run.clock.measure("splice"):
            if not searched:
                write(built.model)
        with run.clock.measure("evaluate"):
            metrics = compare(path, built.model, run.judge, progress)
            before, after = summaries(run.teacher.model, path, built.model, written, run.parts)
        report = CompressReport(
            teacher=before,
            student=after,
            metrics=metrics,
            neighbourhoods=[built.results[n.name].report(n, run.parts) for n in run.parts.neighbourhoods],
            finetune=built.tuned,
            seconds=Seconds(**run.clock.seconds()),
            peak_rss_bytes=peak_rss_bytes() + built.workers_rss,
            run_dir=str(run.directory.path),
            unchanged=run.recipe.changes_nothing and not searched,
            shapes=told_shapes(run.parts),
            target=None if built.target is None else _held(built.target, metrics, eval_data),
        )
        report.write(run.directory.path / "report.json")
    return CompressResult(Student(built.model, written), report)


def _held(target: TargetReport, metrics: dict[str, Evaluation], eval_data: str | None) -> TargetReport:
    """What was reached, missed if the final comparison does not bear a promise out."""
    drop, _ = drop_of(metrics["student"], metrics["teacher"])
    if target.missed is not None or target.max_drop is None or eval_data is None or drop <= target.max_drop:
        return target
    promise = f"a drop of at most {target.max_drop:.2%} held on the held-out samples"
    return replace(target, missed=f"{promise}, but on {eval_data} it is {drop:.2%}")
