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

from ndonnx.errors import UsageError
from ndonnx.graph import fold_constants, serialise
from ndonnx.partition import Partition, partition
from tests.helpers.models import (
    BLOCKS,
    BUILDERS,
    Net,
    bottleneck,
    boundary,
    custom_op,
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
)
from tests.helpers.partitions import check_neighbourhoods, ends

blocks = st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=5)


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
