"""Learning rates found by short trials: no one rate suits all modules, and a trial of a few steps shows which does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ndonnx.distill.plan import Plan

_FACTOR = 3.0
"""From one rate to the next."""
_LOWER = 5
"""Most trials below the first rate; there is at most one above it."""
_PATIENCE = 2
"""Trials in a row that are worse, which end the way down."""
_PART = 0.03
"""Of a training, that each trial takes. Measured on six slices of a ResNet-20, an audio model and an embedder of
text, 500 to 1,500 steps: the best of five rates after a fiftieth of the steps was the best, or as good, after all."""
_LEAST_STEPS = 1000
"""Of a training, from which there are trials. In the few steps that a shorter one has for them a low rate ends lower,
whatever is best in the end: a line classifier and a ResNet-20, 24 to 160 steps, took rates a tenth of the best, and a
reader of text, 417 steps of the whole, one of a thirtieth of the best that is known."""
_JUDGED, _LOST, _LOWERED = 0.1, 1.5, 5.0
"""Part of a training whose rate was not tried after which it is judged, the loss over that of the start by which it is
too high, and how much lower it is then. Of 27 slices of those two and of an embedder of text, 80 steps at 0.1, all
below that ended under their start, and of the others but one none."""
_COMPARING = 0.5
"""Time for comparing trials, over theirs."""
_GRADIENT = 3
"""Time of a gradient over that of an answer, about."""


@dataclass(frozen=True)
class Pace:
    """How fast a module is, from which follows whether there is room for trials, and what they are compared on."""

    seconds_a_sample: float
    """Of an answer, measured; a gradient takes about three times as long."""

    def has_room(self, plan: Plan, least: int = _LEAST_STEPS) -> bool:
        """Whether a training has so many steps that something may be tried out first."""
        return self._steps(plan) >= least

    def compared(self, plan: Plan) -> int:
        """Held-out samples that trials are compared on: their answers take half of a trial's time."""
        return max(1, round(_COMPARING * _PART * self._steps(plan) * _GRADIENT * plan.batch_size))

    def _steps(self, plan: Plan) -> float:
        """The plan's steps, or as many as its time has room for."""
        if plan.seconds is None:
            return plan.steps
        return min(plan.steps, plan.seconds / max(1e-12, _GRADIENT * plan.batch_size * self.seconds_a_sample))


def trial_of(plan: Plan, rate: float) -> Plan:
    """A whole training, warm-up and fall of the rate included, in a small part of the steps or of the time."""
    seconds = None if plan.seconds is None else _PART * plan.seconds
    return replace(plan, steps=max(1, round(_PART * plan.steps)), seconds=seconds, lr=rate)


def is_too_high(done: float, loss: float, start: float) -> bool:
    """Whether a rate that was not tried is too high, by what it has led to when a part of the training is over.

    Args:
        done: the part, 0 to 1; at 1 there is no time for another.
        loss: measured then.
        start: the loss before the first step.
    """
    return _JUDGED <= done < 1 and not loss - start <= (_LOST - 1) * abs(start)


def at_lower_rate(plan: Plan, steps: int) -> Plan:
    """What is left of a training after so many steps, at a lower rate; its time is the caller's to take off."""
    return replace(plan, steps=max(1, plan.steps - steps), lr=plan.lr / _LOWERED)


def best_rate(loss_at: Callable[[float], float], first: float) -> float:
    """The rate whose trial ends lowest: from the first one down as long as that helps; where it does not, up.

    One that is worse does not end the way down, two are needed: what died at once may end lower than what still lives.

    Args:
        loss_at: runs a trial at a rate; its loss, infinite where it broke down.
        first: the rate to begin with.
    """
    best, least, worse = first, loss_at(first), 0
    for number in range(1, _LOWER + 1):
        rate = first / _FACTOR**number
        loss = loss_at(rate)
        worse = worse + 1 if loss > least else 0
        if worse == _PATIENCE:
            break
        if not worse:
            best, least = rate, loss
    if best == first and loss_at(first * _FACTOR) < least:
        best = first * _FACTOR
    return best
