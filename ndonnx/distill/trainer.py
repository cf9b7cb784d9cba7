"""Gradient descent on one module: seeded, best held-out state kept, NaN stopped, weights held to their constraint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ndonnx.convert import TorchSlice
from ndonnx.distill.formats import LEAST_STEPS, Format, fastest, is_too_coarse, rivals, usual
from ndonnx.distill.gradients import Slope, ThreadPool
from ndonnx.distill.heldout import Errors, HeldOut
from ndonnx.distill.losses import Objective, nmse, target_variance
from ndonnx.distill.optimiser import Optimiser
from ndonnx.distill.plan import Plan
from ndonnx.distill.rates import Pace, at_lower_rate, best_rate, is_too_high, trial_of
from ndonnx.distill.samples import Samples
from ndonnx.distill.steps import samples_in_memory
from ndonnx.errors import TrainingError
from ndonnx.runtime.machine import computes_in_bf16
from ndonnx.students import Constraint

OnStep = Callable[[int, int, float], None]
"""Step, steps, held-out NMSE so far."""

_EVALUATIONS = 20
"""Times that the held-out error is measured during a training."""
_LEAST_EVALUATIONS = 5
"""The same where a time is given that many would take too much of."""
_EVALUATING = 0.1
"""Part of a given time that measuring may take."""
_LEAST_SECONDS = 1e-3
"""Of a training whose time its trials have used up."""
_GRADIENT = 6
"""Operations of a gradient for each multiply-accumulate of the answer: forwards, and twice that backwards."""


@dataclass(frozen=True)
class Training:
    """What came out: held-out errors before and after, and where the best state was found."""

    nmse_start: float
    """Normalised squared error of the target before the first step, whatever the objective."""
    nmse: float
    loss_start: float
    """The objective's value."""
    loss: float
    best_step: int
    steps: int
    seconds: float
    curve: Sequence[tuple[int, float]] = ()
    """Steps at which the held-out NMSE was measured, with what it was; not finite values are left out."""
    format: str | None = None
    """Number format and memory layout of its steps, in words; None where there were none."""
    lr: float | None = None
    """Peak learning rate: as it was given, as short trials found it, or as low as it was set on the way."""

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Training:
        """From what `dataclasses.asdict` made of one, by way of JSON."""
        return cls(**{**document, "curve": points(document.get("curve", ()))})


def points(curve: Sequence[Sequence[float]]) -> tuple[tuple[int, float], ...]:
    """A curve as JSON has it, (step, error) each, as tuples."""
    return tuple((int(step), float(error)) for step, error in curve)


def learning_rate(done: float, plan: Plan) -> float:
    """Relative step size: linear warm-up, then half a cosine down to zero; `done` is the part that is over, 0 to 1."""
    first = 1 / max(1, plan.steps)
    rise = min(1.0, (done + first) / max(plan.warmup, first))
    return plan.lr * rise * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def train(
    module: TorchSlice,
    samples: Samples,
    objective: Objective,
    plan: Plan,
    on_step: OnStep,
    constraint: Constraint | None = None,
) -> Training:
    """Train in place; the module ends in its best held-out state, never worse than it began.

    With a constraint, the beginning is the start on which it was imposed at once, and nothing is measured, so
    that nothing can be enough, before its pattern is settled. On a CPU each of the plan's
    threads takes a part of every batch: inside the operators of small modules threads gain nothing,
    and lose a lot as soon as another process takes one of their cores.

    Args:
        module: with its multiplications for one sample (`macs`), by which the plan's optimiser judges what is cheap.
        samples: captured inputs and targets.
        objective: the loss.
        plan: how long, how fast, on what.
        on_step: told the step, the steps and the held-out NMSE of the target.
        constraint: what the weights have to fulfil.

    Raises:
        TrainingError: the held-out error of the start is NaN or Inf, or the loss becomes so, at a rate that was given
            or at whatever rate.
    """
    torch.manual_seed(plan.seed)
    device = torch.device(plan.device)
    module.to(device)
    objective.to(device)
    before = torch.get_num_threads()
    pool = ThreadPool(plan.threads if device.type == "cpu" else 1)
    try:
        format = usual(bf16=plan.bf16, device=device.type)
        return _Descent(module, samples, objective, plan, constraint, pool, format).run(on_step)
    finally:
        pool.close()
        torch.set_num_threads(before)


