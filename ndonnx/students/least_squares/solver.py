"""Symmetric positive definite systems by Cholesky factors; what is not definite gets a ridge until it is.

Never by pivoting: a batched `torch.linalg.solve` fails with two threads on some processors, and a
factorisation that may fail where rounding has made a matrix indefinite says so, and can be repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ndonnx.errors import ShrinkError

RIDGES = (1e-6, 1e-4, 1e-2, 1e-1)
"""Ridges to choose from, relative to the mean energy of a feature; the first where rows are ample."""
_FIRST_RIDGE = 1e-12
_LAST_RIDGE = 10.0
_ROUNDS = 500
_SOLVED = 1e-8
"""Residual, relative to the right-hand side, at which a system counts as solved."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch work in the calling thread alone: threads inside batched factorisations are slow and have failed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ridge_of(square: Tensor, relative: float) -> Tensor:
    """A ridge for each matrix (..., n, n), relative to the mean of its diagonal; the number itself where that is 0."""
    energy = square.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    return relative * torch.where(energy > 0, energy, 1.0)


def cholesky(square: Tensor, relative: float = 0.0) -> Tensor:
    """Lower Cholesky factors of matrices with a ridge, which is raised tenfold where rounding does harm.

    Args:
        square: symmetric, float64 (..., n, n); not changed.
        relative: the least ridge, relative to the mean of each matrix's diagonal.

    Raises:
        ShrinkError: the matrices hold NaN or Inf.
    """
    found, info = _factors(square, relative)
    ridge = max(_FIRST_RIDGE, relative)
    while bool((info != 0).any()):
        if ridge > _LAST_RIDGE:
            raise ShrinkError("the activations' second moments hold NaN or Inf")
        ridge *= 10
        again, still = _factors(square, ridge)
        # What has succeeded keeps its smaller ridge.
        found = torch.where((info != 0)[..., None, None], again, found)
        info = torch.where(info != 0, still, info)
    return found


def _factors(square: Tensor, relative: float) -> tuple[Tensor, Tensor]:
    damped = square.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(ridge_of(square, relative)[..., None])
    factor, info = torch.linalg.cholesky_ex(damped)
    return factor, info


def solve(square: Tensor, cross: Tensor, relative: float) -> Tensor:
    """The weights (..., features, outputs) of least squares with a ridge relative to the mean energy of a feature.

    Args:
        square: products of the features with each other, float64 (..., features, features).
        cross: products of features and outputs, float64 (..., features, outputs).
        relative: the ridge; raised where the system cannot be solved with it.

    Raises:
        ShrinkError: the systems hold NaN or Inf.
    """
    if square.ndim == 2:
        return torch.cholesky_solve(cross, cholesky(square, relative))
    with one_thread():
        return torch.cholesky_solve(cross, cholesky(square, relative))


def solve_masked(square: Tensor, cross: Tensor, mask: Tensor) -> Tensor:
    """Least squares with zeros: the Z of this mask with the smallest tr Z^T H Z - 2 tr Z^T C.

    All columns at once by conjugate gradients with a diagonal preconditioner.

    Args:
        square: H, (..., features, features), positive definite, float64.
        cross: C, (..., features, outputs).
        mask: of the outputs' weights, True where they may differ from zero.
    """
    diagonal = square.diagonal(dim1=-2, dim2=-1)[..., None]
    tiny = torch.finfo(square.dtype).tiny
    solution = torch.zeros_like(cross)
    residual = cross * mask
    scaled = residual / diagonal
    direction = scaled
    norm = first = (residual * scaled).sum(dim=-2, keepdim=True)
    for _ in range(_ROUNDS):
        product = (square @ direction) * mask
        step = norm / ((direction * product).sum(dim=-2, keepdim=True) + tiny)
        solution = solution + step * direction
        residual = residual - step * product
        scaled = residual / diagonal
        before, norm = norm, (residual * scaled).sum(dim=-2, keepdim=True)
        if bool((norm <= _SOLVED**2 * first).all()):
            break
        direction = scaled + norm / (before + tiny) * direction
    return solution
