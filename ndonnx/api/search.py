"""`search`: the trade-off curve of a teacher over the students in its library."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ndonnx.api.models import Model, Student, placed
from ndonnx.api.settings import RecipeLike, recipe_of
from ndonnx.config.recipe import Recipe
from ndonnx.data import Data
from ndonnx.flow.constrained_search import ConstrainedSearch
from ndonnx.flow.measure import finite
from ndonnx.flow.prepare import Request, prepare
from ndonnx.flow.search_session import SearchSession, Whole
from ndonnx.graph import save
from ndonnx.metrics.evaluation import Evaluation, evaluate
from ndonnx.report import Seconds
from ndonnx.report.search import SearchedStudent, SearchReport, Source
from ndonnx.report.summary import drop_of
from ndonnx.runtime.fingerprints import fingerprint
from ndonnx.runtime.progress import Listener, Progress, listening
from ndonnx.select import TEACHER, Table, parse_drop, parse_target
from ndonnx.select import pareto as trade_off

PARETO = 5
"""Students on the curve."""


@dataclass(frozen=True)
class SearchResult:
    """The trade-off curve, its students, and whether the target was reached."""

    report: SearchReport
    missed: str | None
    """Why the target was not reached; None where it was, or where there was none."""
    folder: Path | None
    """Folder that students, CSV, picture and report were written to; None: they were not."""
    students: Mapping[str, Student] = field(default_factory=dict)
    """Students of the curve and of the target, by the names that they have in the report."""


def search(
    model: Model,
    *,
    data: Data | None = None,
    recipe: RecipeLike | None = None,
    output: str | Path | None = None,
    pareto: int = PARETO,
    eval_data: Data | None = None,
    run_dir: str | Path | None = None,
    dry_run: bool = False,
    progress: Listener | None = None,
    **settings: Any,
) -> SearchResult:
    """Train candidates for every neighbourhood, and choose among them along the trade-off of cost and quality.

    The last layer of each student is refitted on its own inputs; a whole student is fine-tuned only if the recipe sets
    `finetune_steps`.

    Args:
        model: teacher as a path, an `onnx.ModelProto` or an `onnx_ir.Model`; never modified.
        data: inputs to distil on, as `compress` takes them; some of the rows are held out to choose by and to compare
            on.
        recipe: candidates under `[search]`, a target, and how to train, as a `Recipe`, its keys in a mapping, or the
            path of a TOML file.
        output: folder for the Pareto students, `search.csv`, `search.png` and `search.json`. None: nothing is written.
        pareto: how many students on the curve.
        eval_data: data to compare the students on, as `data`. None: rows of `data` that nothing else has seen.
        run_dir: folder of the library of trained candidates. None: beside `output` (or the model) with the suffix
            `.run`; for a model that is no file, a temporary folder.
        dry_run: only tell what is in the library and what would be trained.
        progress: who is told what goes on, as a `Progress` or a callable that takes an `Event`. None: the logger
            `ndonnx`.
        settings: keys of the recipe, laid over it, as `search={"candidates": [ndonnx.Width(0.5)]}`.

    Raises:
        UsageError: bad input; one line that names the file, node or value and the way out.
    """
    chosen, told = recipe_of(recipe, settings), listening(progress)
    chosen = chosen.model_copy(update={"finetune_steps": chosen.finetune_steps or 0})
    where = None if output is None else Path(output)
    with placed(model, run_dir) as place:
        library = place.run_dir or (where or place.path).with_suffix(".run")
        request = Request(place.path, data, eval_data, None, library)
        found = _searched(request, chosen, told, where, None if dry_run else pareto)
        if not place.temporary:
            return found
        students = {name: place.kept(student.model, student.path) for name, student in found.students.items()}
        return replace(found, report=replace(found.report, model=place.name, run_dir=None), students=students)


def _searched(
    request: Request, recipe: Recipe, progress: Progress, folder: Path | None, pareto: int | None
) -> SearchResult:
    """Search for so many students on the curve; None: only tell what would be done."""
    shares = parse_target(recipe.target) if recipe.target else {}
    max_drop = None if recipe.max_drop is None else parse_drop(recipe.max_drop)
    with prepare(request, recipe, progress, searched=True) as run, SearchSession(run) as session:
        curve = _Curve(session, shares, max_drop, request.eval_data is not None)
        if pareto is None:
            return SearchResult(curve.report([], None), None, None)
        session.train(max_drop)
        with run.clock.measure("evaluate"):
            table = session.library.table(latency="latency" in shares)
        wholes, missed = curve.students(table, pareto)
        named = [curve.point(*each, table, folder) for each in wholes]
        report = curve.report([curve.teacher(table), *named], table)
        report.write(run.directory.path / "search.json")
        if folder is not None:
            report.write(folder / "search.json")
            report.write_csv(folder / "search.csv")
            report.draw(folder / "search.png")
        paths = {point.name: point.path for point in named}
        students = {
            name: Student(whole.model(), None if (path := paths[name]) is None else Path(path))
            for name, source, whole in wholes
            if source == "searched"
        }
    return SearchResult(report, missed, folder, students)


def _rounded(cost: float | None) -> int | None:
    return None if cost is None else round(cost)


@dataclass
class _Curve:
    session: SearchSession
    shares: Mapping[str, float]
    max_drop: float | None
    judged: bool
    """Whether there are data to judge by other than held-out rows."""

    @property
    def cost(self) -> str:
        return next(iter(self.shares), "params")

    def students(self, table: Table, count: int) -> tuple[list[tuple[str, Source, Whole]], str | None]:
        """The target's student, those of the curve, and the uniform baseline."""
        found: list[tuple[str, Source, Whole]] = []
        missed = None
        if self.shares or self.max_drop is not None:
            reached = ConstrainedSearch(self.session, self.shares, self.max_drop, False).search(table)
            whole, missed = self.session.judged(reached.whole), reached.missed
            found.append(("target", "searched", whole))
            drop, _ = self._judgement(whole)
            if self.judged and missed is None and self.max_drop is not None and drop > self.max_drop:
                missed = (
                    f"a drop of at most {self.max_drop:.2%} held on the held-out samples; on --eval it is {drop:.2%}"
                )
        for name, source, candidates in self._curve(table, count):
            found.append((name, source, self.session.finish(candidates, in_full=False)))
        return found, missed

    def _curve(self, table: Table, count: int) -> Iterator[tuple[str, Source, Mapping[str, str]]]:
        choices = trade_off(table, self.cost, count) if count > 0 else []
        for number, choice in enumerate(choices, start=1):
            yield f"pareto-{number}", "searched", choice.candidates
        multipliers = [c for c in self.session.candidates if c.method == "width"] or self.session.candidates
        for candidate in multipliers if count > 0 else ():
            if table.knows(candidate.spec):
                yield candidate.spec, "uniform", table.uniform(candidate.spec).candidates

    def point(self, name: str, source: Source, whole: Whole, table: Table, folder: Path | None) -> SearchedStudent:
        """A student for the report; a searched one is written too."""
        choice = table.choose(whole.candidates)
        path = None
        if folder is not None and source == "searched":
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{name}.onnx"
            save(whole.model(), path)
        drop, metric = self._judgement(whole)
        latency = whole.shares.get("latency")
        time = table.teacher.totals.get("latency")
        return SearchedStudent(
            name=name,
            source=source,
            params=round(whole.costs["params"]),
            macs=_rounded(whole.costs.get("macs")),
            bytes=round(whole.costs["size"]),
            latency=latency * time if latency is not None and time is not None else choice.totals.get("latency"),
            shares=whole.shares
            | ({"latency": table.share(choice, "latency")} if time is not None and latency is None else {}),
            predicted_drop=choice.drop,
            measured_drop=drop,
            metric=metric,
            candidates=dict(whole.candidates),
            path=None if path is None else str(path),
        )

    def teacher(self, table: Table) -> SearchedStudent:
        """The teacher as a point of the curve."""
        whole = self.session.whole
        return SearchedStudent(
            name=TEACHER,
            source="teacher",
            params=round(whole["params"]),
            macs=_rounded(whole.get("macs")),
            bytes=round(whole["size"]),
            latency=table.teacher.totals.get("latency"),
            shares=dict.fromkeys(table.costs, 1.0),
            predicted_drop=0.0,
            measured_drop=0.0,
            metric=self._own_metric(),
            candidates=dict(table.teacher.candidates),
            path=str(self.session.run.teacher.path),
        )

    def _judgement(self, whole: Whole) -> tuple[float, float]:
        """What a student loses, and its metric: on the data of the comparison, which no choice has seen."""
        run, judge = self.session.run, self.session.run.judge
        entry = run.directory.entry("judged", fingerprint(whole.entry.key, judge.fingerprint()))
        if not entry.done:
            found = evaluate(whole.path, judge, teacher=run.teacher.path, progress=run.progress)
            entry.begin()
            judged = map(finite, drop_of(found, self._teacher))
            entry.commit(dict(zip(("drop", "metric"), judged, strict=True)))
        drop, metric = (entry.meta()[name] for name in ("drop", "metric"))
        return math.inf if drop is None else float(drop), math.inf if metric is None else float(metric)

    @cached_property
    def _teacher(self) -> Evaluation:
        return evaluate(self.session.run.teacher.path, self.session.run.judge)

    def _own_metric(self) -> float:
        if self._teacher.accuracy is not None:
            return self._teacher.accuracy
        return 0.0 if self._quality(True) == "nmse" else 1.0

    def _quality(self, measured: bool) -> str:
        """What drops are of."""
        if not measured:
            return ""
        if self.session.measures.choosing.kind == "nmse":
            return "nmse"
        return "agreement" if self._teacher.accuracy is None else "accuracy"

    def report(self, students: list[SearchedStudent], table: Table | None) -> SearchReport:
        """The document; without a table, of what would be done."""
        session, run = self.session, self.session.run
        return SearchReport(
            model=str(run.teacher.path),
            cost=self.cost,
            quality=self._quality(table is not None),
            samples=len(run.split.comparison) if table is None else self._teacher.samples,
            target=dict(self.shares),
            max_drop=self.max_drop,
            students=students,
            options=session.library.plan() if table is None else session.library.options(table),
            seconds=vars(Seconds(**run.clock.seconds())),
            run_dir=str(run.directory.path),
        )
