"""From a target to a student that was measured to meet it: choose, assemble, measure, correct, choose again, test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median

from ndonnx.errors import SearchError
from ndonnx.flow.composed import Corrections, everywhere_in_bits
from ndonnx.flow.measure import WholeLoss
from ndonnx.flow.search_session import SearchSession, Whole
from ndonnx.select import Choice, Promise, Table, greedy_to, greedy_under, least_bound, nearest, solve

_CLOSE = 0.95
"""Part of a latency target from which on no more is tried."""


@dataclass(frozen=True)
class Found:
    """The student of a search."""

    whole: Whole
    told: WholeLoss
    """On samples that nothing chose by: those that confirm the promise, else those of the comparison."""
    missed: str | None
    """One line, where it is not what was asked for."""


@dataclass
class ConstrainedSearch:
    """One search for one target."""

    session: SearchSession
    shares: Mapping[str, float]
    """Parts of the teacher's costs to reach."""
    max_drop: float | None
    in_full: bool
    """Whether what is chosen is trained with the recipe's steps."""
    on_better: Callable[[Whole], None] = lambda whole: None
    """Told the best student so far, whenever there is a better one."""
    cost: str = field(init=False)
    """What is saved most of where no target says what."""

    def __post_init__(self) -> None:
        self.cost = next(iter(self.shares), "params")

    def search(self, table: Table) -> Found:
        """The best student; with a promised drop, one for which it holds, where there is one."""
        missed, first = None, None
        if self.shares:
            first, missed = self._to_costs(table)
        if self.max_drop is not None:
            return self._within_drop(table, first)
        whole = first or self._finish(table.teacher, None)
        return Found(whole, self.session.measures.compared(whole.entry), missed)

    def _to_costs(self, table: Table) -> tuple[Whole, str | None]:
        """The least loss at these costs."""
        missed: str | None = None
        try:
            choice, latency = self._measured(table, self._under_costs)
        except SearchError as error:
            missed = str(error)
            choice, latency = self._measured(table, self._nearest)
        whole = self._finish(choice, latency)
        self.on_better(whole)
        return whole, missed or self._over(whole)

    def _within_drop(self, table: Table, first: Whole | None) -> Found:
        """The smallest student that keeps the promise; where a target was missed with it, the nearest to that."""
        assert self.max_drop is not None
        measures, choices = self.session.measures, {}

        def propose(allowed: float) -> Whole:
            choice, latency = self._measured(table, lambda t: self._under_drop(t, allowed))
            whole = self._finish(choice, latency)
            choices[whole.entry.key] = choice
            return whole

        def is_last(whole: Whole) -> bool:
            smallest = self._is_smallest(table, choices[whole.entry.key])
            return smallest or (bool(self.shares) and self._over(whole) is None)

        promise = Promise(
            self.max_drop,
            self._corrections(),
            propose,
            lambda whole: whole.loss.bound,
            lambda whole, confidence: measures.confirmed(whole.entry, confidence).bound,
            lambda whole: whole.entry.key,
            is_last,
        )
        kept = promise.keep(self._first_allowance(table), first)
        best = min(kept, key=self._worth) if kept else promise.nearest
        self.on_better(best)
        told = measures.tested(best.entry)
        if kept:
            over = self._over(best)
            both = None if over is None else f"{over} and a drop of at most {self.max_drop:.2%} cannot both be had"
            return Found(best, told, both)
        missed = (
            f"a drop of at most {self.max_drop:.2%} was not confirmed: the best student's may be {told.bound:.2%} "
            f"(measured {told.drop:.2%} on {measures.confirming.count} samples that nothing else saw)"
        )
        return Found(best, told, missed)

    def _under_costs(self, table: Table) -> Choice:
        bounds = table.bounds(self.shares)
        greedy = self.session.run.recipe.search.solver == "greedy"
        return greedy_to(table, bounds, self.cost) if greedy else solve(table, bounds=bounds)

    def _under_drop(self, table: Table, allowed: float) -> Choice:
        if self.shares:
            return nearest(table, table.bounds(self.shares), allowed)
        greedy = self.session.run.recipe.search.solver == "greedy"
        return greedy_under(table, allowed, self.cost) if greedy else solve(table, self.cost, max_drop=allowed)

    def _measured(self, table: Table, choose: Callable[[Table], Choice]) -> tuple[Choice, float | None]:
        """A choice corrected by what it comes to as a whole, as far as a target or its bits call for that."""
        if self.session.precision is None or not self.shares:
            return self._timed(table, choose)
        timed = "latency" in self.shares
        attempts = self.session.run.recipe.search.attempts
        by_whole = Corrections(
            self.shares, lambda choice: self.session.composed(choice.candidates, timed=timed), attempts
        )
        rivals = [everywhere_in_bits(table)]
        with suppress(SearchError):
            rivals.append(by_whole.best(table.of_bits(32), choose, self._nearest)[0])
        choice, found = by_whole.best(table, choose, self._nearest, rivals)
        return choice, found.latency if timed else None

    def _nearest(self, table: Table) -> Choice:
        return nearest(table, table.bounds(self.shares))

    def _timed(self, table: Table, choose: Callable[[Table], Choice]) -> tuple[Choice, float | None]:
        """A choice whose latency was measured on the whole student, corrected until it is what was predicted."""
        if "latency" not in self.shares:
            return choose(table), None
        target, best = self.shares["latency"], None
        for _ in range(self.session.run.recipe.search.attempts + 1):
            out_of_reach = False
            try:
                choice = choose(table)
            except SearchError:
                if best is None:
                    raise
                choice, out_of_reach = nearest(table, table.bounds(self.shares)), True
            measured = self.session.measures.time_of_whole(self.session.spliced(choice.candidates))[1]
            if best is None or _miss(measured, target) < _miss(best[1], target):
                best = choice, measured
            saving = 1 - table.share(choice, "latency")
            if out_of_reach or _CLOSE * target <= measured <= target or saving <= 0 or measured >= 1:
                break
            table = table.corrected("latency", (1 - measured) / saving)
        assert best is not None
        return best

    def _finish(self, choice: Choice, latency: float | None) -> Whole:
        return self.session.finish(choice.candidates, in_full=self.in_full, latency=latency)

    def _over(self, whole: Whole) -> str | None:
        over = [f"{cost}={part:g} (reached {whole.shares[cost]:.4g})" for cost, part in self.shares.items()
                if whole.shares[cost] > part * (1 + _SLACK.get(cost, 0.0))]  # fmt: skip
        return f"not reached: {', '.join(over)}" if over else None

    def _worth(self, whole: Whole) -> float:
        """Less is better: how far over the targets, or what it costs."""
        if self.shares:
            return max(whole.shares[cost] / part for cost, part in self.shares.items())
        return whole.shares[self.cost]

    def _is_smallest(self, table: Table, choice: Choice) -> bool:
        """Whether every neighbourhood has its cheapest candidate."""
        return all(
            choice.candidates[name] == min(table.options(name), key=lambda option: option.costs[self.cost]).candidate
            for name in table.neighbourhoods
        )

    def _first_allowance(self, table: Table) -> float:
        """The allowed drop in the unit of the table's losses: what single candidates with about that drop lose."""
        assert self.max_drop is not None
        recipe = self.session.run.recipe.search
        if recipe.quality == "metric":
            return max(self.max_drop, 1e-9)
        drops = self.session.library.losses()
        losses = {(o.neighbourhood, o.candidate): o.loss for name in table.neighbourhoods for o in table.options(name)}
        pairs = [(drops[key].drop, loss) for key, loss in losses.items() if key in drops and drops[key].drop > 0]
        near = [pair for pair in pairs if self.max_drop / 4 <= pair[0] <= 4 * self.max_drop] or pairs
        if not near:
            return max(max(losses.values(), default=0.0), 1e-9)
        return max(self.max_drop * median(loss / drop for drop, loss in near), 1e-9)

    def _corrections(self) -> int:
        """As many as the recipe allows; none where so few samples can confirm nothing, whatever is tried."""
        assert self.max_drop is not None
        rows, attempts = self.session.measures.confirming, self.session.run.recipe.search.attempts
        if rows.kind == "nmse" or least_bound(attempts, rows.count) <= self.max_drop:
            return attempts
        least = least_bound(0, rows.count)
        if least > self.max_drop:
            self.session.run.progress.note(
                f"{rows.count} samples to test a promise on cannot show that a drop is at most {self.max_drop:.2%}: "
                f"without a single difference it may still be {least:.2%}; give more data, or raise samples under "
                "[search]"
            )
        return 0


_SLACK = {"latency": 0.05}
"""A time is never measured twice the same."""


def _miss(measured: float, target: float) -> float:
    return measured / target if measured > target else (target - measured) / target / 1e3
