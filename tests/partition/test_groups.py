"""Channel groups: removing units as they say is the same as ignoring those channels, and nothing else may go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from ndonnx.errors import ShrinkError
from ndonnx.graph import fold_constants, slice_cost
from ndonnx.graph.shapes.symbolic import resolve_shapes
from ndonnx.partition import ChannelGroups, Partition, find_groups
from ndonnx.partition.channels.labels import LabelSets
from ndonnx.partition.channels.rules import RULES
from ndonnx.students import TeacherSlice
from ndonnx.students.cutting import shrink
from ndonnx.students.zeroing import check_by_zeroing
from tests.helpers.channel_blocks import ALL_BLOCKS, CHANNEL_BLOCKS
from tests.helpers.models import (
    BUILDERS,
    CUSTOM,
    Net,
    bottleneck,
    boundary,
    floats,
    inputs_of,
    inverted_bottleneck,
    loaded,
    parted,
    run,
    stack,
)

Kept = npt.NDArray[np.bool_]


def teacher_slices(model: onnx.ModelProto, parts: Partition) -> list[TeacherSlice]:
    """Every distillable neighbourhood with the teacher's own activations as samples."""
    names = [name for n in parts.distillable for name in boundary(n)[:-1]]
    feed = inputs_of(model)
    values = feed | run(parts.model, feed, [name for name in dict.fromkeys(names) if name not in feed])
    found = []
    for n in parts.distillable:
        assert n.groups is not None
        samples = {name: values[name] for name in boundary(n)[:-1]}
        found.append(TeacherSlice(n.name, parts.slice_of(n), n.groups, samples, threads=1))
    return found


def some_units(groups: ChannelGroups, rng: np.random.Generator) -> Kept:
    """A random choice that leaves at least one unit in every group."""
    kept = rng.random(groups.units) < rng.uniform(0.1, 0.9)
    for group in groups.groups:
        kept[rng.integers(group.start, group.stop)] = True
    return kept


def check_shrinking(teacher: TeacherSlice, kept: Kept) -> None:
    shrunk = shrink(teacher.model, teacher.groups, kept)
    check_by_zeroing(teacher, shrunk, kept)
    assert [(v.name, v.shape) for v in shrunk.graph.inputs] == [(v.name, v.shape) for v in teacher.model.graph.inputs]
    assert [(v.name, v.shape) for v in shrunk.graph.outputs] == [(v.name, v.shape) for v in teacher.model.graph.outputs]
    if kept.all():
        assert slice_cost(shrunk) == slice_cost(teacher.model)
    else:
        assert slice_cost(shrunk).parameters < slice_cost(teacher.model).parameters


@pytest.mark.parametrize("name", BUILDERS)
def test_shrinking_is_zeroing_in_every_model(name: str) -> None:
    model = BUILDERS[name]()
    _, parts = parted(model)
    rng = np.random.default_rng(0)
    for teacher in teacher_slices(model, parts):
        for _ in range(3):
            check_shrinking(teacher, some_units(teacher.groups, rng))
        check_shrinking(teacher, np.ones(teacher.groups.units, bool))


@pytest.mark.parametrize("name", CHANNEL_BLOCKS)
def test_shrinking_is_ignoring_where_operators_see_several_channels(name: str) -> None:
    """Each block shrinks, and what is left answers as the whole does where nothing feels the others."""
    model = stack([name], ALL_BLOCKS)
    _, parts = parted(model)
    rng = np.random.default_rng(0)
    found = teacher_slices(model, parts)
    assert {group.name for teacher in found for group in teacher.groups.groups} - {"stem", "conv_1"}
    for teacher in found:
        for _ in range(4):
            check_shrinking(teacher, some_units(teacher.groups, rng))


