"""How weights move: the orthogonalised momentum against its definition, and who gets it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ndonnx.distill.optimiser import Optimiser, orthogonalised, scale_of


@given(rows=st.integers(2, 24), columns=st.integers(2, 24), seed=st.integers(0, 99))
def test_singular_values_become_alike_and_directions_stay(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator)
    (found,) = orthogonalised(matrix[None])
    left, before, right = torch.linalg.svd(matrix, full_matrices=False)
    turned = left.mT @ found @ right.mT / max(rows, columns) ** 0.5
    # In the matrix's own singular directions the result is diagonal, and what was not tiny is about 1.
    assert torch.dist(turned, torch.diag(turned.diagonal())) < 1e-2 * min(rows, columns)
    large = before > 0.05 * before.norm()
    assert ((turned.diagonal()[large] > 0.5) & (turned.diagonal()[large] < 1.5)).all()


def test_matrices_of_one_shape_do_not_mix() -> None:
    both = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))
    together = orthogonalised(both)
    for one, found in zip(both, together, strict=True):
        torch.testing.assert_close(orthogonalised(one[None])[0], found, rtol=1e-4, atol=1e-5)


def moved(
    weight: nn.Parameter, gradient: torch.Tensor, work: float, rate: float = 0.01, **options: bool
) -> torch.Tensor:
    before = weight.detach().clone()
    optimiser = Optimiser([weight], work, **options)
    weight.grad = gradient
    optimiser.step(rate)
    return weight.detach() - before


def test_the_first_step_is_the_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, gradient = (
        nn.Parameter(torch.randn(5, 4, 3, 3, generator=generator)),
        torch.randn(5, 4, 3, 3, generator=generator),
    )
    scale = scale_of(weight)
    assert scale == pytest.approx(float(weight.detach().square().mean().sqrt()))
    expected = -0.01 * 0.2 * scale * orthogonalised(gradient.reshape(1, 5, 36))[0].reshape(5, 4, 3, 3)
    torch.testing.assert_close(moved(weight, gradient, 1e12), expected, rtol=1e-3, atol=1e-6)


def test_adam_moves_what_is_no_matrix_or_too_dear() -> None:
    generator = torch.Generator().manual_seed(2)
    for shape, work, muon in (
        ((7,), 1e12, True),  # a vector
        ((8, 1, 3, 3), 1e12, True),  # depthwise
        ((1, 9), 1e12, True),
        ((6, 6), 100.0, True),  # dearer than its part of the work
        ((6, 6), 1e12, False),
    ):
        weight, gradient = (
            nn.Parameter(torch.randn(shape, generator=generator)),
            torch.randn(shape, generator=generator),
        )
        # Adam's first step is the sign of the gradient.
        expected = -0.01 * scale_of(weight) * gradient.sign()
        torch.testing.assert_close(moved(weight, gradient, work, muon=muon), expected, rtol=1e-3, atol=1e-6)


def test_cheap_matrices_come_first_and_weights_without_gradient_stay() -> None:
    small, large, unused = (nn.Parameter(torch.randn(n, n)) for n in (4, 64, 4))
    optimiser = Optimiser([large, small, unused], 4 * 2 * 5 * 4**2 * 6 * 4 * 1.5)
    small.grad, large.grad = torch.randn(4, 4), torch.randn(64, 64)
    before = [weight.detach().clone() for weight in (small, large, unused)]
    optimiser.step(0.01)
    by_adam = -0.01 * scale_of(before[1]) * large.grad.sign()
    torch.testing.assert_close(large.detach() - before[1], by_adam, rtol=1e-3, atol=1e-6)
    assert not torch.allclose((small.detach() - before[0]).abs(), (small.detach() - before[0]).abs().mean())
    assert torch.equal(unused.detach(), before[2])


def test_a_matrix_that_holds_zeros_moves_by_adam() -> None:
    weight = nn.Parameter(torch.randn(6, 6))
    before = weight.detach().clone()
    optimiser = Optimiser([weight], 1e12, masked=[weight])
    weight.grad = torch.randn(6, 6)
    optimiser.step(0.01)
    by_adam = -0.01 * scale_of(before) * weight.grad.sign()
    torch.testing.assert_close(weight.detach() - before, by_adam, rtol=1e-3, atol=1e-6)