class _Course:
    """What was measured of a training on its way, and its best state."""

    def __init__(self, module: TorchSlice, start: Errors) -> None:
        self._module, self._state = module, _copy(module)
        self.start = self.best = self.last = start
        self.step = 0
        """At which it was best."""
        self._curve = [(0, start.nmse)]

    @property
    def told(self) -> tuple[tuple[int, float], ...]:
        """Steps with their held-out NMSE where that is finite."""
        return tuple(point for point in self._curve if math.isfinite(point[1]))

    @property
    def broke_down(self) -> bool:
        """Whether all that was measured after the start is NaN or Inf."""
        return len(self._curve) > 1 and not any(math.isfinite(error) for _, error in self._curve[1:])

    def take(self, step: int, errors: Errors) -> None:
        """Take in what the module has come to."""
        self.last = errors
        self._curve.append((step, errors.nmse))
        if errors.loss < self.best.loss:
            self.best, self.step, self._state = errors, step, _copy(self._module)

    def go_back(self) -> None:
        """Put the module into its best state."""
        _restore(self._module, self._state)

    def is_enough(self, plan: Plan) -> bool:
        """Whether the best is as near as was asked for."""
        return plan.enough is not None and self.best.nmse <= plan.enough


@dataclass(frozen=True)
class _Descent:
    """One training: the steps, and the best of the states that were measured on the way."""

    module: TorchSlice
    samples: Samples
    objective: Objective
    plan: Plan
    constraint: Constraint | None
    pool: ThreadPool
    format: Format

    def run(self, on_step: OnStep) -> Training:
        began = time.perf_counter()
        module, plan, constraint, descent = self.module, self.plan, self.constraint, self
        held = self._held()
        free = _copy(module)
        if constraint is not None:
            impose(constraint, module, 1.0)
        clock = time.perf_counter()
        start = held.errors()
        seconds = time.perf_counter() - clock
        apart = _apart(seconds, plan)
        if not math.isfinite(start.loss):
            raise TrainingError(
                f"the held-out error is {start.loss} before the first step; the captured activations overflow"
            )
        course, steps = _Course(module, start), 0
        _restore(module, free)
        trainable = any(weight.requires_grad for weight in module.parameters())
        pace = Pace(seconds / max(1, held.count))
        if plan.steps and trainable and pace.has_room(plan, plan.worth) and not course.is_enough(plan):
            descent = self._tuned(held, start.nmse, pace)
            descent, steps = descent._down(course, held, on_step, apart)
        course.go_back()
        module.to("cpu")
        best, how = course.best, str(descent.format) if steps else None
        taken, rate = time.perf_counter() - began, descent.plan.lr
        return Training(start.nmse, best.nmse, start.loss, best.loss, course.step, steps, taken, course.told, how, rate)

    def _down(self, course: _Course, held: HeldOut, on_step: OnStep, apart: float) -> tuple[_Descent, int]:
        """Run all steps, from the best state again at a lower rate where one that was not tried leads nowhere.

        Returns:
            The training at its last rate, and the steps of all.
        """
        descent, before = self, 0
        while True:
            plan, began, number, done = descent.plan, time.perf_counter(), 0, 0.0
            for number, done in descent._steps(plan, apart):
                if self.constraint is None or done >= self.constraint.settled:
                    course.take(before + number, held.errors())
                on_step(before + number, before + _expected_steps(number, done, plan), course.best.nmse)
                if course.is_enough(plan) or descent._is_lost(done, course):
                    break
            before += number
            if course.is_enough(plan) or not descent._is_lost(done, course):
                break
            course.go_back()
            descent = replace(descent, plan=_shortened(at_lower_rate(plan, number), began))
        if course.broke_down:
            raise TrainingError(f"the loss became {course.last.loss} by step {before}, at whatever rate")
        return descent, before

    def _is_lost(self, done: float, course: _Course) -> bool:
        """Whether the training is better begun again from its best state, at a lower rate."""
        return self._is_guessed and is_too_high(done, course.last.loss, course.start.loss)

    @property
    def _is_guessed(self) -> bool:
        """Whether nobody has said or tried the rate, and whatever is measured of it counts."""
        return self.plan.tries and (self.constraint is None or self.constraint.settled == 0)

    def _held(self) -> HeldOut:
        module, samples, objective = self.module, self.samples, self.objective
        device = torch.device(self.plan.device)
        return HeldOut(module, samples, objective, self.pool, device=device, at_once=self.at_once)

    def _tuned(self, held: HeldOut, error: float, pace: Pace) -> _Descent:
        """What is left of the training, in the fastest format and at the best rate, where these are to be found."""
        descent, timed = self, self.plan.fastest and self.plan.seconds is not None
        if timed and pace.has_room(self.plan, LEAST_STEPS):
            descent = self._in_fastest_format(error)
        if self.plan.tries and pace.has_room(self.plan):
            descent = replace(descent, plan=descent._tried(held, pace))
        return descent

    def _in_fastest_format(self, error: float) -> _Descent:
        """The same in the format in which a gradient takes least time; the module stays as it is."""
        began = time.perf_counter()
        rows = next(_batches(self.samples, self.plan))
        shapes = self.samples.shapes(self.samples.inputs)
        formats = rivals([len(shape) for shape in shapes.values()], bf16=computes_in_bf16(self.plan.device))
        slopes = {format: replace(self, format=format)._slope() for format in formats}

        def seconds(format: Format) -> float:
            clock = time.perf_counter()
            slopes[format].descend(rows)
            return time.perf_counter() - clock

        best = fastest(formats, seconds, lambda: is_too_coarse(self._rounding(rows), error))
        return replace(self, format=best, plan=_shortened(self.plan, began))

    def _rounding(self, rows: np.ndarray) -> float:
        """NMSE of the module's answers in bfloat16 beside those in float32, on one batch."""
        batch, device = self.samples.batch(rows[: self.at_once]), torch.device(self.plan.device)
        held, inputs = {name: Format().held(tensor, device) for name, tensor in batch.items()}, self.samples.inputs
        answers = []
        with torch.no_grad():
            for bf16 in (False, True):
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    answer = self.module(*(Format(bf16).held(batch[name], device) for name in inputs))
                    answers.append(self.objective.compared(answer.float(), held))
        exact, rounded = answers
        return nmse(float((exact - rounded).double().square().mean()), target_variance(exact))

    def _tried(self, held: HeldOut, pace: Pace) -> Plan:
        """Try rates from where the module stands, and leave it at the end of the best trial, where that is better.

        Returns:
            The plan of what is left of the training, at the best rate.
        """
        began, free, rows = time.perf_counter(), _copy(self.module), pace.compared(self.plan)
        ends = {0.0: (held.errors(rows).loss, free)}

        def loss_at(rate: float) -> float:
            _restore(self.module, free)
            try:
                for _ in self._steps(trial_of(self.plan, rate), 1.0):
                    pass
            except TrainingError:  # far too high a rate
                return math.inf
            loss = held.errors(rows).loss
            ends[rate] = loss if math.isfinite(loss) else math.inf, _copy(self.module)
            return ends[rate][0]

        rate = best_rate(loss_at, self.plan.lr)
        start, end = ends[0.0], ends.get(rate, (math.inf, free))
        _restore(self.module, min(start, end, key=lambda each: each[0])[1] if self.constraint is None else free)
        return replace(_shortened(self.plan, began), lr=rate, tries=False)

    def _steps(self, plan: Plan, apart: float) -> Iterator[tuple[int, float]]:
        """Run the steps; yield the step and the part that is over whenever the held-out error is to be measured."""
        slope, clock, measured = self._slope(), _Clock(plan), 0.0
        optimiser = self._optimiser(slope.weights)
        for step, rows in enumerate(_batches(self.samples, plan), start=1):
            loss = slope.descend(rows)
            optimiser.step(learning_rate(clock.done, plan))
            clock.tick(step)
            if self.constraint is not None:
                impose(self.constraint, self.module, clock.done)
            if clock.done >= 1 or clock.done - measured >= apart - 1e-9:
                measured = clock.done
                if not math.isfinite(loss) and not self._is_guessed:
                    raise TrainingError(f"the loss became {loss} by step {step}; lower --lr")
                yield step, clock.done
            if clock.done >= 1:
                return

    def _slope(self) -> Slope:
        return Slope(self.module, self.samples, self.objective, self.plan, self.pool, self.format, self.at_once)

    def _optimiser(self, weights: list[nn.Parameter]) -> Optimiser:
        module, plan = self.module, self.plan
        held = set() if self.constraint is None else set(self.constraint.held())
        masked = [weight for name, weight in zip(module.weight_names, module.weights, strict=True) if name in held]
        work = _GRADIENT * module.macs * plan.batch_size
        return Optimiser(weights, work, muon=plan.optimiser == "muon", masked=masked)

    @cached_property
    def at_once(self) -> int:
        """Number of samples whose gradient a thread computes at a time."""
        if self.plan.device != "cpu":
            return self.plan.batch_size
        count = self.pool.count
        return samples_in_memory(self.module, self.samples, self.objective, self.plan, count, self.format)


