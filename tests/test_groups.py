"""Channel groups: removing units as they say is the same as ignoring those channels, and nothing else may go."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    BLOCKS,
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
from onnx import TensorProto

from ndonnx.errors import ShrinkError
from ndonnx.graph import fold_constants, slice_cost
from ndonnx.partition import ChannelGroups, Partition, find_groups
from ndonnx.students import TeacherSlice
from ndonnx.students.width import check_by_zeroing, shrink

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


@settings(max_examples=40)
@given(st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_shrinking_is_zeroing_in_random_networks(names: list[str], seed: int) -> None:
    model = stack(names)
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
    model = net.proto(out, domains={CUSTOM: 1} if domain else None, types={out: floats(out, "N", channels, 6, 6)})
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


def _softmax_over_channels(net: Net, x: str) -> str:
    return net.conv(net.op("Softmax", net.conv(x, 8, 4), axis=1), 4, 8)


def _layer_norm_over_channels(net: Net, x: str) -> str:
    y = net.op("Transpose", net.conv(x, 8, 4), perm=[0, 2, 3, 1])
    y = net.op("LayerNormalization", y, net.weight("scale", 4), net.weight("bias", 4), axis=-1)
    return net.matmul(y, 4, 8)


def _mean_over_channels(net: Net, x: str) -> str:
    y = net.conv(x, 8, 4)
    return net.conv(net.op("Sub", y, net.op("ReduceMean", y, net.ints(1))), 4, 8)


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
    _entry_sum, _entry_concat, _unknown_op, _known_name_of_another_domain, _softmax_over_channels,
    _layer_norm_over_channels, _mean_over_channels, _shape_of_channels, _count_of_channels, _product_of_activations,
    _bias_that_is_computed, _kernel_that_is_computed, _summand_that_is_computed, _one_kernel_for_two_roles, _never_read,
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
