"""Slices in torch: every converter answers as onnxruntime does, before and after its weights were trained."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ndonnx.convert import to_torch
from ndonnx.errors import ConversionError
from tests.helpers.models import Net
from tests.helpers.three_ways import OPSETS, image, three_ways


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Convolutions


CONVS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ((4, 7, 6), (5, 4, 3, 3), {}),
    "strides": ((4, 9, 8), (5, 4, 3, 3), {"strides": [2, 3], "pads": [1, 1, 1, 1]}),
    "groups": ((6, 5, 5), (9, 2, 3, 3), {"group": 3}),
    "depthwise": ((6, 5, 5), (6, 1, 3, 3), {"group": 6, "pads": [1, 1, 1, 1]}),
    "dilations": ((2, 9, 9), (3, 2, 3, 2), {"dilations": [2, 3]}),
    "asymmetric pads": ((2, 5, 6), (3, 2, 3, 2), {"pads": [0, 1, 2, 0]}),
    "asymmetric, strided": ((2, 8, 8), (3, 2, 3, 3), {"pads": [0, 0, 1, 1], "strides": [2, 2]}),
    "valid": ((2, 5, 6), (3, 2, 3, 3), {"auto_pad": "VALID", "strides": [2, 2]}),
    "same upper": ((2, 7, 6), (3, 2, 4, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 3]}),
    "same lower": ((2, 7, 6), (3, 2, 4, 3), {"auto_pad": "SAME_LOWER", "strides": [2, 3]}),
    "one dimension": ((4, 11), (6, 2, 3), {"group": 2, "pads": [2, 1], "strides": [2]}),
    "three dimensions": ((2, 5, 4, 6), (3, 2, 2, 3, 2), {"pads": [1, 0, 1, 0, 1, 2], "strides": [2, 1, 1]}),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("case", CONVS)
def test_conv(case: str, opset: int, bias: bool) -> None:
    shape, weight, attributes = CONVS[case]
    net = Net()
    inputs = [net.input("x", "N", *shape), net.weight("w", *weight)] + ([net.weight("b", weight[0])] if bias else [])
    net.op("Conv", *inputs, out="y", **attributes)
    module = three_ways(net, "y", opset)
    assert module.weight_names == (("w", "b") if bias else ("w",))


@settings(max_examples=25)
@given(data=st.data())
def test_conv_of_any_window(data: st.DataObject) -> None:
    same = data.draw(st.sampled_from(["", "SAME_UPPER", "SAME_LOWER"]))
    most = {"kernel": 4, "stride": 3, "dilation": 1 if same else 2}  # onnxruntime has no dilations with SAME
    kernel, stride, dilation = (data.draw(st.tuples(*[st.integers(1, top)] * 2), label) for label, top in most.items())
    window: dict[str, Any] = {"strides": stride, "dilations": dilation}
    window |= {"auto_pad": same} if same else {"pads": data.draw(st.tuples(*[st.integers(0, 3)] * 4), "pads")}
    size = [data.draw(st.integers((k - 1) * d + 1, 9), "size") for k, d in zip(kernel, dilation, strict=True)]
    groups = data.draw(st.sampled_from([1, 2]))
    net = Net()
    weights = net.weight("w", 6, 4 // groups, *kernel), net.weight("b", 6)
    net.op("Conv", net.input("x", "N", 4, *size), *weights, out="y", group=groups, **window)
    three_ways(net, "y")


CONV_TRANSPOSES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ((4, 5, 4), (4, 3, 3, 3), {}),
    "upsampling": ((4, 5, 4), (4, 3, 2, 2), {"strides": [2, 2]}),
    "pads": ((4, 5, 4), (4, 3, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "output padding": ((4, 5, 4), (4, 3, 3, 3), {"strides": [2, 3], "pads": [1, 1, 1, 1], "output_padding": [1, 2]}),
    "groups": ((4, 5, 4), (4, 3, 3, 3), {"group": 2, "strides": [2, 1]}),
    "dilations": ((2, 5, 4), (2, 3, 3, 2), {"dilations": [2, 3]}),
    "more crop behind": ((2, 5, 4), (2, 3, 3, 3), {"strides": [2, 2], "pads": [0, 0, 1, 2]}),
    "more crop before": ((2, 5, 4), (2, 3, 3, 3), {"strides": [2, 2], "pads": [2, 1, 0, 1]}),
    "crop each way": ((2, 5, 4), (2, 3, 4, 4), {"strides": [2, 2], "pads": [2, 0, 1, 2], "output_padding": [1, 0]}),
    "one dimension": ((4, 6), (4, 3, 3), {"strides": [2], "pads": [1, 0]}),
    "three dimensions": ((2, 3, 4, 3), (2, 3, 2, 3, 2), {"strides": [2, 1, 2], "pads": [1, 0, 0, 0, 1, 0]}),
    "valid": ((2, 5, 4), (2, 3, 3, 3), {"auto_pad": "VALID"}),
}


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("case", CONV_TRANSPOSES)
def test_conv_transpose(case: str, opset: int) -> None:
    shape, weight, attributes = CONV_TRANSPOSES[case]
    net = Net()
    outputs = weight[1] * attributes.get("group", 1)
    net.op(
        "ConvTranspose",
        net.input("x", "N", *shape),
        net.weight("w", *weight),
        net.weight("b", outputs),
        out="y",
        **attributes,
    )
    assert three_ways(net, "y", opset).weight_names == ("w", "b")


@pytest.mark.parametrize("opset", [11, 18])
@pytest.mark.parametrize(
    "attributes", [{"auto_pad": "SAME_UPPER"}, {"auto_pad": "SAME_LOWER"}, {"output_shape": [9, 8]}]
)
def test_conv_transpose_whose_size_is_given_converts(attributes: dict[str, Any], opset: int) -> None:
    net = Net()
    net.op(
        "ConvTranspose",
        net.input("x", "N", 2, 5, 4),
        net.weight("w", 2, 3, 3, 3),
        out="y",
        strides=[2, 2],
        **attributes,
    )
    assert three_ways(net, "y", opset).weight_names == ("w",)


# Matrices


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize(("trans_a", "trans_b"), [*itertools.product([0, 1], repeat=2)])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 1.0), (1.0, 2.0)])
def test_gemm(trans_a: int, trans_b: int, alpha: float, beta: float, opset: int) -> None:
    net = Net()
    x = net.input("x", *((6, 4) if trans_a else (4, 6)))
    weight = net.weight("w", *((5, 6) if trans_b else (6, 5)))
    net.op("Gemm", x, weight, net.weight("c", 5), out="y", transA=trans_a, transB=trans_b, alpha=alpha, beta=beta)
    assert three_ways(net, "y", opset).weight_names == ("w", "c")


@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 5), (4, 1), (4, 5)])
def test_gemm_adds_whatever_broadcasts(shape: tuple[int, ...]) -> None:
    net = Net()
    c = net.constant("c", net.rng.standard_normal(shape).astype(np.float32))
    net.op("Gemm", net.input("x", 4, 6), net.weight("w", 6, 5), c, out="y", alpha=0.5)
    module = three_ways(net, "y")
    assert set(module.weight_names) == ({"w", "c"} if np.prod(shape) > 1 else {"w"})


def test_gemm_without_an_offset() -> None:
    net = Net()
    net.op("Gemm", net.input("x", "N", 6), net.weight("w", 5, 6), out="y", transB=1)
    three_ways(net, "y")


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("shape", [(6,), (4, 6), (3, 2, 6)])
def test_matmul_and_offset(shape: tuple[int, ...], opset: int) -> None:
    net = Net()
    y = net.op("MatMul", net.input("x", "N", *shape), net.weight("w", 6, 5))
    net.op("Add", y, net.weight("b", 5), out="y")
    assert three_ways(net, "y", opset).weight_names == ("w", "b")


# Point by point, and normalisations


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("slope", [(4, 1, 1), (1, 1, 1), (4, 5, 6), (6,), (1,)])
def test_prelu(slope: tuple[int, ...], opset: int) -> None:
    net, x = image(4, 5, 6)
    net.op("PRelu", x, net.constant("slope", net.rng.uniform(-0.5, 0.5, slope).astype(np.float32)), out="y")
    module = three_ways(net, "y", opset)
    assert ("slope" in module.weight_names) == (np.prod(slope) > 1)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("shape", [(4,), (4, 6), (4, 5, 6), (4, 2, 3, 2)])
def test_batch_normalization(shape: tuple[int, ...], opset: int) -> None:
    net, x = image(*shape)
    parts = [
        net.constant(n, net.rng.uniform(0.5, 1.5, 4).astype(np.float32)) for n in ("scale_", "bias", "mean", "var")
    ]
    net.op("BatchNormalization", x, *parts, out="y", epsilon=1e-2)
    module = three_ways(net, "y", opset)
    trained = {n: w.requires_grad for n, w in zip(module.weight_names, module.weights, strict=True)}
    assert trained == {"scale": True, "scale_": True, "bias": True, "mean": False, "var": False}


def test_batch_normalization_in_training_mode_is_refused_by_name() -> None:
    net, x = image(4, 5, 5)
    parts = [net.constant(n, np.ones(4, np.float32)) for n in ("s", "b", "m", "v")]
    net.op("BatchNormalization", x, *parts, out=["y", "mean_out", "var_out"], training_mode=1)
    with pytest.raises(ConversionError, match="BatchNormalization"):
        to_torch(ir.from_proto(net.proto("y")))


@pytest.mark.parametrize("opset", [17, 18, 21])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("axis", [-1, 1, -2, 2, 0])
def test_layer_normalization(axis: int, bias: bool, opset: int) -> None:
    net = Net()
    shape = (3, 5, 6)
    x = net.op("Mul", net.input("x", *shape), net.weight("first", 6))
    inner = shape[axis:]
    parts = [net.constant(n, net.rng.uniform(0.5, 1.5, inner).astype(np.float32)) for n in ("s", "b")[: 1 + bias]]
    net.op("LayerNormalization", x, *parts, out="y", axis=axis, epsilon=1e-3)
    three_ways(net, "y", opset)


@pytest.mark.parametrize(("scale", "bias"), [((6,), (6,)), ((5, 6), (6,)), ((1,), (5, 6)), ((5, 1), (1, 6))])
def test_layer_normalization_with_weights_that_broadcast(scale: tuple[int, ...], bias: tuple[int, ...]) -> None:
    net = Net()
    parts = [net.constant(n, net.rng.uniform(0.5, 1.5, s).astype(np.float32)) for n, s in (("s", scale), ("b", bias))]
    net.op("LayerNormalization", net.input("x", "N", 5, 6), *parts, out="y", axis=1)
    three_ways(net, "y")


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("shape", [(4, 7), (4, 5, 6), (4, 2, 3, 2)])
def test_instance_normalization(shape: tuple[int, ...], opset: int) -> None:
    net, x = image(*shape)
    parts = [net.constant(n, net.rng.uniform(0.5, 1.5, 4).astype(np.float32)) for n in ("s", "b")]
    net.op("InstanceNormalization", x, *parts, out="y", epsilon=1e-2)
    three_ways(net, "y", opset)
