"""Converters of the pools other than `AveragePool`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ndonnx.convert.operators.linear import Window, torch_pads
from ndonnx.convert.registry import OnnxNode, converts
from ndonnx.convert.tables import converts_table, refuse_further_outputs

_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class PoolWindow(Window):
    """A pool's window; in ceil mode the last one may hang over the padded end, but must begin before it."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__(node.attributes)
        self.kernel = [int(k) for k in node.attributes["kernel_shape"]]
        self.ceil = bool(node.attributes.get("ceil_mode", 0))

    def fit(self, size: Sequence[int]) -> tuple[list[int], list[int]]:
        """Padding with which windows that never hang over are those that ONNX asks for."""
        rank = len(self.kernel)
        before, behind = self.padding(size, self.kernel)
        if self.ceil:
            for i, (length, kernel) in enumerate(zip(size, self.kernel, strict=True)):
                stride, span = self.stride(rank)[i], (kernel - 1) * self.dilation(rank)[i] + 1
                count = -(-(length + before[i] + behind[i] - span) // stride) + 1
                if (count - 1) * stride >= length + before[i]:
                    count -= 1
                behind[i] = (count - 1) * stride + span - length - before[i]
        return before, behind


@converts("MaxPool")
class MaxPool(nn.Module):
    """`MaxPool`; padding never wins."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.window = PoolWindow(node)
        refuse_further_outputs(node)

    def forward(self, data: Tensor) -> Tensor:
        window, rank = self.window, len(self.window.kernel)
        before, behind = window.fit(data.shape[2:])
        if before != behind or any(2 * pad > kernel for pad, kernel in zip(before, window.kernel, strict=True)):
            data = F.pad(data, torch_pads(before, behind), value=-torch.inf)
            before = [0] * rank
        pooled: Tensor = _MAX_POOL[rank](data, window.kernel, window.stride(rank), before, window.dilation(rank))
        return pooled


def _root(powers: Tensor, p: int) -> Tensor:
    """The p-th root, with the gradient 0 where all is 0."""
    positive = powers > 0
    return torch.where(positive, torch.where(positive, powers, 1.0) ** (1 / p), 0.0)


@converts("LpPool")
class LpPool(nn.Module):
    """`LpPool`: the p-norm of each window."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.window = PoolWindow(node)
        self.p = int(node.attributes.get("p", 2))

    def forward(self, data: Tensor) -> Tensor:
        window, rank = self.window, len(self.window.kernel)
        powers = F.pad(data.abs() ** self.p, torch_pads(*window.fit(data.shape[2:])))
        ones = powers.new_ones(1, 1, *window.kernel)
        sums = _CONV[rank](powers.flatten(0, 1)[:, None], ones, None, window.stride(rank), 0, window.dilation(rank))
        return _root(sums.reshape(*data.shape[:2], *sums.shape[2:]), self.p)


def _spatial(data: Tensor) -> list[int]:
    return list(range(2, data.ndim))


def _global_average(data: Tensor) -> Tensor:
    return data.mean(_spatial(data), keepdim=True)


def _global_max(data: Tensor) -> Tensor:
    return data.amax(_spatial(data), keepdim=True)


def _global_norm(data: Tensor, *, p: int) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(data, p, _spatial(data), keepdim=True)
    return norm


converts_table(
    {
        "GlobalAveragePool": (_global_average, {}),
        "GlobalLpPool": (_global_norm, {"p": 2}),
        "GlobalMaxPool": (_global_max, {}),
    }
)
