"""Converters of element-wise operators, and of those that change only the type of the elements."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from onnx import TensorProto
from torch import Tensor, nn

from ndonnx.convert.registry import OnnxNode, converts
from ndonnx.convert.tables import Numbers, converts_table, refuse_further_outputs

_TYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.BOOL: torch.bool,
}


@converts("Cast")
class Cast(nn.Module):
    """`Cast` among the types that torch has arithmetic for."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.dtype = type_of(int(node.attributes["to"]))

    def forward(self, data: Tensor) -> Tensor:
        return data.to(self.dtype)


def type_of(number: int) -> torch.dtype:
    """torch's type for ONNX's, by its number in `TensorProto`."""
    if number not in _TYPES:
        name = TensorProto.DataType.Name(number) if number in TensorProto.DataType.values() else number
        raise NotImplementedError(f"Cast to the type {name}")
    return _TYPES[number]


def _cast_like(data: Tensor, target: Tensor) -> Tensor:
    return data.to(target.dtype)


def _pow(base: Tensor, exponent: Tensor) -> Tensor:
    return torch.pow(base, exponent).to(base.dtype)


def _is_inf(data: Tensor, *, detect_negative: int, detect_positive: int) -> Tensor:
    negative = torch.isneginf(data) if detect_negative else torch.zeros_like(data, dtype=torch.bool)
    return negative | torch.isposinf(data) if detect_positive else negative


def _bit_shift(data: Tensor, shift: Tensor, *, direction: str) -> Tensor:
    return data << shift if direction == "LEFT" else data >> shift


def _fold(function: Callable[[Tensor, Tensor], Tensor], *inputs: Tensor) -> Tensor:
    return functools.reduce(function, inputs)


def _mean(*inputs: Tensor) -> Tensor:
    return _fold(torch.add, *inputs) / len(inputs)


converts_table(
    {
        "Acosh": (torch.acosh, {}),
        "Asinh": (torch.asinh, {}),
        "Atanh": (torch.atanh, {}),
        "BitShift": (_bit_shift, {"direction": ""}),
        "BitwiseAnd": (torch.bitwise_and, {}),
        "BitwiseNot": (torch.bitwise_not, {}),
        "BitwiseOr": (torch.bitwise_or, {}),
        "BitwiseXor": (torch.bitwise_xor, {}),
        "CastLike": (_cast_like, {}),
        "Cosh": (torch.cosh, {}),
        "Det": (torch.det, {}),
        "IsInf": (_is_inf, {"detect_negative": 1, "detect_positive": 1}),
        "IsNaN": (torch.isnan, {}),
        "Max": (functools.partial(_fold, torch.maximum), {}),
        "Mean": (_mean, {}),
        "Min": (functools.partial(_fold, torch.minimum), {}),
        "Pow": (_pow, {}),
        "Sinh": (torch.sinh, {}),
        "Sum": (functools.partial(_fold, torch.add), {}),
    }
)


@converts("CumSum")
class CumSum(nn.Module):
    """`CumSum`, from the front or from the end, with each element itself or without it."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.exclusive = bool(node.attributes.get("exclusive", 0))
        self.reverse = bool(node.attributes.get("reverse", 0))
        self.numbers = Numbers()

    def forward(self, data: Tensor, axis: Tensor) -> Tensor:
        along = int(self.numbers(axis)[0])
        data = data.flip(along) if self.reverse else data
        if self.exclusive:
            first = torch.zeros_like(data.narrow(along, 0, 1))
            data = torch.cat([first, data.narrow(along, 0, data.shape[along] - 1)], along)
        total = torch.cumsum(data, along, dtype=data.dtype)
        return total.flip(along) if self.reverse else total


@converts("Dropout")
class Dropout(nn.Module):
    """`Dropout` as at inference: nothing is dropped."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        refuse_further_outputs(node)

    def forward(self, data: Tensor, ratio: Tensor | None = None, training_mode: Tensor | None = None) -> Tensor:
        return data


@converts("EyeLike")
class EyeLike(nn.Module):
    """`EyeLike`: ones on the k-th diagonal, in the data's type unless another is given."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        number = node.attributes.get("dtype")
        self.dtype = None if number is None else type_of(int(number))
        self.k = int(node.attributes.get("k", 0))

    def forward(self, data: Tensor) -> Tensor:
        return torch.ones_like(data, dtype=self.dtype).triu(self.k).tril(self.k)
