"""Slices in torch: every converter answers as onnxruntime does, before and after its weights were trained."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from ndonnx.convert import TorchSlice, check_parity, relative_error, to_torch, write_back
from ndonnx.errors import ConversionError, ParityError
from ndonnx.graph import slice_cost
from tests.helpers.models import BUILDERS, Array, Net, inputs_of, run

OPSETS = [9, 13, 17, 18, 21]
TOLERANCE = 1e-5
FAR = 2**31 - 1
"""What exporters write for `to the end`."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def disturb(module: TorchSlice) -> None:
    """Move every trained weight by about a tenth."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))


def three_ways(net: Net, output: str, opset: int = 18, feed: Mapping[str, Array] | None = None) -> TorchSlice:
    """onnxruntime, torch, and back in ONNX with other weights; returns the torch slice with these."""
    proto = net.proto(output, opset=opset, ir_version=10)
    feed = feed or inputs_of(proto)
    model = ir.from_proto(proto)
    expected = run(proto, feed)[output]
    module = to_torch(model)
    inputs = [feed[name] for name in module.input_names]
    check_parity(module, inputs, expected, TOLERANCE)

    disturb(module)
    trained = write_back(model, module.trained_weights())
    answer = run(trained, feed)[output]
    check_parity(module, inputs, answer, TOLERANCE)
    if answer.size:
        assert not np.array_equal(answer, expected), "the trained weights are not those that the slice computes with"
    assert run(model, feed)[output].tobytes() == expected.tobytes(), "the teacher's slice was changed"
    return module


def image(*shape: int) -> tuple[Net, str]:
    """A net with one input of this shape, and a trained scale per channel behind it."""
    net = Net()
    x = net.input("x", "N", *shape)
    scale = net.constant("scale", net.rng.uniform(0.5, 1.5, (shape[0], *(1 for _ in shape[1:]))).astype(np.float32))
    return net, net.op("Mul", x, scale)


def numbers(net: Net, *values: int) -> str:
    return net.ints(*values)


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


# Parameters


def whole(net: Net) -> str:
    """A bit of everything that holds a constant."""
    x = net.norm(net.conv(net.input("x", "N", 3, 6, 6), 3, 8, out="conv"), 8, out="bn")
    x = net.op("PRelu", x, net.weight("slope", 8, 1, 1))
    x = net.op("Pad", x, net.ints(0, 0, 1, 1, 0, 0, 1, 1), net.constant("value", np.array(0.5, np.float32)))
    x = net.op("Clip", x, net.constant("low", np.array(-2, np.float32)), net.constant("high", np.array(2, np.float32)))
    x = net.op("Mul", x, net.weight("layer_scale", 1, 8, 1, 1))
    x = net.op("Mul", x, net.constant("half", np.array([0.5], np.float32)))
    x = net.op("ReduceMean", x, net.ints(2, 3), keepdims=0)
    x = net.op("Add", net.op("MatMul", x, net.weight("matrix", 8, 6)), net.weight("offset", 6))
    return net.gemm(net.op("Dropout", net.relu(x), net.constant("ratio", np.array(0.9, np.float32))), 6, 4, out="y")


WHOLE = [
    "conv.weight", "conv.bias", "bn.scale", "bn.bias", "bn.mean", "bn.var", "slope", "layer_scale", "matrix", "offset",
    "y.weight", "y.bias",
]  # fmt: skip


def test_every_float_weight_is_one_parameter_of_its_name() -> None:
    net = Net()
    module = three_ways(net, whole(net))
    assert list(module.weight_names) == WHOLE
    assert len(list(module.parameters())) == len(WHOLE)
    assert not list(module.buffers()) or all(not b.is_floating_point() or b.numel() < 2 for b in module.buffers())


@pytest.mark.parametrize("name", sorted(BUILDERS.keys() - {"with_if", "local_function", "constant_nodes"}))
def test_parameters_are_those_that_the_costs_count(name: str) -> None:
    model = ir.from_proto(BUILDERS[name]())
    try:
        module = to_torch(model)
    except ConversionError:
        pytest.skip("holds an operator without converter")
    sizes = {tensor.name: numpy_helper.to_array(tensor).size for tensor in BUILDERS[name]().graph.initializer}
    assert {n: w.numel() for n, w in zip(module.weight_names, module.weights, strict=True)}.items() <= sizes.items()
    static = sizes.get("scales", 0)  # of a Resize: how far it scales is no weight
    assert sum(weight.numel() for weight in module.weights) == slice_cost(model).parameters - static


def test_a_weight_used_twice_is_one_parameter_whose_gradient_is_the_sum() -> None:
    def build(first: str, second: str) -> TorchSlice:
        net = Net()
        for name in dict.fromkeys((first, second)):
            net.constant(name, np.random.default_rng(5).standard_normal((6, 6)).astype(np.float32))
        net.op("MatMul", net.op("Tanh", net.op("MatMul", net.input("x", "N", 6), first)), second, out="y")
        return to_torch(ir.from_proto(net.proto("y")))

    tied, apart = build("w", "w"), build("v", "w")
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((5, 6)).astype(np.float32))
    for module in (tied, apart):
        module(x).square().sum().backward()
    (gradient,) = (weight.grad for weight in tied.parameters())
    first, second = (weight.grad for weight in apart.parameters())
    assert gradient is not None and first is not None and second is not None
    torch.testing.assert_close(gradient, first + second)


def test_a_tied_weight_is_written_back_once_for_both_uses() -> None:
    net = Net()
    w = net.weight("w", 6, 6)
    net.op("Gemm", net.relu(net.op("MatMul", net.input("x", "N", 6), w)), w, out="y", transB=1)
    assert three_ways(net, "y").weight_names == ("w",)


def test_training_mode_changes_nothing_but_the_weights() -> None:
    net = Net()
    output = whole(net)
    proto = net.proto(output)
    module, feed = to_torch(ir.from_proto(proto)), inputs_of(proto)
    x = torch.from_numpy(feed["x"])
    before = module(x).detach()
    module.train()
    assert module.training and not any(part.training for part in module.body.modules())
    assert torch.equal(module(x), before)
    optimiser = torch.optim.SGD([w for w in module.parameters() if w.requires_grad], lr=0.01)
    module(x).square().sum().backward()
    optimiser.step()
    trained = module.trained_weights()
    for name, array in net.weights.items():
        if name in WHOLE:
            assert np.array_equal(trained[name], array) == (name in ("bn.mean", "bn.var")), name


def test_inputs_keep_their_order_and_integers_their_type() -> None:
    net = Net()
    ids = net.input("ids", "N", 4, dtype=TensorProto.INT64)
    x = net.op("Gather", net.weight("table", 10, 6), ids)
    net.op("Mul", x, net.input("scale", "N", 4, 6), out="y")
    rng = np.random.default_rng(0)
    feed: dict[str, Array] = {
        "ids": rng.integers(0, 10, (3, 4)),
        "scale": rng.standard_normal((3, 4, 6)).astype(np.float32),
    }
    module = three_ways(net, "y", feed=feed)
    assert module.input_names == ("ids", "scale") and module.weight_names == ("table",)


# What does not convert


def test_an_unknown_operator_is_refused_by_name() -> None:
    net, x = image(4, 5, 6)
    net.op("Bernoulli", net.op("Sigmoid", x), out="y", dtype=TensorProto.FLOAT)
    with pytest.raises(ConversionError, match="Bernoulli"):
        to_torch(ir.from_proto(net.proto("y")))


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_a_slice_that_is_not_in_float32_is_refused_by_the_name_of_a_value(kind: type) -> None:
    net = Net()
    x = net.input("x", "N", 6, dtype=TensorProto.FLOAT16 if kind is np.float16 else TensorProto.DOUBLE)
    net.op("MatMul", x, net.constant("w", np.ones((6, 4), kind)), out="y")
    with pytest.raises(ConversionError, match=r"'x' is (FLOAT16|DOUBLE).*export the teacher in float32"):
        to_torch(ir.from_proto(net.proto("y")))


# The parity gate


def gated() -> tuple[TorchSlice, list[Array], Array]:
    net = Net()
    net.gemm(net.relu(net.gemm(net.input("x", "N", 6), 6, 8, out="h")), 8, 4, out="y")
    proto = net.proto("y")
    feed = inputs_of(proto)
    return to_torch(ir.from_proto(proto)), [feed["x"]], run(proto, feed)["y"]


def test_the_gate_returns_the_error() -> None:
    module, inputs, expected = gated()
    assert 0 <= check_parity(module, inputs, expected, TOLERANCE) <= TOLERANCE
    assert check_parity(module, inputs, expected * 2, 1.0) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("place", range(4))
def test_one_corrupt_weight_does_not_pass_the_gate(place: int) -> None:
    module, inputs, expected = gated()
    with torch.no_grad():
        list(module.parameters())[place].view(-1)[0] += 0.05
    with pytest.raises(ParityError, match=r"differs from onnxruntime by 0\.\d+ of its scale \(at most 0.0001\)"):
        check_parity(module, inputs, expected, 1e-4)


def test_nothing_that_is_not_a_number_passes_the_gate() -> None:
    module, inputs, expected = gated()
    for broken in (np.nan, np.inf):
        wrong = expected.copy()
        wrong[0, 0] = broken
        with pytest.raises(ParityError, match="differs"):
            check_parity(module, inputs, wrong, 1e30)
    with torch.no_grad():
        next(module.parameters())[0] = torch.nan
    with pytest.raises(ParityError, match="nan"):
        check_parity(module, inputs, expected, 1e30)


def test_another_shape_does_not_pass_the_gate_even_if_it_broadcasts() -> None:
    module, inputs, expected = gated()
    with pytest.raises(ParityError, match=r"shape \(3, 4\), onnxruntime with \(1, 3, 4\)"):
        check_parity(module, inputs, expected[None], 1e30)


def test_a_slice_that_fails_in_torch_does_not_pass_the_gate() -> None:
    module, inputs, expected = gated()
    with pytest.raises(ParityError, match="does not run: RuntimeError"):
        check_parity(module, [inputs[0][:, :5]], expected, 1e-4)


@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=6).filter(lambda xs: max(map(abs, xs)) > 1e-3),
    st.floats(1e-3, 1e3),
)
def test_the_relative_error_does_not_depend_on_the_scale(values: list[float], scale: float) -> None:
    expected = np.array(values, np.float64)
    answer = expected + 0.1 * np.abs(expected).max()
    assert relative_error(expected, expected) == 0
    assert relative_error(answer, expected) == pytest.approx(0.1)
    assert relative_error(answer * scale, expected * scale) == pytest.approx(0.1)


def test_the_relative_error_of_nothing_and_of_zeros() -> None:
    assert relative_error(np.zeros(3), np.zeros(3)) == 0
    assert relative_error(np.full(3, 0.25), np.zeros(3)) == 0.25
    assert relative_error(np.zeros((0, 3)), np.zeros((0, 3))) == 0
    assert np.isnan(relative_error(np.full(3, np.nan), np.ones(3)))


# The way back


def test_written_back_weights_change_nothing_else() -> None:
    net = Net()
    output = whole(net)
    model = ir.from_proto(net.proto(output))
    module = to_torch(model)
    disturb(module)
    old, new = ir.to_proto(model), ir.to_proto(write_back(model, module.trained_weights()))
    weights = {t.name: numpy_helper.to_array(t) for t in new.graph.initializer}
    assert sorted(weights) == sorted(net.weights)
    for name, array in net.weights.items():
        assert weights[name].dtype == array.dtype and weights[name].shape == array.shape
    for proto in (old, new):
        del proto.graph.initializer[:]
    assert old.SerializeToString(deterministic=True) == new.SerializeToString(deterministic=True)


def test_weights_that_do_not_fit_are_not_written_back() -> None:
    net = Net()
    net.op("MatMul", net.input("x", "N", 6), net.weight("w", 6, 4), out="y")
    model = ir.from_proto(net.proto("y"))
    with pytest.raises(ValueError, match=r"w: shape \(4, 6\)"):
        write_back(model, {"w": np.zeros((4, 6), np.float32)})
    with pytest.raises(KeyError, match="stranger"):
        write_back(model, {"stranger": np.zeros(3, np.float32)})