def _shortened(plan: Plan, began: float) -> Plan:
    """The plan with the time that has gone by since a reading of the clock taken off."""
    if plan.seconds is None:
        return plan
    return replace(plan, seconds=max(_LEAST_SECONDS, plan.seconds - (time.perf_counter() - began)))


def _apart(seconds: float, plan: Plan) -> float:
    """The part of a training between two measurements of the held-out error, when one takes so many seconds."""
    if plan.seconds is None:
        return 1 / _EVALUATIONS
    count = _EVALUATING * plan.seconds / max(seconds, 1e-9)
    return 1 / min(_EVALUATIONS, max(_LEAST_EVALUATIONS, count))


def _expected_steps(step: int, done: float, plan: Plan) -> int:
    """Steps that a training will have had: the plan's, or as many as its time has room for at the pace so far."""
    if done >= 1:
        return step
    if plan.seconds is None:
        return plan.steps
    return min(plan.steps, max(step + 1, round(step / done)))


def impose(constraint: Constraint, module: TorchSlice, done: float) -> None:
    """Hold a module's weights to a constraint."""
    with torch.no_grad():
        weights = {name: weight.data for name, weight in zip(module.weight_names, module.weights, strict=True)}
        constraint.impose(weights, done)


class _Clock:
    """The part of a training that is over: of its steps, or of its time where that is further on."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._began = time.perf_counter()
        self.done = 0.0

    def tick(self, step: int) -> None:
        self.done = step / self._plan.steps
        if self._plan.seconds is not None:
            elapsed = time.perf_counter() - self._began
            self.done = max(self.done, elapsed / self._plan.seconds)
        self.done = min(1.0, self.done)


def _batches(samples: Samples, plan: Plan) -> Iterator[np.ndarray]:
    """Rows of each step: every epoch a new order, sorted inside a batch so that the disk is read forwards."""
    rng = np.random.default_rng(plan.seed)
    first, last = samples.blocks.holdout, samples.blocks.samples
    size = min(plan.batch_size, last - first)
    order, position = np.empty(0, dtype=np.int64), 0
    for _ in range(plan.steps):
        if position + size > len(order):
            order, position = samples.order(rng, size), 0
        yield np.sort(order[position : position + size])
        position += size


def _copy(module: TorchSlice) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def _restore(module: TorchSlice, state: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, kept in zip(module.parameters(), state, strict=True):
            parameter.copy_(kept)