@pytest.mark.parametrize("groups", [1, 2, 6, 12])
def test_norm_groups_of_images_of_any_size(groups: int) -> None:
    """A group norm as torch exports it, by instances whose length only the image tells."""
    net = Net()
    y = net.conv(net.input("x", "N", 8, "H", "W"), 8, 12, out="a")
    ones, zeros = (net.constant(name, np.full(groups, value, np.float32)) for name, value in (("s", 1), ("b", 0)))
    z = net.op("InstanceNormalization", net.op("Reshape", y, net.ints(0, groups, -1)), ones, zeros)
    z = net.op("Mul", net.op("Reshape", z, net.op("Shape", y)), net.weight("scale", 12, 1, 1))
    model = net.proto(net.conv(z, 12, 8))
    working, found = attention_groups(model)
    # Whole groups go, but the same part of each where they are larger than they are many.
    assert {group.name: group.width for group in found.groups} == {"a": {1: 12, 2: 6, 6: 6, 12: 12}[groups]}
    assert len(found.statistics) == (groups < 6)
    samples = {"x": np.random.default_rng(0).standard_normal((2, 8, 5, 7)).astype(np.float32)}
    rng = np.random.default_rng(1)
    for _ in range(3):
        check_shrinking(TeacherSlice("n01", working, found, samples, threads=1), some_units(found, rng))


@settings(max_examples=40)
@example(["group_norm_of_all", "mean_variance", "added_up_along_a_line"], 0)  # a size found behind an open one
@given(st.lists(st.sampled_from(sorted(ALL_BLOCKS)), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_shrinking_is_zeroing_in_random_networks(names: list[str], seed: int) -> None:
    model = stack(names, ALL_BLOCKS)
    _, parts = parted(model)
    rng = np.random.default_rng(seed)
    for teacher in teacher_slices(model, parts):
        check_shrinking(teacher, some_units(teacher.groups, rng))


@settings(max_examples=20)
@given(st.lists(st.booleans(), min_size=16, max_size=16).filter(lambda kept: any(kept[:12]) and any(kept[12:])))
def test_any_subset_of_units_may_go(kept: list[bool]) -> None:
    model = inverted_bottleneck(2)
    _, parts = parted(model)
    for teacher in teacher_slices(model, parts):
        assert [group.width for group in teacher.groups.groups] == [12, 4]
        check_shrinking(teacher, np.array(kept))


def test_zeroing_notices_groups_that_are_wrong() -> None:
    model = bottleneck(1)
    _, parts = parted(model)
    (teacher,) = teacher_slices(model, parts)
    kept = np.ones(teacher.groups.units, bool)
    kept[0] = False
    other = kept[::-1].copy()
    with pytest.raises(ShrinkError, match="differs by"):
        check_by_zeroing(teacher, shrink(teacher.model, teacher.groups, other), kept)


# Which channels are followed


def groups_of(build: Callable[[Net, str], str], *, domain: bool = False, channels: int = 8) -> dict[str, int]:
    """Width by the value in which it is made, for what lies between an image `x` and the value built."""
    net = Net()
    out = build(net, net.input("x", "N", channels, 6, 6))
    types = {out: floats(out, "N", channels, 6, 6)} if domain else None
    model = net.proto(out, domains={CUSTOM: 1} if domain else None, types=types)
    graph = fold_constants(loaded(model)).graph
    return {group.name: group.width for group in find_groups(graph, graph.outputs[0]).groups}


def test_widths_of_what_is_followed() -> None:
    def plain(net: Net, x: str) -> str:
        return net.conv(net.relu(net.norm(net.conv(x, 8, 12, out="a"), 12)), 12, 8)

    def residual_inside(net: Net, x: str) -> str:
        y = net.relu(net.conv(x, 8, 12, out="a"))
        return net.conv(net.op("Add", y, net.conv(net.relu(net.conv(y, 12, 5, out="b")), 5, 12, out="c")), 12, 8)

    def concatenated(net: Net, x: str) -> str:
        return net.conv(net.op("Concat", net.conv(x, 8, 5, out="a"), net.conv(x, 8, 7, out="b"), axis=1), 12, 8)

    def grouped(net: Net, x: str) -> str:
        return net.conv(net.conv(net.conv(x, 8, 12, out="a"), 12, 6, group=3), 6, 8)

    def depthwise(net: Net, x: str) -> str:
        return net.conv(net.conv(net.conv(x, 8, 6, out="a"), 6, 12, group=6), 12, 8)

    def flattened(net: Net, x: str) -> str:
        flat = net.op("Flatten", net.conv(x, 8, 4, out="a"))
        return net.gemm(net.relu(net.gemm(flat, 4 * 36, 10, out="b")), 10, 3)

    def transposed(net: Net, x: str) -> str:
        y = net.op("Transpose", net.conv(x, 8, 4, out="a"), perm=[0, 2, 3, 1])
        return net.matmul(y, 4, 9)

    def shuffled(net: Net, x: str) -> str:
        y = net.op("Reshape", net.conv(x, 8, 6, out="a"), net.ints(-1, 2, 3, 6, 6))
        y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3, 4]), net.ints(-1, 6, 6, 6))
        return net.conv(y, 6, 8)

    def divided_by_height(net: Net, x: str) -> str:
        y = net.conv(x, 8, 4, out="a")
        height = net.op("Cast", net.op("Slice", net.op("Shape", y), net.ints(2), net.ints(3)), to=TensorProto.FLOAT)
        return net.conv(net.op("Div", y, height), 4, 8)

    def added_to_itself(net: Net, x: str) -> str:
        y = net.conv(x, 8, 4, out="a")
        return net.conv(net.op("Concat", y, net.op("Neg", y), axis=1), 8, 8)

    assert groups_of(plain) == {"a": 12}
    assert groups_of(residual_inside) == {"a": 12, "b": 5}
    assert groups_of(concatenated) == {"a": 5, "b": 7}
    assert groups_of(grouped) == {"a": 3}
    assert groups_of(depthwise) == {"a": 6}
    assert groups_of(flattened) == {"a": 4, "b": 10}
    assert groups_of(transposed) == {"a": 4}
    assert groups_of(added_to_itself) == {"a": 4}
    assert groups_of(divided_by_height) == {"a": 4}
    assert groups_of(shuffled) == {"a": 3}  # whole rows of the shuffle


