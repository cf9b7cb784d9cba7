"""Shapes filled in are those that onnxruntime computes, and target shapes as constants change no answer."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from ndonnx.graph import fold_constants
from ndonnx.graph.shapes.sizes import Size, add, broadcast, divide, factors, product, quotient, remainder, subtract
from ndonnx.graph.shapes.symbolic import known_numbers
from ndonnx.graph.shapes.targets import shape_readers
from tests.helpers.models import BUILDERS, Array, Net, inputs_of, loaded, run

# Sizes

NAMES = {"a": 2, "b": 3, "c": 5}
sizes = st.integers(1, 12) | st.lists(st.sampled_from([*NAMES, "2", "7"]), min_size=1, max_size=3).map("*".join)


def number(size: Size) -> int:
    times, names = factors(size)
    for name, count in names.items():
        times *= NAMES[name] ** count
    return times


@given(st.lists(sizes, max_size=4), sizes)
def test_products_and_quotients_of_sizes(many: list[Size], one: Size) -> None:
    whole = product(many)
    assert whole is not None and number(whole) == np.prod([number(size) for size in many], dtype=int)
    assert quotient(product([whole, one]), one) == product([whole])


@given(sizes, sizes)
def test_what_is_said_of_two_sizes_holds(a: Size, b: Size) -> None:
    x, y = number(a), number(b)
    for said, true in ((add(a, b), x + y), (subtract(a, b), x - y), (divide(a, b), x // y), (remainder(a, b), x % y)):
        assert said is None or said == true or number(said) == true
    met = broadcast(a, b)
    if met is not None and (x == y or 1 in (x, y)):
        assert number(met) == max(x, y)


def test_a_sum_in_a_name_is_one_name() -> None:
    assert factors("a*b + 1") == (1, Counter(["a*b + 1"]))
    assert product(["a", "b + 1"]) is None
    assert quotient("a*b + 1", "a") is None


# Shapes


def idioms(opset: int = 17) -> onnx.ModelProto:
    """What exporters do with shapes, on an input both of whose leading sizes are dynamic."""
    net = Net()
    x = net.input("x", "N", "L", 12)
    axes = [net.constant(f"axis{axis}", np.array(axis)) for axis in (0, 1)]
    scalars = [net.op("Gather", net.op("Shape", x), axis) for axis in axes]
    n, length = (net.op("Unsqueeze", scalar, net.ints(0)) for scalar in scalars)
    heads = net.op("Reshape", x, net.op("Concat", n, length, net.ints(3), net.ints(4), axis=0), out="heads")
    turned = net.op("Transpose", heads, perm=[0, 2, 1, 3], out="turned")
    width = net.op("Slice", net.op("Shape", turned), net.ints(-1), net.ints(2**63 - 1), net.ints(0))
    joined = net.op("Mul", n, net.ints(3), out="joined")
    batch = net.op("Reshape", turned, net.op("Concat", joined, length, width, axis=0), out="batch")
    half = net.op("Div", width, net.ints(2))
    net.op("Slice", batch, net.ints(0), half, net.ints(2), out="front")
    target = net.op("Reshape", net.op("Concat", n, net.ints(-1), net.ints(-1), axis=0), net.ints(-1))
    ones = net.op(
        "ConstantOfShape", net.op("Shape", target), value=helper.make_tensor("v", TensorProto.INT64, [1], [1])
    )
    unset = net.op("Equal", target, net.op("Mul", ones, net.ints(-1)))
    net.op("Expand", net.weight("token", 1, 1, 12), net.op("Where", unset, ones, target), out="tokens")
    zero, one = net.constant("zero", np.array(0)), net.constant("one", np.array(1))
    net.op("Range", zero, scalars[1], one, out="positions")
    rows = net.op("Flatten", heads, axis=2, out="rows")
    inner = net.op("Concat", net.ints(3), width, axis=0)
    net.op("Reshape", rows, net.op("Concat", n, length, inner, axis=0), out="nested")
    pads = net.op("Concat", net.ints(0, 0, 0), net.op("Mod", half, net.ints(2)), net.ints(1, 2), axis=0)
    pairs = net.op("Reshape", pads, net.ints(-1, 3))
    net.op("Pad", x, net.op("Reshape", net.op("Transpose", pairs, perm=[0, 1]), net.ints(-1)), out="padded")
    last = net.op("Reshape", x, net.op("Concat", net.ints(-1), net.ints(12), axis=0), out="last")
    outputs = ["nested", "front", "tokens", "positions", "padded", last, batch]
    return net.proto(*outputs, opset=opset, types={name: onnx.ValueInfoProto(name=name) for name in outputs})


def shapes_of(model: ir.Model) -> dict[str, tuple[Size | None, ...]]:
    found = {}
    for node in model.graph:
        for value in node.outputs:
            assert value.shape is not None
            found[value.name or ""] = tuple(d if isinstance(d, int) else d.value for d in value.shape)
    return found


def test_idioms_of_exporters_are_followed() -> None:
    found = shapes_of(fold_constants(loaded(idioms())))
    assert found["heads"] == ("N", "L", 3, 4)
    assert found["turned"] == ("N", 3, "L", 4)
    assert found["batch"] == ("3*N", "L", 4)
    assert found["front"] == ("3*N", "L", 2)
    assert found["tokens"] == ("N", 1, 12)
    assert found["positions"] == ("L",)
    assert found["rows"] == ("L*N", 12)
    assert found["nested"] == ("N", "L", 3, 4)
    assert found["padded"] == ("N", found["padded"][1], 14)
    assert found["last"] == ("L*N", 12)


@pytest.mark.parametrize("model", [idioms(), *(build() for build in BUILDERS.values())], ids=["idioms", *BUILDERS])
def test_every_size_is_the_one_onnxruntime_computes(model: onnx.ModelProto) -> None:
    working = fold_constants(loaded(model))
    plain = {value.name: value for node in working.graph for value in node.outputs if value.dtype is not None}
    feed = feeds(model)
    values = run(working, feed, list(plain))
    meant: dict[str, int] = {}
    for value in working.graph.inputs:
        for size, length in zip(value.shape or (), feed[value.name or ""].shape, strict=True):
            meant |= {} if isinstance(size, int) or size.value is None else {size.value: length}
    for name, value in plain.items():
        assert value.shape is not None and len(value.shape) == values[name].ndim
        for size, length in zip(value.shape, values[name].shape, strict=True):
            if isinstance(size, int):
                assert size == length
                continue
            times, names = factors(size.value or "")
            if (times, len(names)) == (1, 1):
                assert meant.setdefault(*names, length) == length
            else:
                assert times * np.prod([meant[n] ** count for n, count in names.items()], dtype=int) == length


def feeds(model: onnx.ModelProto) -> dict[str, Array]:
    if model.graph.input[0].type.tensor_type.shape.dim[1].dim_param == "L":
        return {"x": np.random.default_rng(0).standard_normal((2, 5, 12)).astype(np.float32)}
    return inputs_of(model)


def test_open_outputs_stay_open() -> None:
    net = Net()
    y = net.relu(net.op("Flatten", net.input("x", 4, 2, 3)))
    model = net.proto(y)
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "N"
    model.graph.output[0].type.tensor_type.shape.dim[1].Clear()
    opened = loaded(model)
    assert opened.graph.outputs[0].shape == ir.Shape(["N", None])
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert loaded(model).graph.outputs[0].shape is None
    assert fold_constants(loaded(model)).graph.outputs[0].shape == ir.Shape([4, 6])


def test_arithmetic_that_does_not_add_up_stays_open() -> None:
    net = Net()
    x = net.input("x", "N", 7)
    shape = net.op("Shape", x)
    net.op("Reshape", x, net.op("Concat", net.op("Slice", shape, net.ints(0), net.ints(1)), net.ints(2, 3), axis=0))
    net.op("Gather", shape, net.constant("beyond", np.array(9)), out="a")
    net.op("Reshape", shape, net.ints(3, 5), out="b")
    net.op("Div", net.op("Shape", x), net.ints(0), out="c")
    working = fold_constants(loaded(net.proto(net.op("Relu", x))))
    known = {
        value.name for value, numbers in known_numbers(working).items() if None not in numbers.reshape(-1).tolist()
    }
    assert not {"a", "b", "c"} & known
    assert working.graph.outputs[0].shape == ir.Shape(["N", 7])


# Target shapes


def test_targets_become_constants_and_change_nothing() -> None:
    model = idioms()
    working = fold_constants(loaded(model))
    targets = {
        node.outputs[0].name: tensor.numpy().tolist()
        for node in working.graph
        if node.op_type in ("Reshape", "Expand") and (tensor := node.inputs[1].const_value) is not None
    }
    assert targets["heads"] == [0, 0, 3, 4]
    assert targets["last"] == [-1, 12]
    # Two sizes that are dynamic and not at their place, or one that is widened, are in no constant.
    assert not {"batch", "nested", "tokens"} & set(targets)
    names = [value.name for value in working.graph.outputs]
    for name, array in run(working, feeds(model), names).items():
        np.testing.assert_array_equal(array, run(loaded(model), feeds(model), [name])[name])


def test_who_read_a_shape_is_remembered() -> None:
    net = Net()
    x = net.relu(net.input("x", "N", 12), out="a")
    length = net.op("Slice", net.op("Shape", x), net.ints(0), net.ints(1))
    y = net.op("Reshape", net.op("Neg", x), net.op("Concat", length, net.ints(3, 4), axis=0), out="y")
    working = fold_constants(loaded(net.proto(y)))
    assert [node.op_type for node in working.graph] == ["Relu", "Neg", "Reshape"]
    by_name = {value.name: value for node in working.graph for value in node.outputs}
    assert shape_readers(by_name["a"]) == {"y": {0}}
    assert not shape_readers(by_name["y"])
