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
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from ndonnx.graph.costs import constant_of
from ndonnx.students.features import features, gram, kernel_of, targets

_RIDGE = 1e-4
"""Ridge, relative to the mean energy of a feature; it draws towards the teacher's weights."""
_PENALTY = 1.0
"""Weight of the distance to the zeros, relative to the energy of a feature (rho)."""
_ROUNDS = 60
_RAMP = 0.5
"""Part of the rounds after which the number of zeros has grown to its end."""
_CHUNK = 2**23
"""Numbers of features, about, that are in memory at a time."""
_SOLVER_ROUNDS = 500
_SOLVED = 1e-8
"""Residual, relative to the right-hand side, at which a system counts as solved."""
ChooseMask = Callable[[Tensor, float], Tensor]
"""From magnitudes (groups, features, outputs) and the part of the zeros to be set, what stays."""


@dataclass(frozen=True)
class Moments:
    """What a group-wise linear operator's least-squares problem needs, in float64; every first axis is the group."""

    square: Tensor
    """(groups, features, features): second moment of the features, about their mean where there is a bias."""
    cross: Tensor
    """(groups, features, outputs): the same of features and outputs."""
    mean_x: Tensor
    """(groups, 1, features)"""
    mean_y: Tensor
    """(groups, 1, outputs)"""


def groups_of(node: ir.Node) -> int:
    """Groups of a convolution; 1 for a matrix."""
    attribute = node.attributes.get("group")
    return attribute.as_int() if attribute is not None else 1


def can_fit(node: ir.Node) -> bool:
    """Whether an operator has a closed form here: 2-D `Conv`, plain `Gemm`, `MatMul` by a matrix on the right."""
    tensor = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
    if tensor is None or node.domain not in ("", "ai.onnx"):
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


def measure(
    node: ir.Node, given: npt.NDArray[np.float32], expected: npt.NDArray[np.float32], *, centred: bool
) -> Moments:
    """Moments of an operator's features on captured data, and of the outputs that it should give.

    Args:
        node: an operator that `can_fit`.
        given: its data input; the first axis is the sample.
        expected: its output.
        centred: whether a bias takes up the means.

    Raises:
        ShrinkError: the features are so large that their squares overflow.
    """
    tensor = constant_of(node.inputs[1])
    assert tensor is not None
    kernel = kernel_of(tuple(int(size) for size in tensor.shape.numpy()))
    groups = groups_of(node)
    shift_x = shift_y = None
    sums: list[Tensor] = []
    rows = 0
    step = _samples_at_once(given, kernel)
    for start in range(0, len(given), step):
        x = features(node, given[start : start + step], kernel)
        y = targets(node, expected[start : start + step])
        if shift_x is None or shift_y is None:  # in float32 a large mean would drown what varies about it
            shift_x, shift_y = x.mean(dim=0), y.mean(dim=0)
        xs = (x - shift_x).reshape(len(x), groups, -1).transpose(0, 1)
        ys = (y - shift_y).reshape(len(y), groups, -1).transpose(0, 1)
        squares = torch.stack([gram(block) for block in xs])
        part = [squares, *(t.double() for t in (xs.mT @ ys, xs.sum(dim=1, keepdim=True), ys.sum(dim=1, keepdim=True)))]
        sums = [a + b for a, b in zip(sums, part, strict=True)] if sums else part
        rows += len(x)
    assert shift_x is not None and shift_y is not None
    square, cross, mean_x, mean_y = (total / rows for total in sums)
    square, cross = square - mean_x.mT @ mean_x, cross - mean_x.mT @ mean_y
    mean_x = mean_x + shift_x.double().reshape(groups, 1, -1)
    mean_y = mean_y + shift_y.double().reshape(groups, 1, -1)
    if not centred:
        square, cross = square + mean_x.mT @ mean_x, cross + mean_x.mT @ mean_y
    return Moments(square, cross, mean_x, mean_y)


def _samples_at_once(data: npt.NDArray[np.float32], kernel: tuple[int, ...]) -> int:
    numbers = int(np.prod(data.shape[1:], dtype=np.int64)) * int(np.prod(kernel, dtype=np.int64))
    return max(1, _CHUNK // max(1, numbers))


def fit(moments: Moments, teacher: Tensor, choose: ChooseMask) -> tuple[Tensor, Tensor]:
    """Sparse weights that best give the expected outputs, and their mask.

    Args:
        moments: of the operator.
        teacher: its weights, (groups, features, outputs), float64.
        choose: what stays, from how much each weight counts.
    """
    energy = moments.square.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    ridge = _RIDGE * torch.where(energy > 0, energy, 1.0)
    square = moments.square + ridge * torch.eye(moments.square.shape[1], dtype=torch.float64)
    cross = moments.cross + ridge * teacher
    scale = square.diagonal(dim1=1, dim2=2).sqrt()[:, :, None]
    square, cross = square / scale / scale.mT, cross / scale
    mask = choose_mask(square, cross, choose)
    return solve_masked(square, cross, mask) / scale, mask


def choose_mask(square: Tensor, cross: Tensor, choose: ChooseMask) -> Tensor:
    """Where the weights Z with small tr Z^T H Z - 2 tr Z^T C are not zero; H has ones on its diagonal."""
    identity = torch.eye(square.shape[1], dtype=torch.float64)
    inverse = torch.linalg.inv(square + _PENALTY * identity)
    sparse = torch.linalg.solve(square, cross)
    dual = torch.zeros_like(sparse)
    mask = torch.ones_like(sparse, dtype=torch.bool)
    for done in range(1, _ROUNDS + 1):
        dense = inverse @ (cross + _PENALTY * (sparse - dual))
        mask = choose((dense + dual).abs(), min(1.0, done / (_RAMP * _ROUNDS)))
        sparse = (dense + dual) * mask
        dual = dual + dense - sparse
    return mask


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
    for _ in range(_SOLVER_ROUNDS):
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
