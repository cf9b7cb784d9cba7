"""Converters of the normalisations, always as at inference: running moments are never updated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ndonnx.convert.registry import OnnxNode, converts


@converts("BatchNormalization")
class BatchNormalization(nn.Module):
    """`BatchNormalization` with the moments that the teacher holds."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.epsilon = float(node.attributes.get("epsilon", 1e-5))
        if node.attributes.get("training_mode", 0) or len([name for name in node.output_values if name]) > 1:
            raise NotImplementedError("BatchNormalization in training mode")

    def forward(self, data: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return F.batch_norm(data, mean, variance, scale, bias, training=False, eps=self.epsilon)


@converts("LayerNormalization")
class LayerNormalization(nn.Module):
    """`LayerNormalization` over the axes from `axis` on."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.axis = int(node.attributes.get("axis", -1))
        self.epsilon = float(node.attributes.get("epsilon", 1e-5))
        if len([name for name in node.output_values if name]) > 1:
            raise NotImplementedError("LayerNormalization with mean output")

    def forward(self, data: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        shape = data.shape[self.axis :]
        if scale.shape == shape and (bias is None or bias.shape == shape):
            return F.layer_norm(data, shape, scale, bias, self.epsilon)
        out = F.layer_norm(data, shape, None, None, self.epsilon) * scale
        return out if bias is None else out + bias


@converts("InstanceNormalization")
class InstanceNormalization(nn.Module):
    """`InstanceNormalization`: each sample and channel by its own moments."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.epsilon = float(node.attributes.get("epsilon", 1e-5))

    def forward(self, data: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        axes = tuple(range(2, data.ndim))
        variance, mean = torch.var_mean(data, dim=axes, correction=0, keepdim=True)
        shape = (1, -1, *(1 for _ in axes))
        return (data - mean) * torch.rsqrt(variance + self.epsilon) * scale.view(shape) + bias.view(shape)
