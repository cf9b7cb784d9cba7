"""What a run makes of how much its neighbourhoods bear: no training beyond need, time where it matters, warnings.

A tolerance is of one neighbourhood alone, and many are replaced. Where errors are small, the divergence of the answers
grows in proportion to the NMSE at an exit, and what several exits cost adds up. So each of n places has 1/n of its
tolerance, and all together cost what one alone may. Drops that are flat at first, as the thresholding effect has
them, cost less than that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from ndonnx.distill.plan import Plan
from ndonnx.flow.jobs import NeighbourhoodResult
from ndonnx.flow.measure import Loss
from ndonnx.metrics.sensitivity import StudyFile
from ndonnx.partition import Neighbourhood, Partition
from ndonnx.runtime.progress import Progress

_LEAST_TIME = 1 / 3
"""Part of its even share of a time budget that every neighbourhood has, however much it tolerates."""
_LEAST_NMSE = 1e-9
"""Tolerances below are alike."""
_SHARE = 0.25
"""Part of a drop up to which no training is worth its time. The rest is for students that cannot come so near, for
errors that add up to more than their sum, and for the confidence bound by which a drop is tested."""
_MOST_NMSE = 1.0
"""An answer that is the same for every sample has it: nothing with more is trained enough."""
_NEAR = 4.0


@dataclass(frozen=True)
class Need:
    """How near a student has to come to its teacher."""

    tolerance: float
    """The NMSE that costs no more than the allowed drop, in this place alone."""
    enough: float
    """Its share of the tolerance where all neighbourhoods are replaced: under it, no training is worth its time."""

    def told(self, outcome: NeighbourhoodResult, planned: Plan) -> NeighbourhoodResult:
        """How a neighbourhood ended, with its tolerance and the steps that were not needed."""
        steps = None
        if outcome.result is not None and planned.seconds is None:
            steps = max(0, planned.steps - outcome.result.steps)
        return replace(outcome, tolerance=self.tolerance, steps_saved=steps)


class ErrorBudgets:
    """What the neighbourhoods of a partition bear, as a study has found it."""

    def __init__(self, study: StudyFile, parts: Partition) -> None:
        """Match a study with a partition.

        Raises:
            UsageError: it is of another one.
        """
        self._study = study
        self._exits = {n.name: n.exit.name or "" for n in parts.distillable if n.exit is not None}
        # A study looks at neighbourhoods with a width; among others they may have other names.
        named = {value: name for name, value in study.exits.items()}
        measured = [n.name for n in parts.distillable if n.widths or self._exits[n.name] in named]
        theirs = {named.get(self._exits[name], name): name for name in measured}
        found = study.budgets_of({name: self._exits[ours] for name, ours in theirs.items()})
        self._budgets = {theirs[name]: budget for name, budget in found.items()}

    def need(self, name: str) -> Need | None:
        """How near the student of a neighbourhood has to come; None where that could not be measured."""
        budget = self._budgets.get(name)
        return None if budget is None else Need(budget.nmse, budget.nmse / len(self._exits))

    def plan(self, name: str, even: Plan, at_once: int) -> Plan:
        """The plan of a neighbourhood: until it is near enough, in a time that is the longer the less it tolerates.

        Args:
            name: of the neighbourhood.
            even: the plan that all have without tolerances.
            at_once: how many are trained at a time.
        """
        need = self.need(name)
        plan = even if need is None else replace(even, enough=need.enough)
        return plan if even.seconds is None else replace(plan, seconds=self._seconds(even.seconds, at_once)[name])

    def compared(
        self, n: Neighbourhood, outcome: NeighbourhoodResult, planned: Plan, progress: Progress
    ) -> NeighbourhoodResult:
        """An outcome with what it is measured against, and a note where a student is beyond it."""
        need = self.need(n.name)
        if need is not None and outcome.tolerance is None:
            outcome = need.told(outcome, planned)
        warning = self._warning(n.name, outcome)
        if warning is not None:
            progress.note(f"{n.name}: {warning}")
        return replace(outcome, warning=warning)

    def _seconds(self, even: float, at_once: int) -> dict[str, float]:
        """Seconds of each, as many in all as if all had the same."""
        weights = {name: 1 / max(budget.nmse, _LEAST_NMSE) for name, budget in self._budgets.items()}
        typical = median(weights.values()) if weights else 1.0
        longest = even * len(self._exits) / min(at_once, len(self._exits))  # all of the time that there is
        shares = shared([weights.get(name, typical) for name in self._exits], even, _LEAST_TIME * even, longest)
        return dict(zip(self._exits, shares, strict=True))

    def _warning(self, name: str, outcome: NeighbourhoodResult) -> str | None:
        budget, result = self._budgets.get(name), outcome.result
        if budget is None or budget.limit is None or result is None or result.nmse <= budget.limit:
            return None
        drop, value = f"{100 * self._study.max_drop:.4g}%", self._exits[name]
        return (
            f"an NMSE of {result.nmse:.3g} at {result.candidate}, where {budget.limit:.3g} alone costs {drop}: "
            f"keep more of it (--max-drop {drop} searches how much of each), or freeze it (--freeze {value})"
        )


def shared(weights: Sequence[float], mean: float, least: float, most: float) -> list[float]:
    """Numbers in proportion to weights above 0, but from `least` to `most`, with this mean between the two."""
    low, high = math.log(least / max(weights)), math.log(most / min(weights))
    total = mean * len(weights)
    for _ in range(100):
        middle = (low + high) / 2
        found = [min(most, max(least, math.exp(middle) * weight)) for weight in weights]
        low, high = (middle, high) if math.fsum(found) < total else (low, middle)
    return found


def allowed_divergence(losses: Iterable[Loss], max_drop: float) -> float:
    """The divergence that goes with a drop: that of single students with about this drop.

    A drop is what a user allows, but only the divergence is in proportion to small errors.
    """
    finite = [loss for loss in losses if math.isfinite(loss.drop) and math.isfinite(loss.divergence)]
    pairs = [(loss.drop, loss.divergence) for loss in finite if loss.drop > 0]
    near = [pair for pair in pairs if max_drop / _NEAR <= pair[0] <= _NEAR * max_drop] or pairs
    if not near:
        return max((loss.divergence for loss in finite), default=0.0)
    return max_drop * median(divergence / drop for drop, divergence in near)


def measured_need(allowed: float, sensitivity: float, places: int) -> Need | None:
    """By the divergence that a student's own error causes; None where no error is small enough.

    Args:
        allowed: divergence of the whole.
        sensitivity: divergence per NMSE at the exit, for small errors.
        places: neighbourhoods that may be replaced. Not those of one choice: another choice would train them anew.
    """
    budget = allowed / sensitivity if sensitivity > 0 else math.inf
    enough = min(_MOST_NMSE, _SHARE * budget / places)
    # Two digits say all that is known of it, and the students of a run that measures it again are found again.
    enough = float(f"{enough:.1e}")
    return Need(min(budget, _MOST_NMSE), enough) if enough > 0 else None
