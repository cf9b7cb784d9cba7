"""Gradients of a batch, computed in parts side by side."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ndonnx.distill.draws import seeded
from ndonnx.distill.formats import Format
from ndonnx.distill.losses import Objective
from ndonnx.distill.plan import Plan
from ndonnx.distill.samples import Samples
from ndonnx.distill.steps import loss_of

T = TypeVar("T")
R = TypeVar("R")


class ThreadPool:
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


class Slope:
    """Gradients of a batch, each lane's from its own samples; their sum does not depend on who is faster."""

    def __init__(
        self,
        module: nn.Module,
        samples: Samples,
        objective: Objective,
        plan: Plan,
        pool: ThreadPool,
        format: Format,
        at_once: int,
    ) -> None:
        """Take what is trained, on what.

        Args:
            module: its parameters that want a gradient get one.
            samples: where the rows of a batch are read.
            objective: the loss.
            plan: for its device and seed.
            pool: the lanes.
            format: number format and memory layout.
            at_once: samples whose gradient a lane computes at a time, at most.
        """
        self._module, self._samples, self._objective = module, samples, objective
        self._device, self._seed = torch.device(plan.device), plan.seed
        self._pool, self._format, self._at_once = pool, format, at_once
        self._parts = itertools.count()
        self.weights = [weight for weight in module.parameters() if weight.requires_grad]

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
            loss = loss_of(self._module, self._samples.inputs, self._objective, batch, self._device, self._format)
        return float(loss.detach()), torch.autograd.grad(loss, self.weights, allow_unused=True)


def _add_gradient(weight: Tensor, gradient: Tensor | None, share: float) -> None:
    """Add a part's share in the weight's own memory layout, which the fused optimiser takes for granted."""
    if gradient is not None:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        weight.grad.add_(gradient, alpha=share)
