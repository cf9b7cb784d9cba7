"""Ranking of units: the order is that of the definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st

from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.partition import ChannelGroup, ChannelGroups, WeightAxis, find_groups
from ndonnx.students import TeacherSlice
from ndonnx.students.features import LinearReader, linear_readers
from ndonnx.students.importance import rank_units
from tests.helpers.models import Array, Net, inputs_of, run


def strided(net: Net) -> str:
    """A convolution whose strides, dilations and paddings differ between its axes."""
    y = net.relu(net.conv(net.input("x", "N", 4, 7, 8), 4, 5, out="a"))
    weight, bias = net.weight("b.weight", 3, 5, 3, 2), net.weight("b.bias", 3)
    return net.op("Conv", y, weight, bias, out="b", strides=[2, 1], dilations=[1, 2], pads=[0, 2, 1, 1])


def same_padded(net: Net) -> str:
    """Padding that follows from the size, and no offset."""
    y = net.relu(net.conv(net.input("x", "N", 4, 6, 5), 4, 6, out="a"))
    return net.op("Conv", y, net.weight("b.weight", 2, 6, 2, 2), out="b", auto_pad="SAME_UPPER")


def pointwise(net: Net) -> str:
    """More outputs than features."""
    return net.conv(net.relu(net.conv(net.input("x", "N", 4, 3, 3), 4, 6, 1, out="a")), 6, 20, 1, out="b")


def flattened(net: Net) -> str:
    """Each unit brings four channels."""
    y = net.op("Flatten", net.relu(net.conv(net.input("x", "N", 4, 2, 2), 4, 7, 1, out="a")))
    return net.gemm(y, 28, 3, out="b")


def without_offset(net: Net) -> str:
    return net.matmul(net.op("Sigmoid", net.matmul(net.input("x", "N", 5, 6), 6, 7, out="a")), 7, 4, out="b")


def two_groups(net: Net) -> str:
    """The reader sums over two groups; each is ranked while the other stays."""
    x = net.input("x", "N", 6)
    y = net.op("Concat", net.relu(net.gemm(x, 6, 4, out="a")), net.op("Tanh", net.gemm(x, 6, 5, out="c")), axis=1)
    return net.gemm(y, 9, 3, out="b")


NETS: dict[str, Callable[[Net], str]] = {
    f.__name__: f for f in (strided, same_padded, pointwise, flattened, without_offset, two_groups)
}


def teacher_of(make: Callable[[Net], str], seed: int = 0, samples: int = 60) -> TeacherSlice:
    net = Net(seed)
    proto = net.proto(make(net))
    model = infer_shapes(ir.from_proto(proto))
    return TeacherSlice("n01", model, find_groups(list(model.graph), model.graph.outputs[0]), inputs_of(proto, samples))


def reader_of(teacher: TeacherSlice) -> LinearReader:
    return next(r for r in linear_readers(teacher.model, teacher.groups) if r.weight == "b.weight")


def seen_features(teacher: TeacherSlice) -> Array:
    """What the weight of `b` is applied to, in float64 (rows, features): the answer where it is the identity."""
    probe, reader = teacher.model.clone(), reader_of(teacher)
    identity = np.eye(reader.features, dtype=np.float32)
    weight = probe.graph.initializers["b.weight"]
    (node,) = (usage.node for usage in weight.uses())
    if node.op_type == "Conv":
        identity = identity.reshape(reader.features, -1, *reader.kernel)
    for name, array in {"b.weight": identity, "b.bias": np.zeros(reader.features, np.float32)}.items():
        if (value := probe.graph.initializers.get(name)) is not None:
            value.const_value, value.shape = ir.tensor(array, name=name), ir.Shape(array.shape)
    node.outputs[0].shape = None
    found = run(probe, teacher.samples, ["b"])["b"]
    return (np.moveaxis(found, 1, -1) if node.op_type == "Conv" else found).reshape(-1, reader.features).astype(float)


def check_by_definition(teacher: TeacherSlice, group: ChannelGroup, order: list[int], keep: int) -> None:
    """Each unit that went was the one whose loss costs least, with every problem solved anew."""
    reader, x = reader_of(teacher), seen_features(teacher)
    if reader.has_bias:
        x = x - x.mean(axis=0)
    square = x.T @ x
    square = square / (np.trace(square) / len(square)) + 1e-4 * np.eye(len(square))
    weight = reader.weight_matrix().astype(np.float64)
    units = np.repeat(reader.units, reader.features // len(reader.units))

    def error(gone: list[int]) -> float:
        lost = np.isin(units, [group.start + unit for unit in gone])
        refitted = np.zeros_like(weight)
        refitted[~lost] = np.linalg.solve(square[np.ix_(~lost, ~lost)], square[~lost] @ weight)
        difference = refitted - weight
        return float((difference * (square @ difference)).sum())

    assert sorted(order) == list(range(group.width))
    removed = order[keep:][::-1]
    for count, unit in enumerate(removed):
        before = removed[:count]
        errors = {other: error([*before, other]) for other in order if other not in before}
        # Units that are equal but for the rounding of float32 may change places.
        assert errors[unit] <= min(errors.values()) * (1 + 1e-4) + 1e-9


@settings(max_examples=25)
@given(st.sampled_from(sorted(NETS)), st.integers(0, 10**6), st.integers(1, 3))
def test_each_unit_that_goes_is_the_cheapest_by_definition(name: str, seed: int, keep: int) -> None:
    teacher = teacher_of(NETS[name], seed)
    for group, order in rank_units(teacher, lambda group: keep).items():
        check_by_definition(teacher, group, order.tolist(), keep)


def test_a_unit_that_brings_more_channels_than_others_counts_with_all_of_them() -> None:
    teacher = teacher_of(two_groups)
    group, other = teacher.groups.groups

    def merged(axis: WeightAxis) -> WeightAxis:
        """The first unit of the second group becomes one more channel of the first unit of the first."""
        units = np.where(axis.units == other.start, group.start, axis.units)
        return replace(axis, units=units) if axis.initializer == "b.weight" else axis

    axes = tuple(map(merged, teacher.groups.axes))
    teacher = replace(teacher, groups=ChannelGroups(teacher.groups.groups, axes, ()))
    for each, order in rank_units(teacher, lambda group: 1).items():
        check_by_definition(teacher, each, order.tolist(), 1)


def test_of_a_wide_group_never_both_of_a_pair_go_while_others_have_their_double() -> None:
    """Units that go together are weighed one after another: of two that say the same, one stays."""
    net = Net(5)
    half = net.rng.standard_normal((200, 24)).astype(np.float32)
    net.constant("a.weight", np.concatenate([half, half]))
    hidden = net.relu(net.op("Gemm", net.input("x", "N", 24), "a.weight", transB=1, out="a"))
    proto = net.proto(net.gemm(hidden, 400, 6, out="b"))
    model = infer_shapes(ir.from_proto(proto))
    teacher = TeacherSlice("n01", model, find_groups(list(model.graph), model.graph.outputs[0]), inputs_of(proto, 3000))
    ((group, order),) = rank_units(teacher, lambda group: 200).items()
    assert group.width == 400
    assert sorted(unit % 200 for unit in order[:200]) == list(range(200))
