"""Converters of the linear operators; their weights are inputs, so that they stay parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ndonnx.convert.registry import OnnxNode, converts

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class Window:
    """Strides, dilations and padding of a convolution or a pool, as ONNX states them."""

    def __init__(self, attributes: Any) -> None:
        self.strides: list[int] | None = attributes.get("strides")
        self.dilations: list[int] | None = attributes.get("dilations")
        self.pads: list[int] | None = attributes.get("pads")
        self.auto_pad: str = attributes.get("auto_pad", "NOTSET")

    def stride(self, rank: int) -> list[int]:
        """Stride along each spatial axis."""
        return self.strides or [1] * rank

    def dilation(self, rank: int) -> list[int]:
        """Dilation along each spatial axis."""
        return self.dilations or [1] * rank

    def padding(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[list[int], list[int]]:
        """Elements added before and behind each spatial axis of a data tensor of this size."""
        rank = len(kernel)
        if self.auto_pad in ("NOTSET", ""):
            pads = self.pads or [0] * (2 * rank)
            return list(pads[:rank]), list(pads[rank:])
        if self.auto_pad == "VALID":
            return [0] * rank, [0] * rank
        before, behind = [], []
        for length, k, s, d in zip(size, kernel, self.stride(rank), self.dilation(rank), strict=True):
            total = max((-(-length // s) - 1) * s + (k - 1) * d + 1 - length, 0)
            small, large = total // 2, total - total // 2
            before.append(small if self.auto_pad == "SAME_UPPER" else large)
            behind.append(large if self.auto_pad == "SAME_UPPER" else small)
        return before, behind


def torch_pads(before: Sequence[int], behind: Sequence[int]) -> list[int]:
    """ONNX's pads in the order of `torch.nn.functional.pad`: last axis first."""
    return [n for pair in zip(reversed(before), reversed(behind), strict=True) for n in pair]


class Conv(nn.Module):
    """`Conv`: data (N, C, ...), weight (O, C/group, ...), bias (O)."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.window = Window(node.attributes)
        self.groups = int(node.attributes.get("group", 1))

    def forward(self, data: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rank = weight.ndim - 2
        before, behind = self.window.padding(data.shape[2:], weight.shape[2:])
        if before != behind:
            data = F.pad(data, torch_pads(before, behind))
            before = [0] * rank
        return _CONV[rank](
            data, weight, bias, self.window.stride(rank), before, self.window.dilation(rank), self.groups
        )


class ConvTranspose(nn.Module):
    """`ConvTranspose`: data (N, C, ...), weight (C, O/group, ...), bias (O)."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        attributes = node.attributes
        self.window = Window(attributes)
        self.groups = int(attributes.get("group", 1))
        self.output_padding: list[int] | None = attributes.get("output_padding")
        self.output_shape: list[int] | None = attributes.get("output_shape")

    def forward(self, data: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rank = weight.ndim - 2
        extra = self.output_padding or [0] * rank
        before, behind = self._crops(data.shape[2:], weight.shape[2:], extra)
        # torch crops both sides alike; what ONNX crops beyond that is cropped afterwards.
        alike = [max(0, min(pair)) for pair in zip(before, behind, strict=True)]
        grows = min(behind) < 0
        out = _CONV_TRANSPOSE[rank](
            data,
            weight,
            None if grows else bias,
            self.window.stride(rank),
            alike,
            extra,
            self.groups,
            self.window.dilation(rank),
        )
        if before == behind:
            return out
        rest = [[c - p for c, p in zip(alike, side, strict=True)] for side in (before, behind)]
        out = F.pad(out, torch_pads(*rest))
        return out + bias.view(-1, *[1] * rank) if grows and bias is not None else out

    def _crops(self, size: Sequence[int], kernel: Sequence[int], extra: Sequence[int]) -> tuple[list[int], list[int]]:
        """Elements cropped before and behind each spatial axis; where there are too few, negative: zeros follow."""
        rank, auto = len(kernel), self.window.auto_pad
        steps = self.window.stride(rank)
        if self.output_shape:
            wanted = self.output_shape[-rank:]
        elif auto in ("SAME_UPPER", "SAME_LOWER"):
            wanted = [length * step for length, step in zip(size, steps, strict=True)]
        else:
            return self.window.padding(size, kernel)
        before, behind = [], []
        for length, k, s, d, e, target in zip(
            size, kernel, steps, self.window.dilation(rank), extra, wanted, strict=True
        ):
            total = s * (length - 1) + e + (k - 1) * d + 1 - target
            half = max(total, 0) // 2
            before.append(half if auto == "SAME_UPPER" else max(total, 0) - half)
            behind.append((total if self.output_shape else max(total, 0)) - before[-1])
        return before, behind


class Gemm(nn.Module):
    """`Gemm`: alpha * A B + beta * C."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        attributes = node.attributes
        self.alpha, self.beta = float(attributes.get("alpha", 1.0)), float(attributes.get("beta", 1.0))
        self.trans_a, self.trans_b = bool(attributes.get("transA", 0)), bool(attributes.get("transB", 0))

    def forward(self, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a, b = a.T if self.trans_a else a, b if self.trans_b else b.T
        if self.alpha == 1.0 and self.beta == 1.0 and (c is None or c.ndim == 1):
            return F.linear(a, b, c)
        out = self.alpha * F.linear(a, b)
        return out if c is None else out + self.beta * c


converts("Conv")(Conv)
converts("ConvTranspose")(ConvTranspose)
converts("Gemm")(Gemm)


@converts("PRelu")
class PRelu(nn.Module):
    """`PRelu` with a slope of any shape that broadcasts to the data's."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()

    def forward(self, data: Tensor, slope: Tensor) -> Tensor:
        return torch.clamp(data, min=0) + slope * torch.clamp(data, max=0)