def _entry_sum(net: Net, x: str) -> str:
    return net.conv(net.op("Add", net.conv(x, 8, 8), x), 8, 8)


def _entry_concat(net: Net, x: str) -> str:
    return net.op("Concat", net.conv(x, 8, 4), x, axis=1)


def _unknown_op(net: Net, x: str) -> str:
    return net.conv(net.op("Magic", net.conv(x, 8, 4), domain=CUSTOM, out="magic"), 4, 8)


def _known_name_of_another_domain(net: Net, x: str) -> str:
    return net.conv(net.op("Relu", net.conv(x, 8, 4), domain=CUSTOM, out="magic"), 4, 8)


def _shape_of_channels(net: Net, x: str) -> str:
    y = net.conv(x, 8, 4)
    count = net.op("Cast", net.op("Slice", net.op("Shape", y), net.ints(1), net.ints(2)), to=TensorProto.FLOAT)
    return net.conv(net.op("Div", y, count), 4, 8)


def _count_of_channels(net: Net, x: str) -> str:
    y = net.conv(x, 8, 4)
    return net.conv(net.op("Div", y, net.op("Cast", net.op("Size", y), to=TensorProto.FLOAT)), 4, 8)


def _product_of_activations(net: Net, x: str) -> str:
    y = net.op("Flatten", net.conv(x, 8, 4), axis=2)
    return net.op("MatMul", y, net.op("Transpose", net.op("Flatten", x, axis=2), perm=[1, 0]))


def _bias_that_is_computed(net: Net, x: str) -> str:
    bias = net.op("ReduceMean", net.conv(x, 8, 4), net.ints(0, 2, 3), keepdims=0)
    return net.conv(net.op("Conv", x, net.weight("w", 4, 8, 1, 1), bias), 4, 8)


def _kernel_that_is_computed(net: Net, x: str) -> str:
    kernel = net.op("Reshape", net.op("ReduceMean", net.conv(x, 8, 4), net.ints(0)), net.ints(4, 1, 6, 6))
    return net.conv(net.op("Conv", net.conv(x, 8, 4), kernel, group=4), 4, 8)


def _summand_that_is_computed(net: Net, x: str) -> str:
    flat = net.op("Flatten", x)
    return net.gemm(net.op("Gemm", flat, net.weight("w", 288, 6), net.gemm(flat, 288, 6)), 6, 8)


