"""The partition: the neighbourhoods one would draw by hand, each of them a drop-in piece of the teacher."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from ndonnx.errors import UsageError
from ndonnx.graph import fold_constants, serialise
from ndonnx.graph.dataflow import Kind
from ndonnx.partition import Partition, partition
from ndonnx.partition.slices import is_opaque
from tests.helpers.models import (
    BLOCKS,
    BUILDERS,
    CUSTOM,
    Net,
    bottleneck,
    boundary,
    custom_op,
    floats,
    inputs_of,
    inverted_bottleneck,
    loaded,
    parted,
    residual_cnn,
    run,
    several_heads,
    stack,
    unet,
    vgg,
    with_if,
)

blocks = st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=5)


def ends(parts: Partition) -> list[tuple[str | None, str | None]]:
    """Entry and exit of each distillable neighbourhood."""
    return [(n.entry.name, n.exit.name) for n in parts.distillable if n.entry and n.exit]


def ops(parts: Partition, exit_: str) -> list[str]:
    (found,) = [n for n in parts.neighbourhoods if n.exit is not None and n.exit.name == exit_]
    return [node.op_type for node in found.nodes]


# What one would draw by hand


@pytest.mark.parametrize("norm", [False, True])
def test_a_residual_network_is_cut_into_its_units(norm: bool) -> None:
    _, parts = parted(residual_cnn(4, norm=norm))
    assert ends(parts) == [(f"unit{i}", f"unit{i + 1}") for i in range(4)]
    assert [n.widths for n in parts.distillable] == [[8]] * 4
    assert ops(parts, "unit2")[-2:] == ["Add", "Relu"]
    stem, *_, classifier = parts.neighbourhoods
    assert not stem.distillable and not classifier.distillable
    assert [node.op_type for node in classifier.nodes] == ["GlobalAveragePool", "Flatten", "Gemm"]
    for kept in (stem, classifier):
        assert kept.reason == "no width to shrink inside: its channels reach its ends"
    parameters, macs = parts.coverage()
    unit = 2 * (8 * 8 * 9) + (2 * 4 * 8 if norm else 2 * 8)
    rest = 8 * 3 * 9 + 8 + 5 * 8 + 5
    assert parameters == pytest.approx(4 * unit / (4 * unit + rest))
    assert macs == pytest.approx(4 * 2 * 576 * 64 / (4 * 2 * 576 * 64 + 216 * 64 + 40))


def test_an_inverted_bottleneck_is_taken_whole() -> None:
    _, parts = parted(inverted_bottleneck(4))
    assert ends(parts) == [(f"unit{i}", f"unit{i + 1}") for i in range(4)]
    assert [n.widths for n in parts.distillable] == [[12, 4]] * 4
    assert ops(parts, "unit1").count("Conv") == 5


def test_an_inverted_bottleneck_without_a_residual_sum_is_taken_whole() -> None:
    net = Net()
    x = net.relu(net.conv(net.input("x", "N", 3, 6, 6), 3, 6, out="stem"), out="entry")
    y = net.relu(net.conv(net.relu(net.conv(x, 6, 12, 1)), 12, 12, group=12))
    y = net.conv(y, 12, 8, 1, out="exit")
    _, parts = parted(net.proto(net.pooled_classifier(net.op("GlobalMaxPool", y), 8)))
    assert [exit_ for _, exit_ in ends(parts)] == ["exit"]
    assert [op for op in ops(parts, "exit") if op == "Conv"] == ["Conv"] * 4


def test_a_bottleneck_is_taken_with_all_three_convolutions() -> None:
    _, parts = parted(bottleneck(8))
    assert ends(parts) == [(f"unit{i}", f"unit{i + 1}") for i in range(8)]
    assert [n.widths for n in parts.distillable] == [[6, 6]] * 8
    assert ops(parts, "unit1").count("Conv") == 3


def test_a_plain_chain_is_taken_in_pairs() -> None:
    _, parts = parted(vgg())
    assert ends(parts) == [("x", "relu2"), ("pool", "relu4"), ("flat", "logits")]
    assert [n.widths for n in parts.distillable] == [[6], [10], [20]]
    assert parts.coverage() == (1, 1)


def test_an_odd_chain_leaves_nothing_out() -> None:
    _, parts = parted(vgg((6, 8, 10, 12, 14)))
    assert parts.coverage() == (1, 1)
    assert len(parts.distillable) == 3


def test_a_unet_is_opened() -> None:
    _, parts = parted(unet())
    assert len(parts.distillable) == 5
    assert {width for n in parts.distillable for width in n.widths} == {6, 8, 12}
    assert max(n.parameters for n in parts.distillable) < 0.5 * sum(n.parameters for n in parts.neighbourhoods)
    assert parts.coverage()[0] == 1


def test_two_heads_are_two_neighbourhoods() -> None:
    _, parts = parted(several_heads())
    assert ends(parts)[-3:] == [("feature1", "feature2"), ("feature2", "boxes"), ("feature2", "classes")]


@pytest.mark.parametrize("name", ["tied", "local_function", "old_style"])
def test_units_are_found_however_the_model_is_written(name: str) -> None:
    _, parts = parted(BUILDERS[name]())
    (_, first), second = ends(parts)  # where weights are tied, the stem is a large part and joins
    assert (first, *second) == ("unit1", "unit1", "unit2")


def test_a_mask_for_every_layer_becomes_context() -> None:
    net = Net()
    x, mask = net.relu(net.conv(net.input("x", "N", 3, 6, 6), 3, 8), out="unit0"), net.input("mask", "N", 1, 6, 6)
    for i in (1, 2):
        y = net.conv(net.op("Mul", net.relu(net.conv(x, 8, 8)), mask), 8, 8)
        x = net.op("Add", y, x, out=f"unit{i}")
    _, parts = parted(net.proto(net.pooled_classifier(x, 8)))
    assert parts.flow.stream_inputs == ("x",)
    assert ends(parts) == [("unit0", "unit1"), ("unit1", "unit2")]
    assert [[value.name for value in n.context] for n in parts.distillable] == [["mask"], ["mask"]]


def test_of_two_towers_and_the_mask_of_one_only_the_mask_becomes_context() -> None:
    net = Net(6)
    mask, ends = net.input("mask", "N", 1, 6, 6), []
    for tower in ("left", "right"):
        x = net.relu(net.conv(net.input(tower, "N", 3, 6, 6), 3, 8))
        for _ in range(2):
            y = net.relu(net.conv(x, 8, 8))
            y = net.conv(net.op("Mul", y, mask) if tower == "right" else y, 8, 8)
            x = net.relu(net.op("Add", y, x))
        ends.append(x)
    _, parts = parted(net.proto(net.op("Add", *ends)))
    assert sorted([value.name for value in n.context] for n in parts.distillable) == [[], [], ["mask"], ["mask"]]


def test_two_towers_are_both_streams() -> None:
    net = Net()
    left, right = (
        net.relu(net.gemm(net.relu(net.gemm(net.input(name, "N", 6), 6, 10)), 10, 8), out=f"{name} tower")
        for name in ("a", "b")
    )
    joined = net.op("Concat", left, right, axis=1)
    _, parts = parted(net.proto(net.gemm(net.relu(net.gemm(joined, 16, 12)), 12, 2, out="y")))
    assert set(parts.flow.stream_inputs) == {"a", "b"}
    assert {("a", "a tower"), ("b", "b tower")} < set(ends(parts))
    assert parts.coverage()[0] == 1


# What is left over, and how large pieces get


def _unit(net: Net, x: str, channels: int, inner: int, out: str) -> str:
    return net.op("Add", net.conv(net.relu(net.conv(x, channels, inner)), inner, channels), x, out=out)


def separated(between: Callable[[Net, str], str], *, wide_stem: bool = False) -> onnx.ModelProto:
    """Two residual units of eight channels with something between them that has no width of its own."""
    net = Net(21)
    stem = net.conv(net.input("x", "N", 3, 6, 6), 3, 8, 9 if wide_stem else 1, out="stem")
    x = between(net, _unit(net, stem, 8, 8, "unit1"))
    x = _unit(net, x, 8, 8, "unit2")
    return net.proto(net.pooled_classifier(x, 8))


def depthwise(net: Net, x: str) -> str:
    return net.conv(x, 8, 8, group=8, out="between")


def test_a_convolution_between_two_neighbourhoods_joins_the_second() -> None:
    _, parts = parted(separated(depthwise))
    assert ends(parts) == [("stem", "unit1"), ("unit1", "unit2")]
    assert ops(parts, "unit2") == ["Conv", "Conv", "Relu", "Conv", "Add"]
    check_neighbourhoods(parts)


def test_an_activation_between_two_neighbourhoods_stays_with_the_first() -> None:
    _, parts = parted(separated(lambda net, x: depthwise(net, net.op("Tanh", x, out="activated"))))
    assert ends(parts) == [("stem", "activated"), ("activated", "unit2")]


def test_what_no_rule_knows_joins_nothing() -> None:
    _, parts = parted(separated(lambda net, x: net.op("Trilu", depthwise(net, x), out="normed")))
    assert ends(parts) == [("stem", "unit1"), ("normed", "unit2")]


@pytest.mark.parametrize("option", [{"cut": ["between"]}, {"freeze": ["between"]}])
def test_what_the_user_keeps_apart_joins_nothing(option: dict[str, list[str]]) -> None:
    _, parts = parted(separated(depthwise), **option)
    assert ends(parts) == [("stem", "unit1"), ("between", "unit2")]


def test_a_stem_joins_only_where_it_holds_much_of_the_model() -> None:
    _, parts = parted(separated(depthwise))
    assert not parts.neighbourhoods[0].distillable
    _, parts = parted(separated(depthwise, wide_stem=True))
    assert ends(parts)[0] == ("x", "unit1")


def test_an_atom_is_entered_where_what_is_left_over_inside_joins() -> None:
    """A long skip over three stages, each of which begins with a convolution that has no width of its own."""
    net = Net(22)
    x = start = net.conv(net.input("x", "N", 3, 6, 6), 3, 8, 1, out="stem")
    for i in (1, 2, 3):
        x = _unit(net, net.conv(x, 8, 8, 7, group=8, out=f"stage{i}"), 8, 8, f"unit{i}")
    x = net.conv(net.op("Concat", start, x, axis=1), 16, 4, 1, out="joined")
    _, parts = parted(net.proto(net.pooled_classifier(x, 4)))
    assert ends(parts)[:3] == [("stem", "unit1"), ("unit1", "unit2"), ("unit2", "unit3")]
    check_neighbourhoods(parts)


def test_layers_that_all_read_the_input_again_are_each_found() -> None:
    """Every layer nests in the next: were each looked at with all that it holds, this would not end."""
    net = Net(23)
    x = start = net.input("x", "N", 4, 4, 4)
    for i in range(150):
        x = net.op("Add", net.conv(net.relu(net.conv(x, 4, 4, 1)), 4, 4, 1, out=f"layer{i}"), start)
    _, parts = parted(net.proto(x))
    assert [exit_ for _, exit_ in ends(parts)] == ["add_6", *(f"layer{i}" for i in range(1, 150))]


def test_a_long_stretch_without_a_width_is_one_kept_piece() -> None:
    net = Net(24)
    x = net.input("x", "N", 4, 4, 4)
    for _ in range(600):
        x = net.conv(x, 4, 4, 1, group=4)
    x = net.conv(net.relu(net.conv(x, 4, 4, 1, out="narrow")), 4, 4, 1, out="end")
    _, parts = parted(net.proto(x))
    assert [exit_ for _, exit_ in ends(parts)] == ["end"]
    assert len(parts.neighbourhoods) <= 2


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


# What the user asks for


def test_cut_makes_a_boundary() -> None:
    _, parts = parted(vgg(), cut=["relu1"])
    assert ends(parts)[0] == ("relu1", "relu4")
    _, parts = parted(residual_cnn(), cut=["sum2"])
    assert ends(parts) == [("unit0", "unit1"), ("unit1", "sum2"), ("unit2", "unit3")]
    _, parts = parted(residual_cnn(), cut=["first2"])
    assert ends(parts) == [("unit0", "unit1"), ("unit2", "unit3")]


@settings(max_examples=40)
@given(st.data(), blocks)
def test_no_neighbourhood_reaches_over_a_cut(data: st.DataObject, names: list[str]) -> None:
    model = stack(names)
    made = [output for node in model.graph.node for output in node.output]
    cut = data.draw(st.lists(st.sampled_from(made), max_size=2, unique=True))
    folded = fold_constants(loaded(model))
    known = {value.name for node in folded.graph for value in node.outputs}
    cuts = {name for name in cut if name in known}
    parts = partition(folded, cut=sorted(cuts))
    for n in parts.distillable:
        assert n.exit is not None
        inner = {value.name for node in n.nodes for value in node.outputs if parts.flow.is_stream(value)} - {
            n.exit.name
        }
        assert not inner & cuts


def test_freeze_keeps_a_neighbourhood() -> None:
    _, parts = parted(residual_cnn(), freeze=["first2", "second2", "stem"])
    assert ends(parts) == [("unit0", "unit1"), ("unit2", "unit3")]
    frozen = next(n for n in parts.neighbourhoods if n.exit is not None and n.exit.name == "unit2")
    assert frozen.reason == "frozen: it makes 'first2'"


@pytest.mark.parametrize("option", ["cut", "freeze"])
def test_unknown_values_are_refused_by_name(option: str) -> None:
    with pytest.raises(UsageError, match="'nowhere'"):
        parted(residual_cnn(), **{option: ["unit1", "nowhere"]})


def test_unknown_granularity_is_refused() -> None:
    with pytest.raises(UsageError, match="granularity 'huge'"):
        parted(residual_cnn(), granularity="huge")


# What holds for every model


def check_neighbourhoods(parts: Partition) -> None:
    """Disjoint, one stream input, one output, nothing opaque, every node accounted for."""
    flow = parts.flow
    seen: dict[object, str] = {}
    for n in parts.neighbourhoods:
        for node in n.nodes:
            if flow.kinds[node.outputs[0]] in (Kind.STREAM, Kind.CONTEXT):
                assert node not in seen, (n.name, seen[node])
                seen[node] = n.name
    work = [node for node in flow.graph if flow.kinds[node.outputs[0]] in (Kind.STREAM, Kind.CONTEXT)]
    assert set(seen) == set(work)
    for n in parts.distillable:
        own = set(n.nodes)
        assert n.groups is not None and n.groups.groups and n.reason is None
        assert n.entry is not None and n.exit is not None and n.exit.producer() in own
        assert not any(is_opaque(node) for node in own)
        for node in own:
            for value in node.inputs:
                if value is not None and value.producer() not in own and flow.kinds[value] is not Kind.CONSTANT:
                    assert value is n.entry or value in n.context
            for value in node.outputs:
                if value is not n.exit and flow.is_stream(value):
                    assert not value.is_graph_output()
                    assert all(user in own for user in value.consumers())
    numbers = [n.name for n in parts.neighbourhoods]
    assert numbers == sorted(set(numbers))
    firsts = [flow.order[n.nodes[0]] for n in parts.neighbourhoods]
    assert firsts == sorted(firsts)


def check_slices(model: onnx.ModelProto, parts: Partition) -> None:
    """Each slice answers the teacher's own activations with the teacher's own exit, bit for bit."""
    names = [name for n in parts.distillable for name in boundary(n)]
    feed = inputs_of(model)
    inner = [name for name in dict.fromkeys(names) if name not in feed]
    values = feed | run(parts.model, feed, inner)
    for n in parts.distillable:
        piece = parts.slice_of(n)
        *inputs, exit_ = boundary(n)
        assert [value.name for value in piece.graph.inputs] == inputs
        answer = run(onnx.load_from_string(serialise(piece)), {name: values[name] for name in inputs})
        assert list(answer) == [exit_]
        np.testing.assert_array_equal(answer[exit_], values[exit_])


@pytest.mark.parametrize("name", [*BUILDERS, "custom_op"])
def test_neighbourhoods_are_disjoint_pieces_with_one_way_in_and_out(name: str) -> None:
    model = custom_op() if name == "custom_op" else BUILDERS[name]()
    _, parts = parted(model)
    assert parts.distillable
    check_neighbourhoods(parts)
    if name != "custom_op":
        check_slices(model, parts)


@settings(max_examples=60)
@given(blocks)
def test_pieces_of_random_networks_are_drop_ins(names: list[str]) -> None:
    model = stack(names)
    _, parts = parted(model)
    check_neighbourhoods(parts)
    check_slices(model, parts)


def test_a_kept_piece_without_one_entry_and_exit_is_no_slice() -> None:
    _, parts = parted(BUILDERS["transformer"]())
    pieces = [n for n in parts.neighbourhoods if n.entry is None]
    for piece in pieces:
        with pytest.raises(ValueError, match="no single entry"):
            parts.slice_of(piece)


_DESCRIBE = """
import hashlib, sys
sys.path.insert(0, {root!r})
from tests.helpers.models import BUILDERS, parted
from ndonnx.graph import serialise
for name, build in BUILDERS.items():
    _, parts = parted(build(), freeze=["unit1", "first1", "second1"] if name == "residual_cnn" else [])
    for n in parts.neighbourhoods:
        print(name, n.name, n.reason, n.widths, [node.name for node in n.nodes], [v.name for v in n.context])
    print([hashlib.sha256(serialise(parts.slice_of(n))).hexdigest() for n in parts.distillable])
"""


@pytest.mark.slow
def test_the_same_model_is_always_partitioned_alike() -> None:
    """Also in another process, where sets of objects are ordered otherwise."""
    script = _DESCRIBE.format(root=str(Path(__file__).parents[2]))
    answers = {
        subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(answers) == 1
