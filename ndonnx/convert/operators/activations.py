"""Converters of the activations that onnx2torch lacks or narrows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ndonnx.convert.registry import OnnxNode, converts, opset_of
from ndonnx.convert.tables import converts_table

_HALF = 0.5


def _selu(data: Tensor, *, alpha: float, gamma: float) -> Tensor:
    return gamma * torch.where(data > 0, data, alpha * torch.expm1(data.clamp(max=0)))


def _swish(data: Tensor, *, alpha: float) -> Tensor:
    return data * torch.sigmoid(alpha * data)


def _thresholded_relu(data: Tensor, *, alpha: float) -> Tensor:
    return torch.where(data > alpha, data, 0.0)


def _shrink(data: Tensor, *, lambd: float, bias: float) -> Tensor:
    return torch.where(data < -lambd, data + bias, torch.where(data > lambd, data - bias, 0.0))


def _hard_sigmoid(data: Tensor, *, alpha: float, beta: float) -> Tensor:
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == _HALF:
        return F.hardsigmoid(data)
    return F.hardtanh(alpha * data + beta, 0.0, 1.0)


converts_table(
    {
        "HardSigmoid": (_hard_sigmoid, {"alpha": 0.2, "beta": 0.5}),
        "HardSwish": (F.hardswish, {}),
        "Gelu": (F.gelu, {"approximate": "none"}),
        "Mish": (F.mish, {}),
        "Selu": (_selu, {"alpha": 1.67326319217681884765625, "gamma": 1.05070102214813232421875}),
        "Shrink": (_shrink, {"lambd": 0.5, "bias": 0.0}),
        "Swish": (_swish, {"alpha": 1.0}),
        "ThresholdedRelu": (_thresholded_relu, {"alpha": 1.0}),
    }
)


@converts("Clip")
class Clip(nn.Module):
    """`Clip` between bounds that are attributes (before opset 11) or inputs, each of them optional."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.low: float | None = node.attributes.get("min")
        self.high: float | None = node.attributes.get("max")

    def forward(self, data: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
        least, most = (self.low if low is None else low.item()), (self.high if high is None else high.item())
        if least is None and most is None:
            return data
        if least is None or most is None or not data.is_floating_point():
            return torch.clamp(data, least, most)
        return F.hardtanh(data, least, most)  # one pass for the gradient, where `clamp` takes four


def _hardmax(data: Tensor, axis: int) -> Tensor:
    return torch.zeros_like(data).scatter(axis, data.argmax(axis, keepdim=True), 1.0)


_ALONG_AXIS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "Hardmax": _hardmax,
    "LogSoftmax": torch.log_softmax,
    "Softmax": torch.softmax,
}


@converts(*_ALONG_AXIS)
class AlongAxis(nn.Module):
    """`Softmax` and its kin along one axis, or over all the axes from it on (before opset 13)."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.function = _ALONG_AXIS[node.operation_type]
        self.flatten = opset_of(node) < 13
        self.axis = int(node.attributes.get("axis", 1 if self.flatten else -1))

    def forward(self, data: Tensor) -> Tensor:
        if not self.flatten:
            return self.function(data, self.axis)
        return self.function(data.flatten(self.axis), -1).reshape(data.shape)
