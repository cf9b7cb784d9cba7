"""Simplification: the same answers in fewer nodes, whatever surrounds a chain; what others read or ask for stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from ndonnx.graph.passes.simplification.simplify import change_key, nodes_in, simplify
from tests.helpers.models import Net, inputs_of, loaded, residual_cnn, retyped, run, transformer, with_if

CHANNELS = 4
OPERATORS = ("Mul", "Add", "Sub", "Div", "Sub from", "Mul from")
SHAPES = ((), (1,), (CHANNELS, 1, 1), (1, CHANNELS, 1, 1), (1, 1, 1, 1))


# The whole


def _same(model: onnx.ModelProto, keep: Sequence[str] = (), *, tolerance: float = 1e-5) -> ir.Model:
    """The simplified model, after all its values were held against those of the same name."""
    before = loaded(model)
    after = simplify(before, keep)
    assert nodes_in(after) <= nodes_in(before)
    feed = inputs_of(model)
    names = {v.name for node in after.graph for v in node.outputs if v.name and node.op_type != "Constant"}
    known = {v.name for node in before.graph for v in node.outputs}
    common = sorted({str(name) for name in names & known} | {str(value.name) for value in before.graph.outputs})
    theirs, ours = run(before, feed, common), run(after, feed, common)
    for name in common:
        assert ours[name].shape == theirs[name].shape, name
        np.testing.assert_allclose(
            ours[name], theirs[name], rtol=0, atol=tolerance * max(1e-6, float(np.abs(theirs[name]).max()))
        )
    onnx.checker.check_model(ir.to_proto(after))
    return after


def _held_by_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with `Constant` nodes for initializers, as some exporters write it."""
    for tensor in reversed(model.graph.initializer):
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    del model.graph.initializer[:]
    return model


def _kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def _affine(net: Net, x: str, op: str, shape: tuple[int, ...], dtype: type = np.float32) -> str:
    sign = net.rng.choice([-1.0, 1.0], shape)
    held = net.constant(f"c{len(net.weights)}", np.asarray(sign * net.rng.uniform(0.5, 1.5, shape), dtype))
    name, _, reversed_ = op.partition(" ")
    return net.op(name, held, x) if reversed_ else net.op(name, x, held)


def _hard_swish(net: Net, x: str) -> str:
    three, six = (net.constant(f"c{len(net.weights)}", np.array(number, np.float32)) for number in (3, 6))
    low = net.constant(f"c{len(net.weights)}", np.array(0, np.float32))
    return net.op("Div", net.op("Mul", x, net.op("Clip", net.op("Add", x, three), low, six)), six)


def _squeeze(net: Net, x: str) -> str:
    pooled = net.op("GlobalAveragePool", x)
    return net.op("Mul", x, net.op("Sigmoid", net.conv(pooled, CHANNELS, CHANNELS, 1)))


