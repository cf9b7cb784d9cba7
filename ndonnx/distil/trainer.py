"""Gradient descent on one student slice: seeded, best held-out state kept, NaN stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ndonnx.distil.losses import neighbourhood_loss, nmse, target_variance
from ndonnx.distil.samples import SliceSamples
from ndonnx.errors import TrainingError

OnStep = Callable[[int, int, float], None]
"""Step, steps, held-out NMSE so far."""

_EVALUATIONS = 20
"""Times that the held-out error is measured during a training."""
_HOLDOUT_BYTES = 64 * 2**20
"""Most bytes of held-out samples that are kept in memory, as float32."""
_EVALUATION_BATCH = 64
_SMALLEST_SCALE = 1e-2
"""Scale of weights that are all (nearly) zero."""


@dataclass(frozen=True)
class Plan:
    """How long, how fast, on what."""

    steps: int
    batch_size: int
    lr: float
    """Peak step of Adam, relative to each weight's root mean square."""
    warmup: float
    seed: int
    device: str = "cpu"
    bf16: bool = False


@dataclass(frozen=True)
class Training:
    """What came out: held-out NMSE before and after, and where the best state was found."""

    nmse_start: float
    nmse: float
    best_step: int
    steps: int
    seconds: float


def learning_rate(step: int, plan: Plan) -> float:
    """Relative step size: linear warm-up, then half a cosine down to zero; `step` counts from 0."""
    warmup = max(1, round(plan.warmup * plan.steps))
    rise = min(1.0, (step + 1) / warmup)
    fall = 0.5 * (1.0 + math.cos(math.pi * step / max(1, plan.steps)))
    return plan.lr * rise * fall


def train(module: nn.Module, samples: SliceSamples, plan: Plan, on_step: OnStep) -> Training:
    """Train in place; the module ends in its best held-out state, never worse than it began.

    Raises:
        TrainingError: the loss, or the held-out error of the start, is NaN or Inf.
    """
    began = time.perf_counter()
    torch.manual_seed(plan.seed)
    device = torch.device(plan.device)
    module.to(device)
    judge = _Judge(module, samples, device)
    start = judge.error()
    if not math.isfinite(start):
        raise TrainingError(f"the held-out error is {start} before the first step; the captured activations overflow")
    best, best_step, state = start, 0, _copy(module)
    weights = [p for p in module.parameters() if p.requires_grad]
    if plan.steps and weights:
        for step, error in _descend(module, weights, samples, plan, judge):
            if error < best:
                best, best_step, state = error, step, _copy(module)
            on_step(step, plan.steps, best)
    with torch.no_grad():
        for parameter, kept in zip(module.parameters(), state, strict=True):
            parameter.copy_(kept)
    module.to("cpu")
    return Training(start, best, best_step, plan.steps, time.perf_counter() - began)


def _descend(
    module: nn.Module, weights: list[nn.Parameter], samples: SliceSamples, plan: Plan, judge: _Judge
) -> Iterator[tuple[int, float]]:
    """Run the steps; yield the step and the held-out error whenever it is measured."""
    device = torch.device(plan.device)
    optimiser = torch.optim.Adam([{"params": [w], "scale": _scale(w)} for w in weights], lr=plan.lr, fused=True)
    every = max(1, plan.steps // _EVALUATIONS)
    half = torch.autocast(device.type, torch.bfloat16, enabled=plan.bf16)
    for step, rows in enumerate(_batches(samples, plan)):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, plan) * group["scale"]
        inputs, target = samples.batch(rows)
        with half:
            answer = module(*(_to_float(tensor, device, plan.bf16) for tensor in inputs))
        loss = neighbourhood_loss(answer, target.to(device))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        done = step + 1
        if done % every == 0 or done == plan.steps:
            if not math.isfinite(loss.item()):
                raise TrainingError(f"the loss became {loss.item()} by step {done}; lower --lr")
            yield done, judge.error()


def _batches(samples: SliceSamples, plan: Plan) -> Iterator[np.ndarray]:
    """Rows of each step: every epoch a new order, sorted inside a batch so that the disk is read forwards."""
    rng = np.random.default_rng(plan.seed)
    first, last = samples.blocks.holdout, samples.blocks.samples
    size = min(plan.batch_size, last - first)
    order, position = np.empty(0, dtype=np.int64), 0
    for _ in range(plan.steps):
        if position + size > len(order):
            order, position = first + rng.permutation(last - first), 0
        yield np.sort(order[position : position + size])
        position += size


def _scale(weight: Tensor) -> float:
    """Root mean square of a weight, by which its steps are scaled.

    Students begin near their end, with weights of very different size from one slice to the
    next; a step of so many per cent suits them all, where no absolute learning rate does.
    """
    return max(float(weight.detach().double().square().mean().sqrt()), _SMALLEST_SCALE)


class _Judge:
    """The held-out error of a module, in float32 whatever it is trained in."""

    def __init__(self, module: nn.Module, samples: SliceSamples, device: torch.device) -> None:
        self.module = module
        self.device = device
        count = min(samples.blocks.holdout, max(1, _HOLDOUT_BYTES // max(1, samples.bytes_per_sample())))
        arrays = samples.arrays(0, count)
        self._inputs = [(torch.from_numpy(arrays[name]), samples.is_constant(name)) for name in samples.inputs]
        self._target = torch.from_numpy(arrays[samples.target])
        self._variance = target_variance(self._target if len(self._target) > 1 else self._target.reshape(-1, 1))

    def error(self) -> float:
        """NMSE on the held-out samples."""
        total, count = 0.0, 0
        size = len(self._target)
        with torch.no_grad():
            for start in range(0, size, _EVALUATION_BATCH):
                rows = slice(start, start + _EVALUATION_BATCH)
                inputs = [tensor if constant else tensor[rows] for tensor, constant in self._inputs]
                target = self._target[rows].to(self.device)
                answer = self.module(*(tensor.to(self.device) for tensor in inputs))
                total += float(((answer - target).double() ** 2).sum())
                count += target.numel()
        return nmse(total / count, self._variance)


def _to_float(tensor: Tensor, device: torch.device, bf16: bool) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.to(device)
    return tensor.to(device, torch.bfloat16 if bf16 else torch.float32)


def _copy(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]