def _one_kernel_for_two_roles(net: Net, x: str) -> str:
    shared = net.weight("w", 8, 8, 1, 1)
    return net.op("Conv", net.relu(net.op("Conv", x, shared)), shared)


def _never_read(net: Net, x: str) -> str:
    return net.op("ReduceMax", net.conv(x, 8, 4), net.ints(1))


FROZEN = [
    _entry_sum, _entry_concat, _unknown_op, _known_name_of_another_domain, _shape_of_channels, _count_of_channels,
    _product_of_activations, _bias_that_is_computed, _kernel_that_is_computed, _summand_that_is_computed,
    _one_kernel_for_two_roles, _never_read,
]  # fmt: skip


@pytest.mark.parametrize("build", FROZEN, ids=lambda build: build.__name__.strip("_"))
def test_what_cannot_be_followed_stays(build: Callable[[Net, str], str]) -> None:
    custom = build in (_unknown_op, _known_name_of_another_domain)
    assert groups_of(build, domain=custom) == {}


def test_only_the_part_that_reaches_the_exit_stays() -> None:
    def partly(net: Net, x: str) -> str:
        y = net.conv(x, 8, 6, out="a")
        return net.op("Add", net.conv(net.relu(net.conv(y, 6, 5, out="b")), 5, 6, out="c"), y)

    assert groups_of(partly, channels=8) == {"b": 5}


def test_a_single_channel_is_no_group_and_broadcasts() -> None:
    def gated(net: Net, x: str) -> str:
        gate = net.op("Sigmoid", net.conv(x, 8, 1, out="gate"))
        y = net.op("Concat", net.op("Mul", x, gate), net.conv(x, 8, 6, out="a"), axis=1)
        return net.conv(y, 14, 8)

    assert groups_of(gated) == {"a": 6}


def test_a_bias_of_a_matrix_product_is_cut_with_it() -> None:
    for shape in ((12,), (1, 12)):
        net = Net()
        y = net.op("Gemm", net.input("x", 4, 8), net.weight("w", 8, 12), net.weight("b", *shape))
        graph = fold_constants(loaded(net.proto(net.gemm(net.relu(y), 12, 3, out="y")))).graph
        groups = find_groups(graph, graph.outputs[0])
        assert {(axis.initializer, axis.axis, axis.role) for axis in groups.axes} == {
            ("w", 1, "out"), ("b", len(shape) - 1, "out"), ("y.weight", 1, "in")
        }  # fmt: skip
        assert groups.weights() == {"w", "b", "y.weight"}


# Attention: heads, or a part of every head


def attention(net: Net, x: str, bias: str = "") -> str:
    """Three heads of four, joined to 12 channels; `bias` is added to the scores."""
    heads = net.ints(0, 0, 3, 4)
    q, k, v = (net.op("Reshape", net.matmul(x, 8, 12, out=name), heads) for name in ("q", "k", "v"))
    q, v = (net.op("Transpose", part, perm=[0, 2, 1, 3]) for part in (q, v))
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 3, 1]), out="scores")
    probabilities = net.op("Softmax", net.op("Add", scores, bias) if bias else scores, axis=-1)
    joined = net.op("Transpose", net.op("MatMul", probabilities, v), perm=[0, 2, 1, 3])
    return net.matmul(net.op("Reshape", joined, net.ints(0, 0, 12)), 12, 8, out="y")


def attention_groups(model: onnx.ModelProto) -> tuple[ir.Model, ChannelGroups]:
    working = fold_constants(loaded(model))
    return working, find_groups(working.graph, working.graph.outputs[0])


def check_against_zeroing(model: onnx.ModelProto, working: ir.Model, groups: ChannelGroups) -> None:
    teacher = TeacherSlice("n01", working, groups, inputs_of(model), threads=1)
    rng = np.random.default_rng(0)
    for _ in range(5):
        check_shrinking(teacher, some_units(groups, rng))


def test_whole_heads_go_where_they_can() -> None:
    net = Net()
    model = net.proto(attention(net, net.input("x", "N", 5, 8), net.weight("bias", 1, 3, 5, 5)))
    working, groups = attention_groups(model)
    assert [group.width for group in groups.groups] == [3]
    assert "bias" in groups.weights()
    check_against_zeroing(model, working, groups)


