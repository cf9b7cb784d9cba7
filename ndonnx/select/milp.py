"""The exact choice: a 0/1 programme with one binary for each option, solved by HiGHS.

The solver works with tolerances, a promise does not: every answer is added up again exactly, and one
that breaks a bound is forbidden and the programme solved anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ndonnx.errors import SearchError
from ndonnx.select.greedy import keeps, said
from ndonnx.select.table import Choice, Option, Table, undominated

if TYPE_CHECKING:
    from scipy.optimize import LinearConstraint

DROP = "drop"

_SCALE = 1e4
"""Largest coefficient of a row and of the objective: HiGHS's absolute tolerances of 1e-6 are 1e-10 of it."""
_FORBIDDEN = 30
"""TeacherOutputs to forbid one by one before the bounds are tightened too."""
_TIGHTER = 1e-6
"""First tightening of a scaled row; it doubles each time."""
_OPTIMAL, _INFEASIBLE = 0, 2


def solve(
    table: Table, minimise: str = DROP, bounds: Mapping[str, float] | None = None, max_drop: float | None = None
) -> Choice:
    """The choice with the least summed loss, or of the least cost, that keeps all bounds.

    Of equally good ones it is the one with the lowest bounded costs (parts of the teacher's, summed; all costs where
    none is bounded), or with the least loss where a cost is minimised. Equal tables give equal choices.

    Args:
        table: what there is to choose from.
        minimise: `drop`, or the name of a cost.
        bounds: the most that the whole model may cost, absolute, by cost (see `Table.bounds`).
        max_drop: the most that the losses may sum to.

    Raises:
        SearchError: no choice keeps them; the message says what is the least that can be had.
        KeyError: the table has no such cost.
    """
    bounds = dict(bounds or {})
    if max_drop is not None and max_drop < 0:
        raise SearchError(f"no choice has a summed drop of at most {max_drop:.4g}: the teacher's own is 0")
    ties = tuple(bounds) or table.costs
    programme = _Programme.of(table, ties if minimise == DROP else tuple(dict.fromkeys((minimise, *bounds))))
    best = programme.solve(_weights(table, minimise), bounds, max_drop)
    if best is None:
        raise SearchError(_why_not(table, bounds, max_drop))
    if minimise == DROP:
        # Its scale leaves out what loses more than this answer, which may be worse by orders of magnitude.
        best = programme.solve(_weights(table, DROP), bounds, best.drop) or best
        second = programme.solve(_weights(table, *ties), bounds, best.drop)
    else:
        second = programme.solve(_weights(table, DROP), {**bounds, minimise: best.totals[minimise]}, max_drop)
    # It allows the first answer: where it has none, that was lost to rounding alone.
    return second or best


def nearest(table: Table, bounds: Mapping[str, float], max_drop: float | None = None) -> Choice:
    """Where not all can be kept: within `max_drop`, the choice whose costs are over their bounds by the least factor.

    Where several are over by the same, the one with the least loss; where all can be kept, as `solve`.
    """
    above = {cost: bound for cost, bound in bounds.items() if bound > 0}
    found = _Programme.of(table, tuple(bounds)).solve({}, above, max_drop, stretched=True)
    if found is None:
        return table.teacher
    factor = max([1.0, *(found.totals[cost] / bound for cost, bound in above.items())])
    # The division rounds: what was found is allowed in any case.
    stretched = {cost: max(factor * bound, found.totals[cost]) for cost, bound in bounds.items()}
    return solve(table, bounds=stretched, max_drop=max_drop)


def _weights(table: Table, *names: str) -> dict[str, float]:
    """An objective: the drop, or the sum of costs as parts of the teacher's."""
    whole = table.teacher.totals
    return {name: 1.0 if name == DROP else 1.0 / (abs(whole[name]) or 1.0) for name in names}


def _why_not(table: Table, bounds: Mapping[str, float], max_drop: float | None) -> str:
    """Which bound is the first that cannot be kept beside those before it, and what it would have to be."""
    kept: dict[str, float] = {}
    for cost, bound in bounds.items():
        least = solve(table, cost, kept, max_drop).totals[cost]
        if least > bound:
            beside = [said(table, kept)] if kept else []
            beside += [f"a summed drop of at most {max_drop:.4g}"] if max_drop is not None else []
            return (
                f"{said(table, {cost: bound})} cannot be reached"
                + (f" with {' and '.join(beside)}" if beside else "")
                + f": {said(table, {cost: least})} is the least; allow more of it"
                + (", allow a larger drop" if max_drop is not None else "")
                + ", or add smaller candidates"
            )
        kept[cost] = bound
    return (
        "the solver found no choice, although there is one: rounding; move the target by a little, or choose greedily"
    )


@dataclass(frozen=True)
class _Row:
    """An inequality: what the taken options add up to is at most `room`, plus `factor` times the common factor."""

    above: NDArray[np.float64]
    room: float
    factor: float

    @property
    def usable(self) -> NDArray[np.bool_]:
        """The options that are not too much by themselves. What cannot be taken must not set the scale."""
        if self.factor:
            return np.ones(len(self.above), bool)
        return self.above <= self.room

    def scaled(self, usable: NDArray[np.bool_], margin: float) -> LinearConstraint:
        """For the solver, in digits that its tolerances fit."""
        from scipy.optimize import LinearConstraint  # noqa: PLC0415  slow to import

        scale = _SCALE / (np.max(self.above, initial=self.factor, where=usable) or 1.0)
        row = np.append(self.above * usable, -self.factor) * scale
        return LinearConstraint(row, ub=self.room * scale - margin)


