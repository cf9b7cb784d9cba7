"""From a prepared run to its student: one candidate for each neighbourhood, or a search for a target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from ndonnx.flow.assembly import Assembly
from ndonnx.flow.block_table import Tabulated
from ndonnx.flow.constrained_search import ConstrainedSearch
from ndonnx.flow.finish import Finish
from ndonnx.flow.jobs import NeighbourhoodResult, unchanged_results
from ndonnx.flow.measure import finite
from ndonnx.flow.quantise import check_quantisable
from ndonnx.flow.run import Run
from ndonnx.flow.search_session import SearchSession, Whole
from ndonnx.flow.strategies import distil_all
from ndonnx.flow.train import Distillation
from ndonnx.report import FinetuneReport, QuantisationReport, StageReport, TargetReport
from ndonnx.select import parse_drop, parse_target


@dataclass(frozen=True)
class Built:
    """A student, and how its neighbourhoods ended."""

    model: ir.Model
    results: dict[str, NeighbourhoodResult]
    """How each neighbourhood ended, by its name."""
    tuned: FinetuneReport | None = None
    """What the fine-tuning came to; None where there was none."""
    workers_rss: int = 0
    """Peak memory of the workers, in bytes."""
    target: TargetReport | None = None
    """What was asked for and what was reached; None without a target."""
    stages: tuple[StageReport, ...] = ()
    """What the whole came to after each stage."""
    quantised: QuantisationReport | None = None
    """How it was quantised; None where that was not asked for."""


def build(run: Run) -> Built:
    """Train a student of each neighbourhood and put them together."""
    if run.recipe.quantises:
        check_quantisable(run)
    finishing = Finish(run)
    if run.recipe.changes_nothing:
        same = Assembly(run, finishing).unchanged()
        return Built(same.model, unchanged_results(run.parts), stages=same.stages, quantised=same.quantised)
    distillation = Distillation(run)
    results = distil_all(distillation)
    entries = {n.name: entry for n in run.parts.trained if (entry := results[n.name].entry)}
    assembled = Assembly(run, finishing).assemble(entries, distillation.data)
    results |= {name: NeighbourhoodResult.kept(name, fault, run.directory) for name, fault in assembled.refused.items()}
    rss = max(distillation.workers_rss, finishing.workers_rss)
    return Built(assembled.model, results, assembled.tuned, rss, stages=assembled.stages, quantised=assembled.quantised)


def build_to_target(run: Run, on_better: Callable[[Whole], None]) -> Built:
    """Train candidates of each neighbourhood, and search among them for what the recipe asks for.

    Args:
        run: its recipe has a target, a `max_drop`, or both.
        on_better: told the best student so far, whenever there is a better one.
    """
    shares = parse_target(run.recipe.target) if run.recipe.target else {}
    max_drop = None if run.recipe.max_drop is None else parse_drop(run.recipe.max_drop)
    with SearchSession(run) as session:
        session.train(max_drop)
        with run.clock.measure("evaluate"):
            table = Tabulated(session.library).table(latency="latency" in shares)
        found = ConstrainedSearch(session, shares, max_drop, True, on_better).search(table)
        best = session.within_budgets(found.whole)
        on_better(best)
        target = TargetReport(
            target=shares,
            max_drop=max_drop,
            reached=best.shares,
            quality=session.measures.choosing.kind,
            samples=len(run.split.comparison if max_drop is None else run.split.confirmation),
            drop=finite(found.told.drop),
            bound=finite(found.told.bound),
            missed=found.missed,
        )
        results = _results(session, best)
        return Built(best.model(), results, best.tuned, session.workers_rss, target, quantised=best.quantised)


def _results(session: SearchSession, best: Whole) -> dict[str, NeighbourhoodResult]:
    """How every neighbourhood ended: with a student of the choice, or with the teacher's own slice."""
    parts, searched = session.run.parts, session.distillation.outcomes
    shared = {name: best.outcomes[first] for name, first in parts.shared.items() if first in best.outcomes}
    found, in_bits = best.outcomes | shared, session.pieces(best.candidates)

    def kept(name: str) -> NeighbourhoodResult:
        behind = ", in 8 bits" if name in in_bits else ""
        return NeighbourhoodResult("kept", reason=f"the search keeps the teacher's own slice{behind}")

    return {n.name: found.get(n.name) or searched.get(n.name) or kept(n.name) for n in parts.neighbourhoods}