def _transposed(net: Net, x: str) -> str:
    weight = net.weight(f"w{len(net.weights)}", CHANNELS, CHANNELS // 2, 2, 2)
    return net.op("ConvTranspose", x, weight, group=2, strides=[1, 1], pads=[0, 0, 1, 1])


def _shared(net: Net, x: str) -> str:
    weight = net.weights.get("shared")
    if weight is None:
        net.weight("shared", CHANNELS, CHANNELS, 3, 3)
    return net.op("Conv", x, "shared", pads=[1] * 4)


STEPS: dict[str, Callable[[Net, str], str]] = {
    "conv": lambda net, x: net.conv(x, CHANNELS, CHANNELS, 3),
    "pointwise": lambda net, x: net.conv(x, CHANNELS, CHANNELS, 1, bias=False),
    "grouped": lambda net, x: net.conv(x, CHANNELS, CHANNELS, 3, group=2),
    "transposed": _transposed,
    "shared": _shared,
    "norm": lambda net, x: net.norm(x, CHANNELS),
    "relu": lambda net, x: net.relu(x),
    "sigmoid": lambda net, x: net.op("Sigmoid", x),
    "identity": lambda net, x: net.op("Identity", x),
    "pool": lambda net, x: net.op("MaxPool", x, kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1]),
    "average": lambda net, x: net.op("AveragePool", x, kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1]),
    "twice": lambda net, x: net.op("Add", x, net.relu(x)),
    "square": lambda net, x: net.op("Mul", x, net.op("Tanh", x)),
    "swish": _hard_swish,
    "squeeze": _squeeze,
}
AFFINE = [(op, shape) for op in OPERATORS for shape in SHAPES]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_random_graphs_answer_the_same_under_every_name_that_is_left(data: st.DataObject) -> None:
    net = Net(data.draw(st.integers(0, 2**16)))
    x = net.input("x", "batch", CHANNELS, 6, 6)
    asked: list[str] = []
    drawn = st.one_of(st.sampled_from(sorted(STEPS)), st.sampled_from(AFFINE), st.sampled_from(AFFINE))
    for step in data.draw(st.lists(drawn, min_size=2, max_size=10)):
        x = STEPS[step](net, x) if isinstance(step, str) else _affine(net, x, *step)
        if data.draw(st.integers(0, 5)) == 0:
            asked.append(x)
    asked += [x] if x not in asked else []
    for _ in range(data.draw(st.integers(0, 2))):  # what nobody reads, and constants that it alone reads
        net.op("Reshape", net.op("Mul", x, _affine(net, x, "Add", ())), net.constant("dead", np.array([-1, CHANNELS])))
    model = net.proto(*asked, opset=data.draw(st.sampled_from([11, 13, 18])))
    model = _held_by_nodes(model) if data.draw(st.booleans()) else model
    after = _same(model, tolerance=1e-4)
    assert [value.name for value in after.graph.outputs] == asked
    assert [value.name for value in after.graph.inputs] == ["x"]
    assert simplify(after) is after or nodes_in(simplify(after)) == nodes_in(after)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**16), st.lists(st.sampled_from(OPERATORS), max_size=4), st.booleans(), st.booleans())
def test_random_rows_of_features_answer_the_same(seed: int, chain: list[str], gemm: bool, between: bool) -> None:
    net = Net(seed)
    x = net.input("x", "batch", 5, 6) if not gemm else net.input("x", "batch", 6)
    rank = int(net.rng.integers(0, 2))
    for op in chain:
        x = _affine(net, x, op, (6,) if rank else ())
    x = net.gemm(x, 6, 7, bias=between) if gemm else net.matmul(x, 6, 7)
    for op in chain:
        x = _affine(net, x, op, (7,) if rank else ())
    x = net.relu(x) if between else x
    x = net.op("Add", net.matmul(x, 7, 3), net.weight("bias", 3))
    _same(net.proto(x, opset=13))


# What folds


def test_a_norm_and_a_chain_go_into_the_convolution_before_them() -> None:
    net = Net()
    x = net.norm(net.conv(net.input("x", "batch", 3, 8, 8), 3, 4, bias=False), 4)
    for op, shape in (("Mul", (4, 1, 1)), ("Add", (1,)), ("Div", ())):
        x = _affine(net, x, op, shape)
    assert _kinds(_same(net.proto(x))) == ["Conv"]


def test_hand_computed_numbers() -> None:
    net = Net()
    x = net.input("x", "batch", 1, 1, 1)
    y = net.op("Conv", x, net.constant("w", np.full((1, 1, 1, 1), 3, np.float32)), net.constant("b", np.ones(1, "f")))
    y = net.op("Mul", y, net.constant("two", np.array(2, np.float32)))
    y = net.op("Add", y, net.constant("five", np.array(5, np.float32)), out="y")
    after = simplify(loaded(net.proto(y)))
    found = {name: value.const_value.numpy().reshape(-1).tolist() for name, value in after.graph.initializers.items()}  # type: ignore[union-attr]
    assert found == {"w": [6.0], "b": [7.0]}