@dataclass
class _Programme:
    """The binaries of a table, and the rows that say that each neighbourhood has exactly one option."""

    table: Table
    options: list[Option]
    owners: NDArray[np.intp]
    """For each option, its neighbourhood's place."""

    @classmethod
    def of(cls, table: Table, costs: Sequence[str]) -> _Programme:
        """With the options that matter where these costs count."""
        rows = [undominated(table.options(name), costs) for name in table.neighbourhoods]
        owners = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        return cls(table, [option for row in rows for option in row], owners)

    def solve(
        self,
        weights: Mapping[str, float],
        bounds: Mapping[str, float],
        max_drop: float | None,
        *,
        stretched: bool = False,
    ) -> Choice | None:
        """The choice with the least weighted sum within the bounds; None where there is none.

        With `stretched` there is a common factor on the bounds, which is minimised instead.
        """
        forbidden: list[NDArray[np.float64]] = []
        margin = 0.0
        while True:
            taken = self._run(weights, bounds, max_drop, stretched, forbidden, margin)
            if taken is None:
                return None
            choice = self._choice(taken)
            if (stretched or keeps(choice, bounds)) and (max_drop is None or choice.drop <= max_drop):
                return choice
            forbidden.append(taken)
            if len(forbidden) > _FORBIDDEN:
                margin = max(2 * margin, _TIGHTER)

    def _choice(self, taken: NDArray[np.float64]) -> Choice:
        return self.table.choose(
            {option.neighbourhood: option.candidate for option, is_in in zip(self.options, taken, strict=True) if is_in}
        )

    def _run(
        self,
        weights: Mapping[str, float],
        bounds: Mapping[str, float],
        max_drop: float | None,
        stretched: bool,
        forbidden: Sequence[NDArray[np.float64]],
        margin: float,
    ) -> NDArray[np.float64] | None:
        """One answer of the solver, 1 for each option taken; None where it says that there is none."""
        from scipy.optimize import Bounds, LinearConstraint, milp  # noqa: PLC0415  slow to import

        count = len(self.options)
        limits = {**bounds, **({DROP: max_drop} if max_drop is not None else {})}
        rows = [self._row(name, limit, stretched and name != DROP) for name, limit in limits.items()]
        usable = np.all([row.usable for row in rows], axis=0) if rows else np.ones(count, bool)
        constraints = [row.scaled(usable, margin) for row in rows]
        constraints += [LinearConstraint(np.append(taken, 0.0), ub=taken.sum() - 1) for taken in forbidden]
        if count:
            exactly_one = np.zeros((int(self.owners[-1]) + 1, count + 1))
            exactly_one[self.owners, np.arange(count)] = 1
            constraints.append(LinearConstraint(exactly_one, 1, 1))
        answer = milp(
            np.append(self._objective(weights, usable), _SCALE if stretched else 0.0),
            integrality=np.append(np.ones(count), 0.0),
            bounds=Bounds(0, np.append(usable.astype(float), np.inf if stretched else 0.0)),
            constraints=constraints,
            options={"mip_rel_gap": 0},
        )
        if answer.status == _INFEASIBLE:
            return None
        if answer.status != _OPTIMAL:
            raise SearchError(f"the solver gave up: {answer.message}; choose greedily instead")
        taken: NDArray[np.float64] = np.rint(answer.x[:count])
        return taken

    def _objective(self, weights: Mapping[str, float], usable: NDArray[np.bool_]) -> NDArray[np.float64]:
        """What is minimised: a number for each option."""
        total = np.zeros(len(self.options))
        for name, weight in weights.items():
            total += weight * self._measures(name)
        total -= self._least(total)[self.owners]
        return total * usable * (_SCALE / (np.max(total, initial=0.0, where=usable) or 1.0))

    def _row(self, name: str, limit: float, stretched: bool) -> _Row:
        """The row of a limit; only what is above the least of each neighbourhood counts, for the digits' sake."""
        measures = self._measures(name)
        least = self._least(measures)
        fixed = math.fsum([self.table.fixed.get(name, 0.0), *least])
        room = -fixed if stretched else limit - fixed
        # What the subtractions may have rounded away must not lose an answer; one too many is seen when it is added up.
        rounding = 4 * np.finfo(float).eps * (abs(limit) + abs(fixed) + measures.sum())
        return _Row(measures - least[self.owners], room + (rounding if room >= 0 else 0), limit if stretched else 0.0)

    def _measures(self, name: str) -> NDArray[np.float64]:
        """The loss, or a cost, of each option."""
        return np.array([option.loss if name == DROP else option.costs[name] for option in self.options])

    def _least(self, measures: NDArray[np.float64]) -> NDArray[np.float64]:
        """The lowest of each neighbourhood."""
        least = np.full(len(self.table.neighbourhoods), np.inf)
        np.minimum.at(least, self.owners, measures)
        return least
