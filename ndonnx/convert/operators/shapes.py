"""Converters of operators that read, make or change shapes; a shape may be a constant or computed on the way."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from ndonnx.convert.registry import OnnxNode, converts
from ndonnx.convert.tables import Numbers, converts_table, from_front, integers


@converts("Reshape")
class Reshape(nn.Module):
    """`Reshape`: -1 takes what is left, 0 copies the data's length unless `allowzero` is set."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.copy_zeros = not node.attributes.get("allowzero", 0)
        self.numbers = Numbers()

    def forward(self, data: Tensor, shape: Tensor) -> Tensor:
        lengths = self.numbers(shape)
        if self.copy_zeros:
            lengths = [length or data.shape[axis] for axis, length in enumerate(lengths)]
        return data.reshape(lengths)


@converts("Squeeze")
class Squeeze(nn.Module):
    """`Squeeze` of the axes in an attribute (before opset 13) or an input, or of every axis of length 1."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.axes = integers(node, "axes")
        self.numbers = Numbers()

    def forward(self, data: Tensor, axes: Tensor | None = None) -> Tensor:
        along = self.axes if axes is None else self.numbers(axes)
        return data.squeeze() if along is None else data.squeeze(tuple(along))


@converts("Unsqueeze")
class Unsqueeze(nn.Module):
    """`Unsqueeze`: the axes, an attribute before opset 13 and an input since, count in the output."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.axes = integers(node, "axes")
        self.numbers = Numbers()

    def forward(self, data: Tensor, axes: Tensor | None = None) -> Tensor:
        along = (self.axes or []) if axes is None else self.numbers(axes)
        rank = data.ndim + len(along)
        for axis in sorted(from_front(axis, rank) for axis in along):
            data = data.unsqueeze(axis)
        return data


@converts("Split")
class Split(nn.Module):
    """`Split` by lengths (an attribute before opset 13, then an input) or into equal parts, the last one shorter."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.axis = int(node.attributes.get("axis", 0))
        self.lengths = integers(node, "split")
        self.parts = len(node.output_values)
        self.numbers = Numbers()

    def forward(self, data: Tensor, split: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        lengths = self.lengths if split is None else self.numbers(split)
        if lengths is None:
            length = data.shape[self.axis]
            part = -(-length // self.parts)
            lengths = [*[part] * (self.parts - 1), length - part * (self.parts - 1)]
        parts: tuple[Tensor, ...] = torch.split(data, lengths, self.axis)
        return parts if self.parts > 1 else parts[0]


@converts("Expand")
class Expand(nn.Module):
    """`Expand`: both shapes broadcast, so the data may also be the longer one."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.numbers = Numbers()

    def forward(self, data: Tensor, shape: Tensor) -> Tensor:
        return data.broadcast_to(np.broadcast_shapes(data.shape, tuple(self.numbers(shape))))


@converts("Tile")
class Tile(nn.Module):
    """`Tile`: one number of copies for each axis."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.numbers = Numbers()

    def forward(self, data: Tensor, repeats: Tensor) -> Tensor:
        return data.repeat(self.numbers(repeats))


@converts("ConstantOfShape")
class ConstantOfShape(nn.Module):
    """`ConstantOfShape`: float32 zeros unless a value of another type is given."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        value = node.attributes["value"].to_torch() if "value" in node.attributes else torch.zeros(1)
        self.value, self.dtype = value.item(), value.dtype
        self.numbers = Numbers()

    def forward(self, shape: Tensor) -> Tensor:
        return torch.full(self.numbers(shape), self.value, dtype=self.dtype, device=shape.device)


@converts("Range")
class Range(nn.Module):
    """`Range` in the type of its bounds."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.start, self.limit, self.delta = Numbers(), Numbers(), Numbers()

    def forward(self, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
        bounds = self.start(start)[0], self.limit(limit)[0], self.delta(delta)[0]
        return torch.arange(*bounds, dtype=start.dtype, device=start.device)


@converts("CenterCropPad")
class CenterCropPad(nn.Module):
    """`CenterCropPad`: an odd element is cropped behind and padded behind."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.axes = integers(node, "axes")
        self.numbers = Numbers()

    def forward(self, data: Tensor, shape: Tensor) -> Tensor:
        lengths = self.numbers(shape)
        for axis, length in zip(self.axes or range(len(lengths)), lengths, strict=True):
            missing = length - data.shape[axis]
            if missing < 0:
                data = data.narrow(axis, -missing // 2, length)
            elif missing > 0:
                around = list(data.shape)
                around[axis] = missing // 2
                before = data.new_zeros(around)
                around[axis] = missing - missing // 2
                data = torch.cat([before, data, data.new_zeros(around)], axis)
        return data


def _flatten(data: Tensor, *, axis: int) -> Tensor:
    axis = from_front(axis, data.ndim)
    return data.reshape(math.prod(data.shape[:axis]), math.prod(data.shape[axis:]))


def _shape(data: Tensor, *, start: int, end: int | None) -> Tensor:
    return torch.tensor(data.shape[start:end], dtype=torch.int64, device=data.device)


def _size(data: Tensor) -> Tensor:
    return torch.tensor(data.numel(), dtype=torch.int64, device=data.device)


def _depth_to_space(data: Tensor, *, blocksize: int, mode: str) -> Tensor:
    count, channels, height, width = data.shape
    rest = channels // blocksize**2
    if mode == "DCR":
        blocks = data.reshape(count, blocksize, blocksize, rest, height, width).permute(0, 3, 4, 1, 5, 2)
    else:
        blocks = data.reshape(count, rest, blocksize, blocksize, height, width).permute(0, 1, 4, 2, 5, 3)
    return blocks.reshape(count, rest, height * blocksize, width * blocksize)


def _space_to_depth(data: Tensor, *, blocksize: int) -> Tensor:
    count, channels, height, width = data.shape
    rows, columns = height // blocksize, width // blocksize
    blocks = data.reshape(count, channels, rows, blocksize, columns, blocksize).permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(count, channels * blocksize**2, rows, columns)


converts_table(
    {
        "DepthToSpace": (_depth_to_space, {"blocksize": 1, "mode": "DCR"}),
        "Flatten": (_flatten, {"axis": 1}),
        "Shape": (_shape, {"start": 0, "end": None}),
        "Size": (_size, {}),
        "SpaceToDepth": (_space_to_depth, {"blocksize": 1}),
    }
)
