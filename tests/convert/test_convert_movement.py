"""Pads, slices and pools in torch: the same as onnxruntime, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.models import Net
from tests.helpers.three_ways import OPSETS, image, three_ways

FAR = 2**31 - 1
"""What exporters write for `to the end`."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def numbers(net: Net, *values: int) -> str:
    return net.ints(*values)


# Moving and pooling


PADS = {
    "last axis": [0, 0, 0, 2, 0, 0, 0, 1],
    "image": [0, 0, 1, 2, 0, 0, 2, 1],
    "channels too": [0, 1, 1, 0, 0, 2, 0, 1],
    "samples too": [1, 0, 0, 1, 1, 0, 0, 0],
}


def pad(net: Net, x: str, pads: list[int], mode: str, opset: int, value: float | None, axes: list[int] | None) -> None:
    if opset < 11:
        extra: dict[str, Any] = {} if value is None else {"value": value}
        net.op("Pad", x, out="y", mode=mode, pads=pads, **extra)
        return
    inputs = [x, numbers(net, *pads), net.constant("v", np.array(value, np.float32)) if value is not None else ""]
    inputs += [numbers(net, *axes)] if axes is not None else []
    while not inputs[-1]:
        inputs.pop()
    net.op("Pad", *inputs, out="y", mode=mode)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
@pytest.mark.parametrize("case", PADS)
def test_pad(case: str, mode: str, opset: int) -> None:
    net, x = image(4, 5, 6)
    pad(net, x, PADS[case], mode, opset, None, None)
    three_ways(net, "y", opset)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("pads", [PADS["image"], [0, 0, -1, 0, 0, 0, 2, -2]])
def test_pad_with_a_value(pads: list[int], opset: int) -> None:
    net, x = image(4, 5, 6)
    pad(net, x, pads, "constant", opset, 1.5, None)
    three_ways(net, "y", opset)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
@pytest.mark.parametrize("opset", [19, 21])
def test_pad_along_named_axes(mode: str, opset: int) -> None:
    net, x = image(4, 5, 6)
    pad(net, x, [2, 1, 3, 2], mode, opset, None, [-1, 2])
    three_ways(net, "y", opset)


@pytest.mark.parametrize("shape", [(6,), (4, 7), (2, 3, 4, 5)])
@pytest.mark.parametrize("mode", ["reflect", "edge"])
def test_pad_of_any_rank(mode: str, shape: tuple[int, ...]) -> None:
    net, x = image(*shape)
    zeros = [0] * len(shape)
    pad(net, x, [*zeros, 2, *zeros, 1], mode, 18, None, None)
    three_ways(net, "y")


def cut(net: Net, x: str, starts: list[int], ends: list[int], axes: list[int], steps: list[int], opset: int) -> None:
    if opset < 10:
        net.op("Slice", x, out="y", starts=starts, ends=ends, axes=axes)
    else:
        net.op("Slice", x, *(numbers(net, *values) for values in (starts, ends, axes, steps)), out="y")


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize(
    ("starts", "ends", "axes"),
    [([1], [3], [1]), ([-3, 0], [FAR, 4], [-1, 2]), ([0, 2], [-1, -1], [1, 3]), ([-99], [99], [2]), ([2], [2], [2])],
)
def test_slice(starts: list[int], ends: list[int], axes: list[int], opset: int) -> None:
    net, x = image(4, 5, 6)
    cut(net, x, starts, ends, axes, [1] * len(starts), opset)
    three_ways(net, "y", opset)


@settings(max_examples=40)
@given(data=st.data())
def test_slice_with_any_bounds(data: st.DataObject) -> None:
    net, x = image(3, 7)
    bound = st.one_of(st.integers(-10, 10), st.sampled_from([FAR, -FAR, 2**63 - 1, -(2**63)]))
    step = st.integers(-4, 4).filter(bool)
    cases = [data.draw(st.tuples(bound, bound, step), label) for label in ("channel", "place")]
    starts, ends, steps = (list(column) for column in zip(*cases, strict=True))
    cut(net, x, starts, ends, data.draw(st.sampled_from([[1, 2], [-2, -1], [1, -1]])), steps, 18)
    three_ways(net, "y")


def test_slice_along_all_axes() -> None:
    net, x = image(4, 5, 6)
    net.op("Slice", x, numbers(net, 0, 1, 0, 2), numbers(net, FAR, 3, FAR, 5), out="y")
    three_ways(net, "y")


POOLS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_shape": [2, 3]},
    "strides": {"kernel_shape": [2, 3], "strides": [2, 2]},
    "pads": {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},
    "counted pads": {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1},
    "asymmetric pads": {"kernel_shape": [3, 2], "pads": [0, 1, 2, 0], "strides": [2, 2]},
    "counted asymmetric pads": {"kernel_shape": [3, 2], "pads": [0, 1, 2, 0], "count_include_pad": 1},
    "same upper": {"kernel_shape": [2, 3], "auto_pad": "SAME_UPPER", "strides": [2, 2]},
    "same lower": {"kernel_shape": [2, 3], "auto_pad": "SAME_LOWER"},
    "wide pads": {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1], "strides": [2, 2]},
}
CEIL_POOLS: dict[str, dict[str, Any]] = {
    "ceil": {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1},
    "ceil with pads": {"kernel_shape": [3, 3], "strides": [2, 3], "pads": [1, 1, 1, 1], "ceil_mode": 1},
}


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("case", POOLS)
def test_average_pool(case: str, opset: int) -> None:
    net, x = image(3, 7, 8)
    net.op("AveragePool", x, out="y", **POOLS[case])
    three_ways(net, "y", opset)


@pytest.mark.parametrize("opset", [13, 18, 21])
@pytest.mark.parametrize("case", CEIL_POOLS)
def test_average_pool_with_a_cut_off_last_window(case: str, opset: int) -> None:
    net, x = image(3, 8, 7)
    net.op("AveragePool", x, out="y", **CEIL_POOLS[case])
    three_ways(net, "y", opset)


@pytest.mark.parametrize(("shape", "kernel"), [((3, 9), [3]), ((3, 5, 4, 6), [2, 3, 2])])
def test_average_pool_of_other_ranks(shape: tuple[int, ...], kernel: list[int]) -> None:
    net, x = image(*shape)
    net.op("AveragePool", x, out="y", kernel_shape=kernel)
    three_ways(net, "y")
