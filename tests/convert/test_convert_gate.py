"""What becomes of parameters, what does not convert, the parity gate, and the way back to ONNX."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from ndonnx.convert import TorchSlice, check_parity, relative_error, to_torch, write_back
from ndonnx.errors import ConversionError, ParityError
from ndonnx.graph import slice_cost
from tests.helpers.models import BUILDERS, Array, Net, inputs_of, run
from tests.helpers.three_ways import TOLERANCE, disturb, image, three_ways


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("place", range(4))
def test_one_corrupt_weight_does_not_pass_the_gate(place: int, strict: bool) -> None:
    module, inputs, expected = gated()
    with torch.no_grad():
        list(module.parameters())[place].view(-1)[0] += 0.05
    with pytest.raises(ParityError, match=r"differs from onnxruntime by 0\.\d+ of its scale \(at most 0.0001\)"):
        check_parity(module, inputs, expected, 1e-4, strict=strict)


def test_the_rounding_of_long_sums_passes_where_a_wrong_corner_does_not() -> None:
    """What float32 makes of statistics over many numbers is no fault of a conversion; a wrong corner is one."""
    module, inputs, expected = gated()
    rounded = expected * (1 + 5e-4)
    with pytest.raises(ParityError):
        check_parity(module, inputs, rounded, 1e-4)
    assert check_parity(module, inputs, rounded, 1e-4, strict=False) == pytest.approx(5e-4, rel=0.1)
    for wrong in (expected * 1.002, expected + 0.02 * (expected == expected.max())):
        with pytest.raises(ParityError):
            check_parity(module, inputs, wrong.astype(np.float32), 1e-4, strict=False)
    with pytest.raises(ParityError):
        check_parity(module, inputs, rounded, 1e-6, strict=False)


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
