"""Converters of rounding to integers: gradients pass as if nothing were rounded, but not where a number is cut off."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ndonnx.convert.registry import OnnxNode, converts

ROUNDED = "QuantizeDequantize"
"""A `QuantizeLinear` and the `DequantizeLinear` behind it in one, see `ndonnx.convert.fuse_rounding`."""


@converts(ROUNDED)
class Rounded(nn.Module):
    """A value as the integers of a scale and a zero point hold it: the straight-through estimator."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        del node

    def forward(self, data: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        ends = torch.iinfo(zero.dtype)
        found: Tensor = torch.fake_quantize_per_tensor_affine(
            data, scale.float(), zero.to(torch.int32), ends.min, ends.max
        )
        return found