def test_a_part_of_every_head_goes_where_heads_must_stay() -> None:
    net = Net()
    bias = net.op("Neg", net.input("bias", "N", 3, 5, 5))
    model = net.proto(attention(net, net.input("x", "N", 5, 8), bias))
    working, groups = attention_groups(model)
    # Queries and keys lose what only their product sums over.
    assert {group.name: group.width for group in groups.groups} == {"q": 4, "v": 4}
    units = {axis.initializer: axis.units.tolist() for axis in groups.axes}
    assert units["q.weight"] == units["k.weight"] == [0, 1, 2, 3] * 3
    assert units["v.weight"] == units["y.weight"] == [4, 5, 6, 7] * 3 and len(units) == 4
    check_against_zeroing(model, working, groups)


@pytest.mark.parametrize("shape", ["Exp", "shifted"])
def test_queries_that_are_not_nought_at_nought_stay(shape: str) -> None:
    net = Net()
    x = net.input("x", "N", 5, 8)
    one = net.constant("one", np.ones([], np.float32))
    q, k = (
        net.op(shape, made) if shape == "Exp" else net.op("Add", net.op("Elu", made), one)
        for made in (net.matmul(x, 8, 6, out=name) for name in ("q", "k"))
    )
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 1]))
    _, groups = attention_groups(net.proto(net.op("MatMul", scores, x)))
    assert not groups.groups


def test_a_list_that_several_read_is_written_for_each() -> None:
    net = Net()
    x = net.input("x", "N", "L", 8)
    n, length = (net.op("Slice", net.op("Shape", x), net.ints(axis), net.ints(axis + 1)) for axis in (0, 1))
    shared = net.op("Concat", length, n, net.ints(3, 4), axis=0, out="list")
    parts = []
    for name in ("a", "b"):
        y = net.op("Reshape", net.matmul(net.op("Transpose", x, perm=[1, 0, 2]), 8, 12, out=name), shared)
        y = net.op("Reshape", net.op("Neg", net.op("Transpose", y, perm=[0, 1, 3, 2])), net.ints(0, 0, 12))
        parts.append(net.matmul(y, 12, 8))
    model = net.proto(net.op("Add", *parts))
    working, groups = attention_groups(model)
    assert sorted(group.width for group in groups.groups) == [4, 4]
    kept = np.ones(8, bool)
    kept[[0, 4, 5]] = False
    samples = {"x": np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)}
    check_shrinking(TeacherSlice("n01", working, groups, samples, threads=1), kept)


def test_a_width_taken_from_another_value_is_written() -> None:
    net = Net()
    x = net.input("x", "N", "L", 8)
    n, length, width = (net.op("Slice", net.op("Shape", x), net.ints(a), net.ints(a + 1)) for a in (0, 1, 2))
    flat = net.op("Reshape", net.matmul(x, 8, 8, out="a"), net.op("Concat", net.ints(-1), width, axis=0))
    y = net.op("Reshape", net.op("Neg", flat), net.op("Concat", n, length, net.ints(-1), axis=0))
    model = net.proto(net.matmul(y, 8, 4))
    working, groups = attention_groups(model)
    assert {group.name: group.width for group in groups.groups} == {"a": 8}
    samples = {"x": np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)}
    check_shrinking(TeacherSlice("n01", working, groups, samples, threads=1), np.arange(8) % 3 > 0)


@pytest.mark.parametrize("kind", ["Conv", "Expand", "Concat"])
def test_sizes_that_nobody_can_mean_are_not_followed(kind: str) -> None:
    """A damaged model may state any size: nothing is allocated for its channels."""
    net, many = Net(), 2**40
    x = net.op("Unsqueeze", net.relu(net.matmul(net.input("x", "N", 8), 8, 8)), net.ints(2))
    if kind == "Conv":
        x = net.op("Conv", x, net.input("w", many, 8, 1))
    elif kind == "Expand":
        x = net.op("Expand", x, net.ints(1, 1, many))
    else:
        x = net.op("Concat", x, net.input("z", "N", 8, many), axis=2)
    model = net.proto(net.matmul(net.op("ReduceMean", x, axes=[2], keepdims=0), 8, 4))
    nodes = [node for node in resolve_shapes(ir.from_proto(model)).graph if node.op_type != "Constant"]
    assert find_groups(nodes, nodes[-1].outputs[0]).groups is not None
    with pytest.raises(ValueError, match="too many"):
        LabelSets().fresh(many)


