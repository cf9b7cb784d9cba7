"""`compress`: a smaller student of a model, distilled neighbourhood by neighbourhood."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ndonnx.api.models import Model, Student, placed
from ndonnx.api.origin import origin_of
from ndonnx.api.settings import RecipeLike, recipe_of
from ndonnx.assemble.quantise_pieces import bits_of_pieces
from ndonnx.config.recipe import Recipe
from ndonnx.data import Data
from ndonnx.data.augmentation import image_axes
from ndonnx.flow.baselines import beside_baselines
from ndonnx.flow.build import Built, build, build_to_target
from ndonnx.flow.prepare import Request, prepare
from ndonnx.flow.run import Run
from ndonnx.graph import save
from ndonnx.metrics.evaluation import Evaluation
from ndonnx.metrics.worst import draw
from ndonnx.report import CompressReport, NeighbourhoodReport, Seconds, TargetReport
from ndonnx.report.provenance import machine, versions
from ndonnx.report.summary import compare, drop_of, summaries, told_shapes
from ndonnx.runtime.machine import peak_rss_bytes
from ndonnx.runtime.progress import Listener, Remembering, listening


@dataclass(frozen=True)
class CompressResult:
    """What `compress` returns: the student, and the report as `--json` prints it."""

    student: Student
    report: CompressReport


def compress(
    model: Model,
    *,
    data: Data | None = None,
    recipe: RecipeLike | None = None,
    output: str | Path | None = None,
    eval_data: Data | None = None,
    run_dir: str | Path | None = None,
    progress: Listener | None = None,
    **settings: Any,
) -> CompressResult:
    """Compress an ONNX model by neighbourhood distillation.

    Args:
        model: teacher as a path, an `onnx.ModelProto` or an `onnx_ir.Model`; never modified.
        data: unlabelled inputs to distil on, at least 3 samples: the name of a data source (`calib.npz`, `images/`), an
            array (n, ...) for a model with one input, a dict of arrays by input, or an iterable of samples or batches
            (arrays, dicts, tuples; a torch `DataLoader`, a Hugging Face `Dataset`), which is read once. None: made up,
            which the recipe's `data_free` must allow.
        recipe: what to build and how, as a `Recipe`, its keys in a mapping, or the path of a TOML file.
        output: file that the student is written to. None: none, see `CompressResult.student`.
        eval_data: data for the final comparison, as `data`; labels give accuracy. None: rows of `data` that nothing
            else has seen, a tenth of them, at most 2,000.
        run_dir: folder in which the run keeps its state, to be continued after an interruption. None: beside `output`
            (or the model) with the suffix `.run`; for a model that is no file, a temporary folder.
        progress: who is told what goes on, as a `Progress` or a callable that takes an `Event`. None: the logger
            `ndonnx`.
        settings: keys of the recipe, laid over it: `keep=0.5`, `steps=200`, `method=ndonnx.Sparsity("2:4")`.

    Raises:
        UsageError: bad input; one line that names the file, node or value and the way out.
    """
    chosen, told = recipe_of(recipe, settings), Remembering(listening(progress))
    written = None if output is None else Path(output)
    with placed(model, run_dir) as place:
        request = Request(place.path, data, eval_data, written, place.run_dir)
        built, report = _compressed(request, chosen, told, of_file=isinstance(model, str | Path))
        if place.temporary:
            files = {**report.files, "recipe": {**report.files["recipe"], "path": None}}
            report = replace(report, teacher=replace(report.teacher, path=None), run_dir=None, files=files)
        return CompressResult(place.kept(built.model, written), report)


def _with_pictures(found: Evaluation, run: Run) -> Evaluation:
    """The worst samples with pictures in the run directory, where the model reads images."""
    axes = image_axes(run.split.source.inputs, run.split.source.recipe)
    return replace(found, worst=tuple(draw(found.worst, axes, run.directory.path)))


def _compressed(
    request: Request, recipe: Recipe, progress: Remembering, *, of_file: bool
) -> tuple[Built, CompressReport]:
    searched = bool(recipe.target) or recipe.max_drop is not None
    with prepare(request, recipe, progress, searched=searched) as run:

        def write(student: ir.Model) -> None:
            if request.output is not None:
                save(student, request.output)

        built = build_to_target(run, lambda whole: write(whole.model())) if searched else build(run)
        with run.clock.measure("splice"):
            if not searched:
                write(built.model)
        with run.clock.measure("evaluate"):
            metrics = compare(request.model, built.model, run.comparison_data, progress, run.recipe)
            metrics["student"] = _with_pictures(metrics["student"], run)
            before, after = summaries(run.teacher.original, request.model, built.model, request.output, run.parts)
            named = run.recipe.baselines
            baselines = beside_baselines(run, built.model, request.output) if named else None
        eval_spec = None if request.eval_data is None else run.comparison_data.spec
        report = CompressReport(
            teacher=before,
            student=after,
            metrics=metrics,
            neighbourhoods=_neighbourhoods(run, built),
            finetune=built.tuned,
            stages=built.stages,
            quantised=built.quantised,
            seconds=Seconds(**run.clock.seconds()),
            peak_rss_bytes=peak_rss_bytes() + built.workers_rss,
            run_dir=str(run.directory.path),
            simplified=run.teacher.simplified,
            unchanged=run.recipe.changes_nothing and not searched and built.quantised is None,
            shapes=told_shapes(run.parts),
            target=None if built.target is None else _held(built.target, metrics, eval_spec),
            task={name: found.task for name, found in metrics["student"].outputs.items()},
            versions=versions(),
            machine=machine(),
            warnings=tuple(progress.notes),
            baselines=baselines,
            **vars(origin_of(run, request, recipe, of_file=of_file)),
        )
        report.write(run.directory.path / "report.json")
    return built, report


def _neighbourhoods(run: Run, built: Built) -> list[NeighbourhoodReport]:
    """How every neighbourhood ended, with the bits of its weights where some are in 8."""
    bits = {} if built.quantised is None else bits_of_pieces(built.model, run.parts)
    told = (built.results[n.name].report(n, run.parts) for n in run.parts.neighbourhoods)
    return [replace(row, bits=bits.get(row.name)) for row in told]


def _held(target: TargetReport, metrics: dict[str, Evaluation], eval_data: str | None) -> TargetReport:
    """What was reached, missed if the final comparison does not bear a promise out."""
    drop, _ = drop_of(metrics["student"], metrics["teacher"])
    if target.missed is not None or target.max_drop is None or eval_data is None or drop <= target.max_drop:
        return target
    promise = f"a drop of at most {target.max_drop:.2%} held on the held-out samples"
    return replace(target, missed=f"{promise}, but on {eval_data} it is {drop:.2%}")