def test_a_gain_behind_an_activation_goes_into_the_convolutions_that_read_it() -> None:
    net = Net()
    x = _affine(net, net.op("Sigmoid", net.input("x", "batch", 4, 8, 8)), "Mul", (1,))
    after = _same(net.proto(net.op("Concat", net.conv(x, 4, 2), net.conv(x, 4, 3, 1), axis=1)))
    assert _kinds(after).count("Mul") == 0


def test_a_shift_stays_in_front_of_zero_padding_and_goes_where_there_is_none() -> None:
    for kernel, left in ((3, 1), (1, 0)):
        net = Net()
        x = net.op("Sigmoid", net.input("x", "batch", 4, 8, 8))
        x = _affine(net, _affine(net, x, "Mul", ()), "Add", ())
        after = _same(net.proto(net.conv(x, 4, 2, kernel)))
        assert _kinds(after).count("Add") == left
        assert "Mul" not in _kinds(after)


@pytest.mark.parametrize(("opset", "kinds"), [(13, ["HardSigmoid", "Mul"]), (14, ["HardSwish"])])
def test_a_hard_swish_that_is_spelled_out_is_written_as_the_opset_has_it(opset: int, kinds: list[str]) -> None:
    net = Net()
    after = _same(net.proto(_hard_swish(net, net.input("x", "batch", 4)), opset=opset))
    assert _kinds(after) == kinds
    assert after.opset_imports[""] == opset


def test_numbers_behind_a_hard_swish_go_on_into_the_next_convolution() -> None:
    net = Net()
    x = net.conv(net.input("x", "batch", 4, 8, 8), 4, 4)
    x = _affine(net, _affine(net, x, "Mul", (1,)), "Add", (1,))
    x = _affine(net, _affine(net, _hard_swish(net, x), "Mul", (1,)), "Add", (1,))
    assert sorted(_kinds(_same(net.proto(net.conv(x, 4, 4), opset=12)))) == [
        "Add",
        "Conv",
        "Conv",
        "HardSigmoid",
        "Mul",
    ]


# What stays


def test_a_weight_that_others_read_is_not_folded_into() -> None:
    net = Net()
    x = net.input("x", "batch", CHANNELS, 8, 8)
    out = net.op("Add", _affine(net, _shared(net, x), "Mul", (CHANNELS, 1, 1)), _shared(net, x))
    after = _same(net.proto(out))
    np.testing.assert_array_equal(after.graph.initializers["shared"].const_value.numpy(), net.weights["shared"])  # type: ignore[union-attr]
    assert _kinds(after).count("Mul") == 1


def test_values_that_are_asked_for_stay() -> None:
    net = Net()
    conv = net.conv(net.input("x", "batch", 3, 8, 8), 3, 4)
    middle = _affine(net, conv, "Mul", ())
    last = _affine(net, middle, "Add", ())
    assert _kinds(_same(net.proto(middle, last))) == ["Conv", "Add"]
    assert _kinds(_same(net.proto(last), keep=[conv])) == ["Conv", "Mul", "Add"]


def test_numbers_along_another_axis_than_the_channels_are_not_taken_for_channels() -> None:
    for shape in ((4,), (4, 1), (1, 1, 4, 1), (1, 1, 4, 1, 1)):
        net = Net()
        x = net.conv(net.input("x", "batch", 4, 4, 4), 4, 4)
        _same(net.proto(_affine(net, x, "Mul", shape)))


def test_numbers_that_widen_what_they_meet_still_do() -> None:
    net = Net()
    x = net.relu(net.input("x", "batch", 1, 6))
    wide = _affine(net, _affine(net, x, "Mul", (3, 1)), "Add", (1,))
    ones = net.op("Mul", wide, net.constant("ones", np.ones((1, 1, 1, 1), np.float32)))
    _same(net.proto(ones))


