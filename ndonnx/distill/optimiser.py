"""How weights move: orthogonalised momentum for matrices where it is cheap, Adam for everything else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

_SMALLEST_SCALE = 1e-2
"""Scale of weights that are all (nearly) zero."""
_MOMENTUM = 0.95
_ITERATIONS = 5
_POLYNOMIAL = (3.4445, -4.7750, 2.0315)
"""Of a Newton-Schulz iteration that brings all singular values near 1 in few steps (Jordan 2024)."""
_LIKE_ADAM = 0.2
"""Root mean square of an update of Adam's; with it, one learning rate suits both (Liu et al. 2025)."""
_SHARE = 0.25
"""Part of a training step's work that orthogonalising may take."""
_TINY = 1e-12


def scale_of(weight: Tensor) -> float:
    """Root mean square of a weight, by which its steps are scaled.

    Students begin near their end, with weights of very different size from one slice to the
    next; a step of so many per cent suits them all, where no absolute learning rate does.
    """
    return max(float(weight.detach().double().square().mean().sqrt()), _SMALLEST_SCALE)


class Optimiser:
    """Muon (Jordan 2024) and Adam side by side, with steps relative to each weight's root mean square.

    A matrix moves by its momentum with all singular values made equal, so that directions in which the loss
    is flat are not forgotten for the few steep ones. That costs some products of the matrix with itself.
    """

    def __init__(
        self, weights: Sequence[nn.Parameter], work: float, *, muon: bool = True, masked: Iterable[nn.Parameter] = ()
    ) -> None:
        """Choose how each weight moves.

        Args:
            weights: what is trained.
            work: multiplications and additions of the gradient of one batch, which decides what is cheap.
            muon: False moves all weights by Adam.
            masked: matrices that hold zeros, which move by Adam: what is orthogonal before the zeros are put back is
                not any more afterwards.
        """
        bound = {id(weight) for weight in masked}
        free = [weight for weight in weights if id(weight) not in bound]
        matrices = _affordable(free, _SHARE * work) if muon else []
        chosen = {id(weight) for weight in matrices}
        others = [weight for weight in weights if id(weight) not in chosen]
        self._matrices = [(weight, scale_of(weight), torch.zeros_like(weight)) for weight in matrices]
        self._adam = None
        if others:
            groups: list[dict[str, Any]] = [{"params": [weight], "scale": scale_of(weight)} for weight in others]
            self._adam = torch.optim.Adam(groups, lr=1.0, fused=True)

    def step(self, rate: float) -> None:
        """Move all weights that have a gradient by `rate`, relative to their root mean square."""
        if self._adam is not None:
            for group in self._adam.param_groups:
                group["lr"] = rate * group["scale"]
            self._adam.step()
        self._move(rate)

    @torch.no_grad()
    def _move(self, rate: float) -> None:
        alike: dict[tuple[int, ...], list[tuple[nn.Parameter, float, Tensor]]] = defaultdict(list)
        for weight, scale, momentum in self._matrices:
            if weight.grad is not None:
                momentum.lerp_(weight.grad, 1 - _MOMENTUM)
                ahead = torch.lerp(weight.grad, momentum, _MOMENTUM).flatten(1)
                alike[tuple(ahead.shape)].append((weight, scale, ahead))
        for together in alike.values():
            updates = orthogonalised(torch.stack([ahead for _, _, ahead in together]))
            for (weight, scale, _), update in zip(together, updates, strict=True):
                weight.sub_(update.view_as(weight), alpha=rate * scale * _LIKE_ADAM)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices (count, rows, columns) with all singular values about equal, and a root mean square of about 1."""
    rows, columns = matrices.shape[1:]
    flat = matrices.mT if rows > columns else matrices
    flat = flat / flat.norm(dim=(1, 2), keepdim=True).clamp_min(_TINY)
    a, b, c = _POLYNOMIAL
    for _ in range(_ITERATIONS):
        square = flat @ flat.mT
        flat = a * flat + (b * square + c * square @ square) @ flat
    return cast(Tensor, (flat.mT if rows > columns else flat) * max(rows, columns) ** 0.5)


def _affordable(weights: Iterable[nn.Parameter], work: float) -> list[nn.Parameter]:
    """Matrices, the cheapest first, as long as their iterations take no more than so many operations."""
    found = []
    for weight in sorted((weight for weight in weights if _is_matrix(weight)), key=_work):
        work -= _work(weight)
        if work < 0:
            break
        found.append(weight)
    return found


def _is_matrix(weight: Tensor) -> bool:
    """Whether it mixes channels. The filters of a depthwise convolution, (channels, 1, ...), do not."""
    return weight.ndim >= 2 and min(weight.shape[:2]) > 1


def _work(weight: Tensor) -> float:
    rows, columns = weight.shape[0], weight[0].numel()
    least = min(rows, columns)
    return _ITERATIONS * least**2 * (4 * max(rows, columns) + 2 * least)
