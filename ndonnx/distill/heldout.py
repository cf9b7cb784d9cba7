"""How good a module is on its held-out samples, by which the best of a training's states is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ndonnx.convert import TorchSlice
from ndonnx.distill.losses import Objective, nmse, target_variance
from ndonnx.distill.samples import Rows, Samples

T = TypeVar("T")
R = TypeVar("R")

_HOLDOUT_BYTES = 32 * 2**20
"""Most bytes of held-out samples that are kept in memory, as float32."""
_HOLDOUT_SAMPLES = 1024
"""Most of them."""
_EVALUATION_BATCH = 64


class Workers(Protocol):
    """What computes several things side by side."""

    def map(self, work: Callable[[T], R], parts: Sequence[T]) -> list[R]:
        """The results in the order of the parts."""


@dataclass(frozen=True)
class Errors:
    """Of a module on held-out samples."""

    loss: float
    """The objective's value."""
    nmse: float
    """Normalised squared error of the target."""


@dataclass(frozen=True, eq=False)
class _Held:
    """Held-out rows of one shape."""

    values: Mapping[str, Tensor]
    constant: frozenset[str]
    count: int

    @classmethod
    def of(cls, rows: Rows, target: str) -> _Held:
        values = {name: torch.from_numpy(array) for name, array in rows.arrays.items()}
        return cls(values, rows.constant, len(values[target]))


def _variance(targets: Sequence[Tensor]) -> float:
    """Variance of a target over samples; of several, the mean that counts every element alike."""
    found = [target_variance(target if len(target) > 1 else target.reshape(-1, 1)) for target in targets]
    if len(found) == 1:
        return found[0]
    sizes = [target.numel() for target in targets]
    return sum(size * variance for size, variance in zip(sizes, found, strict=True)) / sum(sizes)


class HeldOut:
    """The held-out samples of a training, and the errors of its module on them, always in float32."""

    def __init__(
        self,
        module: TorchSlice,
        samples: Samples,
        objective: Objective,
        workers: Workers,
        *,
        device: torch.device,
        at_once: int,
    ) -> None:
        """Read the samples, as many as there is room for.

        Args:
            module: what is trained.
            samples: captured inputs and targets.
            objective: the loss.
            workers: compute parts of the samples side by side.
            device: where the module is.
            at_once: samples that are computed at a time, at most.
        """
        self._module, self._inputs, self._objective = module, samples.inputs, objective
        self._device, self._workers = device, workers
        self._batch = min(_EVALUATION_BATCH, at_once)
        most = max(1, _HOLDOUT_BYTES // max(1, samples.bytes_per_sample()))
        rows = samples.heldout(min(samples.blocks.holdout, _HOLDOUT_SAMPLES, most))
        self._sets = [_Held.of(each, objective.target) for each in rows]
        self.count = sum(held.count for held in self._sets)
        self._variance = _variance([objective.reference(held.values) for held in self._sets])
        self._batches = [(h, start) for h in self._sets for start in range(0, h.count, self._batch)]

    def errors(self, count: int | None = None) -> Errors:
        """The objective, and the NMSE of the target, on the samples.

        Args:
            count: on the first so many of them, in whole batches. None: on all.
        """
        batches = self._batches if count is None else self._batches[: max(1, -(-count // self._batch))]
        loss, squared, elements, samples = map(sum, zip(*self._workers.map(self._of, batches), strict=True))
        return Errors(loss / samples, nmse(squared / elements, self._variance))

    def _of(self, part: tuple[_Held, int]) -> tuple[float, float, int, int]:
        """Loss times samples, squared error, number of elements and of samples of one batch."""
        held, start = part
        stop = min(start + self._batch, held.count)
        batch = {
            name: (tensor if name in held.constant else tensor[start:stop]).to(self._device)
            for name, tensor in held.values.items()
        }
        with torch.no_grad():
            answer = self._module(*(batch[name] for name in self._inputs))
            target = self._objective.reference(batch)
            loss = float(self._objective(answer, batch)) * (stop - start)
            difference = self._objective.compared(answer, batch) - target
            return loss, float((difference.double() ** 2).sum()), target.numel(), stop - start
