"""Opaque nodes, and shapes and context from outside a slice."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from ndonnx.partition.slices import is_opaque
from tests.helpers.models import (
    BLOCKS,
    CUSTOM,
    Net,
    custom_op,
    floats,
    inputs_of,
    parted,
    run,
    stack,
    with_if,
)
from tests.helpers.partitions import check_neighbourhoods, ends

# Shapes and context from outside


def test_a_shape_from_before_is_context_and_pulls_no_nodes_in() -> None:
    _, parts = parted(stack(["plain", "residual", "early_shape"]))
    last = parts.distillable[-1]
    assert [value.name for value in last.context] == ["stem"]
    assert [node.op_type for node in last.nodes].count("Conv") == 2


def test_the_shape_of_the_input_is_read_off_the_input() -> None:
    _, parts = parted(stack(["residual", "input_shape", "input_shape"]))
    assert [[value.name for value in n.context] for n in parts.distillable] == [[], ["x"], ["x"]]


def test_metadata_may_be_recomputed_in_several_neighbourhoods() -> None:
    net = Net()
    x = net.relu(net.conv(net.input("x", "N", 3, 6, 6), 3, 8), out="unit0")
    length = net.op("Slice", net.op("Shape", net.input("m", "N", "S")), net.ints(1), net.ints(2))
    length = net.op("Cast", length, to=TensorProto.FLOAT)
    for i in (1, 2):
        y = net.op("Mul", net.conv(net.relu(net.conv(x, 8, 8)), 8, 8), length)
        x = net.op("Add", y, x, out=f"unit{i}")
    _, parts = parted(net.proto(net.pooled_classifier(x, 8)))
    first, second = parts.distillable
    shared = set(first.nodes) & set(second.nodes)
    assert {node.op_type for node in shared} == {"Shape", "Slice", "Cast"}


def test_a_region_whose_shape_is_read_outside_is_left_alone() -> None:
    net = Net()
    x = net.relu(net.conv(net.input("x", "N", 3, 6, 6), 3, 8), out="unit0")
    y = net.relu(net.conv(x, 8, 8), out="inside")
    x = net.op("Add", net.conv(y, 8, 8), x, out="unit1")
    channels = net.op("Cast", net.op("Slice", net.op("Shape", y), net.ints(1), net.ints(2)), to=TensorProto.FLOAT)
    x = net.op("Div", x, channels, out="divided")
    x = net.op("Add", net.conv(net.relu(net.conv(x, 8, 8)), 8, 8), x, out="unit2")
    _, parts = parted(net.proto(net.pooled_classifier(x, 8)))
    assert ("unit0", "unit1") not in ends(parts)
    check_neighbourhoods(parts)


# Opaque nodes


@pytest.mark.parametrize(("model", "op"), [(with_if(), "If"), (custom_op(), f"{CUSTOM}::Magic")])
def test_control_flow_and_custom_operators_lie_between_neighbourhoods(model: onnx.ModelProto, op: str) -> None:
    _, parts = parted(model)
    assert [exit_ for _, exit_ in ends(parts)] == ["unit1", "unit2"]
    assert f"holds {op}, which cannot be trained" in [n.reason for n in parts.neighbourhoods]


def _choice(net: Net, x: str) -> str:
    """An `If` on the contents of a value, with that value as it is or negated."""
    first = net.op("Gather", net.op("Flatten", net.op("ReduceMean", x)), net.constant("zero", np.array(0)), axis=1)
    condition = net.op("Squeeze", net.op("Greater", first, net.constant("nought", np.zeros(1, np.float32))))
    branches = {
        f"{name}_branch": helper.make_graph([helper.make_node(op, [x], [name])], name, [], [floats(name, "N", 8, 6, 6)])
        for name, op in (("then", "Identity"), ("else", "Neg"))
    }
    return net.op("If", condition, out="chosen", **branches)


def _repeated(net: Net, x: str) -> str:
    """A `Loop` that reads one value and carries it on."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["still"]), helper.make_node("Tanh", ["held"], ["next"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            floats("held", "N", 8, 6, 6),
        ],
        [helper.make_tensor_value_info("still", TensorProto.BOOL, []), floats("next", "N", 8, 6, 6)],
    )
    return net.op("Loop", net.constant("times", np.array(2)), "", x, out="looped", body=body)


