"""Closed form for zeros: which weights of a linear operator go, and what the others become.

On captured features F an operator computes F W. With H = F^T F / m, the error of weights Z
that stand for the best dense ones W is tr (Z - W)^T H (Z - W). The masks that make it small
come from the alternating direction method of multipliers with a growing number of zeros
(Boza 2024, "Fast and effective weight update for pruned large language models"), which comes
within a few per cent of removing weights one by one (optimal brain surgery), at a fraction of
its cost; the weights that stay then solve their least-squares problem.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch
from torch import Tensor

from ndonnx.graph.costs import constant_of
from ndonnx.students.least_squares import (
    MOST_FEATURES,
    Moments,
    cholesky,
    features_of,
    groups_of,
    one_thread,
    ridge_of,
    shape_of,
    solve,
    solve_masked,
)

_RIDGE = 1e-4
"""Ridge, relative to the mean energy of a feature; it draws towards the teacher's weights."""
_PENALTY = 1.0
"""Weight of the distance to the zeros, relative to the energy of a feature (rho)."""
_ROUNDS = 60
_RAMP = 0.5
"""Part of the rounds after which the number of zeros has grown to its end."""
ChooseMask = Callable[[Tensor, float], Tensor]
"""From magnitudes (groups, features, outputs) and the part of the zeros to be set, what stays."""


def can_fit(node: ir.Node) -> bool:
    """Whether an operator has a closed form here: 2-D `Conv`, plain `Gemm`, `MatMul` by a matrix on the right."""
    tensor = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
    if tensor is None or len(tensor.shape) < 2 or node.domain not in ("", "ai.onnx"):
        return False
    if features_of(node, shape_of(node)) > MOST_FEATURES:
        return False
    attributes = node.attributes
    match node.op_type:
        case "Conv":
            return len(tensor.shape) == 4
        case "Gemm":
            plain = all(attributes[name].as_float() == 1.0 for name in ("alpha", "beta") if name in attributes)
            return plain and ("transA" not in attributes or attributes["transA"].as_int() == 0)
        case "MatMul":
            return len(tensor.shape) == 2
    return False


def to_groups(node: ir.Node, weight: Tensor) -> Tensor:
    """A weight as (groups, features, outputs)."""
    if node.op_type == "Conv":
        groups = groups_of(node)
        return weight.reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2)
    return (weight.T if _is_transposed(node) else weight).unsqueeze(0)


def from_groups(node: ir.Node, matrices: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `to_groups` for a weight of this shape."""
    if node.op_type == "Conv":
        return matrices.transpose(1, 2).reshape(shape)
    return matrices[0].T if _is_transposed(node) else matrices[0]


def _is_transposed(node: ir.Node) -> bool:
    return node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int() == 1


def fit(moments: Moments, teacher: Tensor, choose: ChooseMask) -> tuple[Tensor, Tensor]:
    """Sparse weights that best give the expected outputs, and their mask.

    Args:
        moments: of the operator.
        teacher: its weights, (groups, features, outputs), float64.
        choose: what stays, from how much each weight counts.
    """
    ridge = ridge_of(moments.square, _RIDGE)[:, None, None]
    square = moments.square + ridge * torch.eye(moments.square.shape[1], dtype=torch.float64)
    cross = moments.cross + ridge * teacher
    scale = square.diagonal(dim1=1, dim2=2).sqrt()[:, :, None]
    square, cross = square / scale / scale.mT, cross / scale
    mask = choose_mask(square, cross, choose)
    return solve_masked(square, cross, mask) / scale, mask


def choose_mask(square: Tensor, cross: Tensor, choose: ChooseMask) -> Tensor:
    """Where the weights Z with small tr Z^T H Z - 2 tr Z^T C are not zero; H has ones on its diagonal."""
    penalised = square + _PENALTY * torch.eye(square.shape[1], dtype=torch.float64)
    with one_thread():
        inverse = torch.cholesky_inverse(cholesky(penalised))
    sparse = solve(square, cross, 0.0)
    dual = torch.zeros_like(sparse)
    mask = torch.ones_like(sparse, dtype=torch.bool)
    for done in range(1, _ROUNDS + 1):
        dense = inverse @ (cross + _PENALTY * (sparse - dual))
        mask = choose((dense + dual).abs(), min(1.0, done / (_RAMP * _ROUNDS)))
        sparse = (dense + dual) * mask
        dual = dual + dense - sparse
    return mask