@pytest.mark.parametrize("opset", [12, 13])
def test_softmax_flattened_before_opset_13(opset: int) -> None:
    net = Net()
    y = net.op("Softmax", net.conv(net.input("x", "N", 8, 6, 6), 8, 4, out="a"), axis=1)
    model = net.proto(net.conv(y, 4, 8), opset=opset)
    working, groups = attention_groups(model)
    assert {group.name: group.width for group in groups.groups} == {"a": 4}
    check_against_zeroing(model, working, groups)


# Nodes that are not what they should be


@settings(max_examples=60)
@given(st.sampled_from(sorted(BUILDERS)), st.data())
def test_no_graph_makes_the_rules_fail(name: str, data: st.DataObject) -> None:
    model = BUILDERS[name]()
    for _ in range(data.draw(st.integers(1, 4))):
        damage(model.graph, data.draw)
    graph = ir.from_proto(model).graph
    resolve_shapes(ir.Model(graph, ir_version=9))
    for value in (*graph.outputs, *(node.outputs[0] for node in graph if node.outputs)):
        groups = find_groups(graph, value)
        assert all(0 <= axis.units.max() < groups.units for axis in groups.axes)


def damage(graph: onnx.GraphProto, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
    """Change one thing so that a node need not fit its operator any more."""
    node = draw(st.sampled_from(list(graph.node)))
    kind = draw(st.sampled_from(["attribute", "operator", "input", "drop", "weight", "shape"]))
    if kind == "attribute":
        name = draw(st.sampled_from(["axis", "axes", "group", "perm", "split", "starts", "transB", "keepdims", "pads"]))
        value = draw(st.integers(-5, 5) | st.lists(st.integers(-5, 5), min_size=1, max_size=4) | st.just("text"))
        for attribute in [a for a in node.attribute if a.name == name]:
            node.attribute.remove(attribute)
        node.attribute.append(helper.make_attribute(name, value))
    elif kind == "operator":
        node.op_type = draw(st.sampled_from(sorted(RULES)))
    elif kind == "input" and node.input:
        known = [value.name for value in graph.input] + [weight.name for weight in graph.initializer]
        node.input[draw(st.integers(0, len(node.input) - 1))] = draw(st.sampled_from([*known, ""]))
    elif kind == "drop" and node.input:
        del node.input[-1]
    elif kind == "weight" and graph.initializer:
        weight = draw(st.sampled_from(list(graph.initializer)))
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        weight.CopyFrom(onnx.numpy_helper.from_array(np.ones(shape, draw(st.sampled_from(["f4", "i8"]))), weight.name))
    elif kind == "shape":
        shape = draw(st.lists(st.integers(0, 9) | st.just("N"), max_size=5))
        graph.value_info.append(floats(node.output[0], *shape))


def test_units_hold_whole_groups_of_a_grouped_convolution() -> None:
    net = Net()
    y = net.conv(net.relu(net.conv(net.input("x", "N", 8, 6, 6), 8, 12, out="a")), 12, 6, group=3, out="b")
    graph = fold_constants(loaded(net.proto(net.conv(y, 6, 8, out="y")))).graph
    groups = find_groups(graph, graph.outputs[0])
    (edit,) = groups.edits
    assert (edit.node, edit.slot, edit.units.tolist()) == ("b", "group", [0, 1, 2])
    units = {(axis.initializer, axis.axis): axis.units.tolist() for axis in groups.axes}
    assert units[("a.weight", 0)] == [0] * 4 + [1] * 4 + [2] * 4
    assert units[("b.weight", 0)] == units[("b.bias", 0)] == units[("y.weight", 1)] == [0, 0, 1, 1, 2, 2]
    assert ("b.weight", 1) not in units