@settings(max_examples=15)
@given(
    st.lists(st.sampled_from(["residual", "squeeze_excite", "two_readers"]), min_size=1, max_size=2),
    st.sampled_from([_choice, _repeated]),
    st.lists(st.sampled_from(["residual", "squeeze_excite", "two_readers"]), min_size=1, max_size=2),
)
def test_neighbourhoods_are_found_before_and_behind_control_flow(
    before: list[str], middle: Callable[[Net, str], str], behind: list[str]
) -> None:
    net = Net(25)
    x = net.relu(net.conv(net.input("x", "N", 3, 6, 6), 3, 8))
    for block in before:
        x, _ = BLOCKS[block](net, x, 8)
    x = middle(net, x)
    for block in behind:
        x, _ = BLOCKS[block](net, x, 8)
    _, parts = parted(net.proto(net.pooled_classifier(x, 8)))
    check_neighbourhoods(parts)
    (opaque,) = [node for node in parts.model.graph if is_opaque(node)]
    (kept,) = [n for n in parts.neighbourhoods if opaque in n.nodes]
    assert kept.reason == f"holds {opaque.op_type}, which cannot be trained"
    early = [n for n in parts.distillable if parts.flow.order[n.nodes[-1]] < parts.flow.order[opaque]]
    assert len(early) >= len(before)
    assert len(parts.distillable) - len(early) >= len(behind)


def test_a_model_that_is_all_control_flow_has_nothing_to_distil() -> None:
    net = Net(26)
    net.input("x", "N", 3, 6, 6)
    shape = floats("y", "N", 8, 6, 6)
    branches = {}
    for name in ("then", "else"):
        nodes = [helper.make_node("Conv", ["x", net.weight(f"{name}.weight", 8, 3, 1, 1)], [name])]
        branches[f"{name}_branch"] = helper.make_graph(nodes, name, [], [floats(name, "N", 8, 6, 6)])
    net.op("If", net.input("condition", dtype=TensorProto.BOOL), out="y", **branches)
    _, parts = parted(net.proto("y", types={"y": shape}))
    assert not parts.distillable
    assert [n.reason for n in parts.neighbourhoods] == ["holds If, which cannot be trained"]
    assert parts.coverage() == (0, 0)


def test_an_activation_of_another_domain_is_not_joined() -> None:
    net = Net()
    y = net.conv(net.relu(net.conv(net.input("x", "N", 3, 6, 6), 3, 8)), 8, 8, out="exit")
    net.op("Gelu", y, domain=CUSTOM, out="activated")
    net.conv("activated", 8, 3, out="y")
    model = net.proto("y", domains={CUSTOM: 1}, types={"y": floats("y", "N", 3, 6, 6)})
    _, parts = parted(model)
    assert ends(parts) == [("x", "exit")]


def test_control_flow_on_shapes_keeps_its_neighbourhood_out() -> None:
    net = Net()
    x = net.relu(net.conv(net.input("x", "N", 3, "H", 6), 3, 8), out="unit0")
    y = net.conv(net.relu(net.conv(x, 8, 8)), 8, 8, out="inner")
    height = net.op("Slice", net.op("Shape", x), net.ints(2), net.ints(3))
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("Cast", [height], [name], to=TensorProto.FLOAT)], name, [], [floats(name, 1)]
        )
        for name in ("then", "else")
    }
    net.op("If", net.op("Squeeze", net.op("Greater", height, net.ints(3))), out="factor", **branches)
    y = net.op("Add", net.op("Mul", y, "factor"), x, out="unit1")
    model = net.proto(net.pooled_classifier(y, 8))
    run(model, inputs_of(model))
    _, parts = parted(model)
    assert ends(parts) == [("unit0", "inner")]


def test_a_model_without_weights_has_nothing_to_distil() -> None:
    net = Net()
    x = net.op("Tanh", net.op("Add", net.input("a", "N", 4), net.input("b", "N", 4)), out="y")
    _, parts = parted(net.proto(x))
    assert not parts.distillable
    assert [n.reason for n in parts.neighbourhoods] == ["holds no weights"]
    assert parts.coverage() == (0, 0)
