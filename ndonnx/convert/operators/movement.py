"""Converters of operators that move, pad or pool values, in the forms that newer opsets gave them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ndonnx.convert.operators.linear import Window, torch_pads
from ndonnx.convert.registry import OnnxNode, converts

_PAD_MODES = ("constant", "reflect", "edge", "wrap")


@converts("Pad")
class Pad(nn.Module):
    """`Pad` with pads as an attribute (opset 2) or an input, with or without axes."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.mode: str = node.attributes.get("mode", "constant")
        if self.mode not in _PAD_MODES:
            raise NotImplementedError(f"Pad with mode '{self.mode}'")
        self.pads: list[int] | None = node.attributes.get("pads")
        self.value = float(node.attributes.get("value", 0.0))

    def forward(
        self, data: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
    ) -> Tensor:
        given = self.pads if pads is None else [int(n) for n in pads.tolist()]
        assert given is not None
        half = len(given) // 2
        before, behind = [0] * data.ndim, [0] * data.ndim
        for i, axis in enumerate(range(half) if axes is None else axes.tolist()):
            before[axis], behind[axis] = given[i], given[half + i]
        if self.mode == "constant":
            return F.pad(data, torch_pads(before, behind), value=self.value if value is None else value.item())
        for axis in range(data.ndim):
            if before[axis] or behind[axis]:
                places = torch.arange(-before[axis], data.shape[axis] + behind[axis], device=data.device)
                data = data.index_select(axis, _mirrored(places, data.shape[axis], self.mode))
        return data


def _mirrored(places: Tensor, length: int, mode: str) -> Tensor:
    """Where along an axis to read what stands at these places, some of them outside. torch pads some axes only."""
    if mode == "edge":
        return places.clamp(0, length - 1)
    if mode == "wrap":
        return places % length
    folded = places % max(1, 2 * (length - 1))
    return torch.minimum(folded, 2 * (length - 1) - folded)


@converts("Slice")
class Slice(nn.Module):
    """`Slice` with bounds as attributes (opset 1) or inputs; a negative step reads backwards."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        attributes = node.attributes
        self.starts: list[int] | None = attributes.get("starts")
        self.ends: list[int] | None = attributes.get("ends")
        self.axes: list[int] | None = attributes.get("axes")

    def forward(
        self,
        data: Tensor,
        starts: Tensor | None = None,
        ends: Tensor | None = None,
        axes: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> Tensor:
        first, last = self.starts or _numbers(starts), self.ends or _numbers(ends)
        along = self.axes or (list(range(len(first))) if axes is None else _numbers(axes))
        stride = [1] * len(first) if steps is None else _numbers(steps)
        index = [slice(None)] * data.ndim
        for axis, start, end, step in zip(along, first, last, stride, strict=True):
            # Negative bounds count from the end in ONNX as in Python; torch cannot step backwards.
            behind = data.shape[axis] - 1
            stop = None if end in _TO_THE_END else end
            if step > 0:
                index[axis] = slice(*slice(start, stop, step).indices(behind + 1))
            else:
                data = data.flip(axis)
                # A start before the first element is the first in ONNX, and nowhere in Python.
                head, tail, _ = slice(max(start, -behind - 1), stop, step).indices(behind + 1)
                index[axis] = slice(behind - head, behind - tail, -step)
        return data[tuple(index)]


_TO_THE_END = (2**31 - 1, 2**63 - 1)
"""Ends that mean the end in the direction of the step, backwards too."""


def _numbers(tensor: Tensor | None) -> list[int]:
    return [] if tensor is None else [int(number) for number in tensor.tolist()]


@converts("AveragePool")
class AveragePool(nn.Module):
    """`AveragePool` without dilation; ceil mode only where torch counts the last window alike."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.window = Window(node.attributes)
        self.kernel = [int(k) for k in node.attributes["kernel_shape"]]
        self.ceil = bool(node.attributes.get("ceil_mode", 0))
        self.count_pad = bool(node.attributes.get("count_include_pad", 0))
        if any(d != 1 for d in self.window.dilation(len(self.kernel))):
            raise NotImplementedError("AveragePool with dilations")

    def forward(self, data: Tensor) -> Tensor:
        rank = len(self.kernel)
        pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[rank]
        before, behind = self.window.padding(data.shape[2:], self.kernel)
        stride = self.window.stride(rank)
        symmetric = before == behind and all(2 * b <= k for b, k in zip(before, self.kernel, strict=True))
        if symmetric:
            return pool(data, self.kernel, stride, before, self.ceil, self.count_pad)
        pads = torch_pads(before, behind)
        total = pool(F.pad(data, pads), self.kernel, stride, 0, self.ceil)
        if self.count_pad:
            return total
        return total / pool(F.pad(data.new_ones(data.shape[2:])[None, None], pads), self.kernel, stride, 0, self.ceil)
