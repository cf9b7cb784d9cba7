"""Gradient descent on one module: seeded, best held-out state kept, NaN stopped, weights held to their constraint."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ndonnx.convert import TorchSlice
from ndonnx.distill.draws import seeded
from ndonnx.distill.heldout import Errors, HeldOut
from ndonnx.distill.losses import Objective
from ndonnx.distill.optimiser import Optimiser
from ndonnx.distill.plan import Plan
from ndonnx.distill.rates import Pace, best_rate, trial_of
from ndonnx.distill.samples import Samples
from ndonnx.distill.steps import loss_of, samples_in_memory
from ndonnx.errors import TrainingError
from ndonnx.students import Constraint

T = TypeVar("T")
R = TypeVar("R")

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
    lr: float | None = None
    """Peak learning rate, as it was given or as short trials found it."""

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
        TrainingError: the loss, or the held-out error of the start, is NaN or Inf.
    """
    torch.manual_seed(plan.seed)
    device = torch.device(plan.device)
    module.to(device)
    objective.to(device)
    before = torch.get_num_threads()
    pool = _ThreadPool(plan.threads if device.type == "cpu" else 1)
    try:
        return _Descent(module, samples, objective, plan, constraint, pool).run(on_step)
    finally:
        pool.close()
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Descent:
    """One training: the steps, and the best of the states that were measured on the way."""

    module: TorchSlice
    samples: Samples
    objective: Objective
    plan: Plan
    constraint: Constraint | None
    pool: _ThreadPool

    def run(self, on_step: OnStep) -> Training:
        began = time.perf_counter()
        module, plan, constraint = self.module, self.plan, self.constraint
        held = self._held()
        free = _copy(module)
        if constraint is not None:
            impose(constraint, module, 1.0)
        clock = time.perf_counter()
        start = best = held.errors()
        seconds = time.perf_counter() - clock
        apart = _apart(seconds, plan)
        if not math.isfinite(start.loss):
            raise TrainingError(
                f"the held-out error is {start.loss} before the first step; the captured activations overflow"
            )
        best_step, state = 0, _copy(module)
        _restore(module, free)
        step, curve = 0, [(0, start.nmse)]
        trainable = any(weight.requires_grad for weight in module.parameters())
        if plan.steps and trainable and not _is_enough(best, plan):
            pace = Pace(seconds / max(1, held.count))
            if pace.has_room(plan):
                plan = self._tried(held, pace)
            for step, done in self._steps(plan, apart):
                if constraint is None or done >= constraint.settled:
                    errors = held.errors()
                    curve.append((step, errors.nmse))
                    if errors.loss < best.loss:
                        best, best_step, state = errors, step, _copy(module)
                on_step(step, _expected_steps(step, done, plan), best.nmse)
                if _is_enough(best, plan):
                    break
        _restore(module, state)
        module.to("cpu")
        seconds = time.perf_counter() - began
        told = tuple(point for point in curve if math.isfinite(point[1]))
        return Training(start.nmse, best.nmse, start.loss, best.loss, best_step, step, seconds, told, plan.lr)

    def _held(self) -> HeldOut:
        module, samples, objective = self.module, self.samples, self.objective
        device = torch.device(self.plan.device)
        return HeldOut(module, samples, objective, self.pool, device=device, at_once=self.at_once)

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
        spent = time.perf_counter() - began
        left = None if self.plan.seconds is None else max(_LEAST_SECONDS, self.plan.seconds - spent)
        return replace(self.plan, lr=rate, seconds=left)

    def _steps(self, plan: Plan, apart: float) -> Iterator[tuple[int, float]]:
        """Run the steps; yield the step and the part that is over whenever the held-out error is to be measured."""
        slope, clock, measured = _Slope(self), _Clock(plan), 0.0
        optimiser = self._optimiser(slope.weights)
        for step, rows in enumerate(_batches(self.samples, plan), start=1):
            loss = slope.descend(rows)
            optimiser.step(learning_rate(clock.done, plan))
            clock.tick(step)
            if self.constraint is not None:
                impose(self.constraint, self.module, clock.done)
            if clock.done >= 1 or clock.done - measured >= apart - 1e-9:
                measured = clock.done
                if not math.isfinite(loss):
                    raise TrainingError(f"the loss became {loss} by step {step}; lower --lr")
                yield step, clock.done
            if clock.done >= 1:
                return

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
        return samples_in_memory(self.module, self.samples, self.objective, self.plan, count, bf16=self.plan.bf16)


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


def _is_enough(best: Errors, plan: Plan) -> bool:
    return plan.enough is not None and best.nmse <= plan.enough


def impose(constraint: Constraint, module: TorchSlice, done: float) -> None:
    """Hold a module's weights to a constraint."""
    with torch.no_grad():
        weights = {name: weight.data for name, weight in zip(module.weight_names, module.weights, strict=True)}
        constraint.impose(weights, done)


class _ThreadPool:
    """Threads that each do a part of the same thing, one torch thread each."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ThreadPoolExecutor | None = None
        if count > 1:
            torch.set_num_threads(1)
            self._pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))

    def map(self, work: Callable[[T], R], parts: Sequence[T]) -> list[R]:
        """The results in the order of the parts."""
        if self._pool is None or len(parts) == 1:
            return [work(part) for part in parts]
        return list(self._pool.map(work, parts))

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


class _Slope:
    """Gradients of a batch, each lane's from its own samples; their sum does not depend on who is faster."""

    def __init__(self, descent: _Descent) -> None:
        self._module = descent.module
        self._samples = descent.samples
        self._objective = descent.objective
        self._device = torch.device(descent.plan.device)
        self._bf16 = descent.plan.bf16
        self._seed = descent.plan.seed
        self._parts = itertools.count()
        self._pool = descent.pool
        self._at_once = descent.at_once
        self.weights = [weight for weight in descent.module.parameters() if weight.requires_grad]

    def descend(self, rows: np.ndarray) -> float:
        """Put the gradients into the weights; the loss."""
        pool = self._pool
        parts = self._samples.split(rows, max(pool.count, -(-len(rows) // self._at_once)))
        total = 0.0
        for weight in self.weights:
            weight.grad = None
        for start in range(0, len(parts), pool.count):
            some = [(next(self._parts), part) for part in parts[start : start + pool.count]]
            for (_, part), (loss, gradients) in zip(some, pool.map(self._of, some), strict=True):
                share = len(part) / len(rows)
                total += share * loss
                for weight, gradient in zip(self.weights, gradients, strict=True):
                    _add_gradient(weight, gradient, share)
        return total

    def _of(self, numbered: tuple[int, np.ndarray]) -> tuple[float, Sequence[Tensor | None]]:
        part, rows = numbered
        batch = self._samples.batch(rows)
        with seeded(self._seed, part):
            loss = loss_of(self._module, self._samples.inputs, self._objective, batch, self._device, bf16=self._bf16)
        return float(loss.detach()), torch.autograd.grad(loss, self.weights, allow_unused=True)


def _add_gradient(weight: Tensor, gradient: Tensor | None, share: float) -> None:
    """Add a part's share in the weight's own memory layout, which the fused optimiser takes for granted."""
    if gradient is not None:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        weight.grad.add_(gradient, alpha=share)


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
