"""`compress` with a target: candidates are searched instead of one multiplier for all."""

from __future__ import annotations

from pathlib import Path

from ndonnx.evaluate import Evaluation
from ndonnx.graph import save
from ndonnx.machine import peak_rss_bytes
from ndonnx.pipeline.clock import Clock
from ndonnx.pipeline.distilling import Outcome
from ndonnx.pipeline.measuring import finite
from ndonnx.pipeline.opening import open_all
from ndonnx.pipeline.reaching import Reaching
from ndonnx.pipeline.results import CompressResult, Student, compare, drop_of, summaries, told_shapes
from ndonnx.pipeline.workbench import Whole, Workbench, held_out
from ndonnx.progress import Progress
from ndonnx.recipe import Recipe
from ndonnx.report import CompressReport, NeighbourhoodReport, TargetReport
from ndonnx.search import parse_drop, parse_target


def compress_to_target(
    model: Path,
    data: str | None,
    recipe: Recipe,
    output: str | Path | None,
    eval_data: str | None,
    run_dir: str | Path | None,
    progress: Progress,
) -> CompressResult:
    """As `compress`; the report's `target` tells what was reached, and what was missed."""
    clock = Clock()
    shares = parse_target(recipe.target) if recipe.target else {}
    max_drop = None if recipe.max_drop is None else parse_drop(recipe.max_drop)
    with clock.measure("load"):
        progress.stage("load")
        given = open_all(model, output, data, eval_data, recipe, held_out=held_out(recipe, data, max_drop is not None))
        for remark in given.remarks:
            progress.note(remark)
    folder = Path(run_dir) if run_dir is not None else Path(output or model).with_suffix(".run")

    def keep(whole: Whole) -> None:
        if output is not None:
            save(whole.model(), output)

    with Workbench(given, folder, recipe, progress, clock) as bench:
        bench.train(max_drop)
        with clock.measure("evaluate"):
            table = bench.library.table(latency="latency" in shares)
        reached = Reaching(bench, shares, max_drop, True, keep).reach(table)
        best, missed = bench.judged(reached.whole), reached.missed
        keep(best)
        student = best.model()
        with clock.measure("evaluate"):
            metrics = compare(given.path, student, given.judge, progress)
        if missed is None and max_drop is not None and eval_data is not None:
            missed = _broken(metrics, max_drop, eval_data)
        path = Path(output) if output is not None else None
        before, after = summaries(given.teacher, given.path, student, path, bench.parts)
        report = CompressReport(
            teacher=before,
            student=after,
            metrics=metrics,
            neighbourhoods=_neighbourhoods(bench, best),
            finetune=best.tuned,
            seconds=clock.seconds(),
            peak_rss_bytes=peak_rss_bytes() + bench.workers_rss,
            run_dir=str(folder),
            shapes=told_shapes(bench.parts),
            target=TargetReport(
                target=shares,
                max_drop=max_drop,
                reached=best.shares,
                quality=bench.measures.choosing.kind,
                samples=len(bench.split.comparison if max_drop is None else bench.split.confirmation),
                drop=finite(reached.told.drop),
                bound=finite(reached.told.bound),
                missed=missed,
            ),
        )
        report.write(bench.run.path / "report.json")
    return CompressResult(Student(student, path), report)


def _neighbourhoods(bench: Workbench, best: Whole) -> list[NeighbourhoodReport]:
    kept = Outcome("kept", reason="the search keeps the teacher's own slice")
    shared = bench.parts.shared.items()
    found = best.outcomes | {name: best.outcomes[first] for name, first in shared if first in best.outcomes}
    return [
        (found.get(n.name) or bench.distillation.outcomes.get(n.name) or kept).report(n, bench.parts)
        for n in bench.parts.neighbourhoods
    ]


def _broken(metrics: dict[str, Evaluation], max_drop: float, eval_data: str) -> str | None:
    """A promise that the final comparison does not bear out."""
    drop, _ = drop_of(metrics["student"], metrics["teacher"])
    if drop <= max_drop:
        return None
    return f"a drop of at most {max_drop:.2%} held on the held-out samples, but on {eval_data} it is {drop:.2%}"