def test_norms_and_gates_that_runtimes_fuse_are_left_whole() -> None:
    net = Net()
    numbers = {"half": 0.5, "one": 1, "two": 2, "root": np.sqrt(2), "tiny": 1e-5}
    for name, number in numbers.items():
        net.constant(name, np.array(number, np.float32))
    x = net.input("x", "batch", 3, 8)
    centred = net.op("Sub", x, net.op("ReduceMean", x, axes=[-1]))
    spread = net.op("Sqrt", net.op("Add", net.op("ReduceMean", net.op("Pow", centred, "two"), axes=[-1]), "tiny"))
    x = _affine(net, _affine(net, net.op("Div", centred, spread), "Mul", (8,)), "Add", (8,))
    x = net.op("Add", net.matmul(x, 8, 8), net.weight("bias", 8))
    x = net.op("Mul", x, net.op("Add", net.op("Erf", net.op("Div", x, "root")), "one"))
    model = net.proto(net.matmul(net.op("Mul", x, "half"), 8, 8), opset=13)
    assert _kinds(_same(model)) == [node.op_type for node in model.graph.node]
    _same(transformer())


def test_other_types_control_flow_and_callers_numbers_are_left_alone() -> None:
    half = retyped(residual_cnn(norm=True), np.float16)
    assert "BatchNormalization" in _kinds(simplify(loaded(half)))
    _same(with_if())
    net = Net()
    x = _affine(net, net.conv(net.input("x", "batch", 3, 8, 8), 3, 4), "Mul", ())
    model = net.proto(x)
    model.graph.input.extend(
        helper.make_tensor_value_info(w.name, w.data_type, w.dims) for w in model.graph.initializer
    )
    assert simplify(loaded(model)).graph.num_nodes() == 2


def test_the_interface_and_the_metadata_survive_and_the_model_is_not_changed() -> None:
    model = residual_cnn(norm=True)
    helper.set_model_props(model, {"author": "somebody"})
    before = loaded(model)
    was = ir.to_proto(before).SerializeToString(deterministic=True)
    after = simplify(before)
    assert ir.to_proto(before).SerializeToString(deterministic=True) == was
    assert ir.to_proto(after).graph.input == ir.to_proto(before).graph.input
    assert ir.to_proto(after).graph.output == ir.to_proto(before).graph.output
    assert dict(after.metadata_props) == {"author": "somebody"}
    assert "BatchNormalization" not in _kinds(after)


def test_old_formats_keep_their_initializers_among_the_inputs() -> None:
    model = residual_cnn(norm=True, opset=8, ir_version=3)
    after = _same(model)
    assert {value.name for value in after.graph.initializers.values()} <= {value.name for value in after.graph.inputs}


def test_doubles_are_folded_as_doubles() -> None:
    net = Net()
    x = net.input("x", "batch", 4, 4, dtype=onnx.TensorProto.DOUBLE)
    net.constant("w", net.rng.standard_normal((4, 4)))
    x = _affine(net, net.op("MatMul", x, "w"), "Mul", (), np.float64)
    before = loaded(net.proto(x))
    after = simplify(before)
    feed = {"x": net.rng.standard_normal((2, 4, 4))}
    assert _kinds(after) == ["MatMul"]
    np.testing.assert_allclose(run(after, feed)[x], run(before, feed)[x], rtol=1e-12)


def test_no_rules_no_change() -> None:
    model = loaded(residual_cnn(norm=True))
    assert simplify(model, rules=()) is model
    assert change_key(model, model) == ""
    assert change_key(model, simplify(model)) == change_key(model, simplify(model)) != ""


def test_a_vector_that_several_places_share_stays_one_weight() -> None:
    net = Net()
    x = net.input("x", "batch", 4, 8, 8)
    gain = net.constant("gain", net.rng.uniform(0.5, 1.5, (4, 1, 1)).astype(np.float32))
    for _ in range(2):
        x = net.relu(net.op("Mul", net.conv(x, 4, 4), gain))
    assert _kinds(_same(net.proto(x))).count("Mul") == 2


def test_no_weight_is_added() -> None:
    net = Net()
    x = _affine(net, net.conv(net.input("x", "batch", 4, 8, 8), 4, 4, bias=False), "Add", ())
    assert _kinds(_same(net.proto(x))) == ["Conv", "Add"]
