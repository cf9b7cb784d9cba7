"""Converters of what folds axes away, whether the axes are an attribute (older opsets) or an input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ndonnx.convert.registry import OnnxNode, converts
from ndonnx.convert.tables import Numbers, converts_table, from_front, integers

Reduction = Callable[[Tensor, list[int], bool], Tensor]


def _sum(data: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.sum(data, axes, keep, dtype=data.dtype)


def _product(data: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        data = torch.prod(data, axis, keep, dtype=data.dtype)
    return data


def _norm(order: float, data: Tensor, axes: list[int], keep: bool) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(data, order, axes, keep)
    return norm


_REDUCTIONS: dict[str, Reduction] = {
    "ReduceL1": partial(_norm, 1),
    "ReduceL2": partial(_norm, 2),
    "ReduceLogSum": lambda data, axes, keep: torch.log(_sum(data, axes, keep)),
    "ReduceLogSumExp": torch.logsumexp,
    "ReduceMax": torch.amax,
    "ReduceMean": lambda data, axes, keep: data.mean(axes, keep),
    "ReduceMin": torch.amin,
    "ReduceProd": _product,
    "ReduceSum": _sum,
    "ReduceSumSquare": lambda data, axes, keep: _sum(data * data, axes, keep),
}


class Reduce(nn.Module):
    """All the `Reduce...` operators; without axes they reduce everything, or nothing if so told."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.reduction = _REDUCTIONS[node.operation_type]
        self.axes = integers(node, "axes")
        self.keep = bool(node.attributes.get("keepdims", 1))
        self.noop = bool(node.attributes.get("noop_with_empty_axes", 0))
        self.numbers = Numbers()

    def forward(self, data: Tensor, axes: Tensor | None = None) -> Tensor:
        along = (self.axes or []) if axes is None else self.numbers(axes)
        if not along and self.noop:
            # What is done to each element is still done: a norm of one element is its magnitude.
            return self.reduction(data.unsqueeze(-1), [-1], False)
        every = range(max(data.ndim, 1))
        return self.reduction(data, sorted(from_front(axis, data.ndim) for axis in along or every), self.keep)


def _arg_extremum(
    find: Callable[..., Tensor], data: Tensor, *, axis: int, keepdims: int, select_last_index: int
) -> Tensor:
    if not select_last_index:
        return find(data, axis, bool(keepdims))
    return data.shape[axis] - 1 - find(data.flip(axis), axis, bool(keepdims))


_ARG_ATTRIBUTES = {"axis": 0, "keepdims": 1, "select_last_index": 0}

converts(*_REDUCTIONS)(Reduce)
converts_table(
    {
        "ArgMax": (partial(_arg_extremum, torch.argmax), _ARG_ATTRIBUTES),
        "ArgMin": (partial(_arg_extremum, torch.argmin), _ARG_ATTRIBUTES),
    }
)
