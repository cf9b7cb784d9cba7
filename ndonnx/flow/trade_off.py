"""The trade-off curve of a search: whole students, and what they lose on rows that no choice has seen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ndonnx.flow.constrained_search import ConstrainedSearch
from ndonnx.flow.measure import finite
from ndonnx.flow.search_session import SearchSession, Whole
from ndonnx.graph import save
from ndonnx.metrics.evaluation import Evaluation, evaluate
from ndonnx.report import Seconds
from ndonnx.report.search import SearchedStudent, SearchReport, Source
from ndonnx.report.summary import drop_of
from ndonnx.runtime.fingerprints import fingerprint
from ndonnx.select import TEACHER, Table
from ndonnx.select import pareto as trade_off


@dataclass
class Curve:
    """Chooses and measures the students of a search, and reports them."""

    session: SearchSession
    shares: Mapping[str, float]
    max_drop: float | None
    evaluated: bool
    """Whether there are data to compare on other than held-out rows."""

    @property
    def cost(self) -> str:
        return next(iter(self.shares), "params")

    def students(self, table: Table, count: int) -> tuple[list[tuple[str, Source, Whole]], str | None]:
        """The target's student, those of the curve, and the uniform baseline."""
        found: list[tuple[str, Source, Whole]] = []
        missed = None
        if self.shares or self.max_drop is not None:
            reached = ConstrainedSearch(self.session, self.shares, self.max_drop, False).search(table)
            whole, missed = self.session.within_budgets(reached.whole), reached.missed
            found.append(("target", "searched", whole))
            drop, _ = self._comparison(whole)
            if self.evaluated and missed is None and self.max_drop is not None and drop > self.max_drop:
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
        drop, metric = self._comparison(whole)
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

    def _comparison(self, whole: Whole) -> tuple[float, float]:
        """What a student loses, and its metric: on the data of the comparison, which no choice has seen."""
        run, comparison_data = self.session.run, self.session.run.comparison_data
        entry = run.directory.entry("judged", fingerprint(whole.entry.key, comparison_data.fingerprint()))
        if not entry.done:
            found = evaluate(whole.path, comparison_data, teacher=run.teacher.path, progress=run.progress)
            entry.begin()
            told = map(finite, drop_of(found, self._teacher))
            entry.commit(dict(zip(("drop", "metric"), told, strict=True)))
        drop, metric = (entry.meta()[name] for name in ("drop", "metric"))
        return math.inf if drop is None else float(drop), math.inf if metric is None else float(metric)

    @cached_property
    def _teacher(self) -> Evaluation:
        return evaluate(self.session.run.teacher.path, self.session.run.comparison_data)

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


def _rounded(cost: float | None) -> int | None:
    return None if cost is None else round(cost)
