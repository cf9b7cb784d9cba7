"""Converters of operators that pick or place elements by index; an index below 0 counts from the end."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ndonnx.convert.registry import OnnxNode, converts
from ndonnx.convert.tables import Numbers, converts_table, from_front

_SCATTER_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _from_start(indices: Tensor, length: int) -> Tensor:
    indices = indices.long()
    return torch.where(indices < 0, indices + length, indices)


def _gather(data: Tensor, indices: Tensor, *, axis: int) -> Tensor:
    axis = from_front(axis, data.ndim)
    chosen = data.index_select(axis, _from_start(indices, data.shape[axis]).reshape(-1))
    return chosen.reshape((*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]))


def _gather_elements(data: Tensor, indices: Tensor, *, axis: int) -> Tensor:
    return data.gather(axis, _from_start(indices, data.shape[axis]))


def _gather_nd(data: Tensor, indices: Tensor, *, batch_dims: int) -> Tensor:
    indices = indices.long()
    rank = indices.ndim - 1
    batch = [
        torch.arange(data.shape[axis], device=data.device).reshape([-1 if axis == i else 1 for i in range(rank)])
        for axis in range(batch_dims)
    ]
    return data[(*batch, *indices.unbind(-1))]


def _scatter_elements(data: Tensor, indices: Tensor, updates: Tensor, *, axis: int, reduction: str) -> Tensor:
    indices, updates = _from_start(indices, data.shape[axis]), updates.to(data.dtype)
    if reduction == "none":
        return data.scatter(axis, indices, updates)
    return data.scatter_reduce(axis, indices, updates, _SCATTER_REDUCTIONS[reduction])


def _scatter_nd(data: Tensor, indices: Tensor, updates: Tensor, *, reduction: str) -> Tensor:
    indices, updates = indices.long(), updates.to(data.dtype)
    if reduction in ("none", "add"):
        return data.index_put(indices.unbind(-1), updates, accumulate=reduction == "add")
    depth = indices.shape[-1]
    row = torch.zeros_like(indices[..., 0])
    for axis, index in enumerate(indices.unbind(-1)):
        row = row * data.shape[axis] + _from_start(index, data.shape[axis])
    rows = data.flatten(0, depth - 1).reshape(data.shape[:depth].numel(), -1)
    values = updates.reshape(row.numel(), -1)
    placed = rows.scatter_reduce(0, row.reshape(-1, 1).expand_as(values), values, _SCATTER_REDUCTIONS[reduction])
    return placed.reshape(data.shape)


def _compress(data: Tensor, condition: Tensor, *, axis: int | None) -> Tensor:
    kept = condition.nonzero().reshape(-1)
    return data.reshape(-1).index_select(0, kept) if axis is None else data.index_select(axis, kept)


def _non_zero(data: Tensor) -> Tensor:
    return data.nonzero().T


def _reverse_sequence(data: Tensor, lengths: Tensor, *, batch_axis: int, time_axis: int) -> Tensor:
    data = data.movedim((time_axis, batch_axis), (0, 1))
    time = torch.arange(data.shape[0], device=data.device)[:, None]
    back = torch.where(time < lengths, lengths - 1 - time, time)
    reversed_ = data[back, torch.arange(data.shape[1], device=data.device)]
    return reversed_.movedim((0, 1), (time_axis, batch_axis))


converts_table(
    {
        "Compress": (_compress, {"axis": None}),
        "Gather": (_gather, {"axis": 0}),
        "GatherElements": (_gather_elements, {"axis": 0}),
        "GatherND": (_gather_nd, {"batch_dims": 0}),
        "NonZero": (_non_zero, {}),
        "ReverseSequence": (_reverse_sequence, {"batch_axis": 1, "time_axis": 0}),
        "Scatter": (_scatter_elements, {"axis": 0, "reduction": "none"}),
        "ScatterElements": (_scatter_elements, {"axis": 0, "reduction": "none"}),
        "ScatterND": (_scatter_nd, {"reduction": "none"}),
    }
)


@converts("OneHot")
class OneHot(nn.Module):
    """`OneHot`: values (off, on); an index out of range lights nothing."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.axis = int(node.attributes.get("axis", -1))
        self.numbers = Numbers()

    def forward(self, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
        classes = int(self.numbers(depth)[0])
        axis = from_front(self.axis, indices.ndim + 1)
        shape = [-1 if i == axis else 1 for i in range(indices.ndim + 1)]
        every = torch.arange(classes, device=indices.device).reshape(shape)
        return torch.where(_from_start(indices, classes).unsqueeze(axis) == every, values[1], values[0])


@converts("Trilu")
class Trilu(nn.Module):
    """`Trilu`: the upper or lower triangle of the last two axes, from the k-th diagonal on."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.part = torch.triu if node.attributes.get("upper", 1) else torch.tril
        self.numbers = Numbers()

    def forward(self, data: Tensor, k: Tensor | None = None) -> Tensor:
        return self.part(data, 0 if k is None else int(self.numbers(k)[0]))
