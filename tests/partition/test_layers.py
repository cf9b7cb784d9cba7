"""Layers: one linear operator each, drop-in pieces of the teacher, the rest with its reason."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from ndonnx.assemble.splice import splice
from ndonnx.errors import ShrinkError, UsageError
from ndonnx.graph import serialise
from ndonnx.partition import Neighbourhood, Partition
from ndonnx.students import TeacherSlice
from ndonnx.students.methods.sparsity import Sparsity
from ndonnx.students.methods.width import Width
from tests.helpers.models import (
    Net,
    bottleneck,
    inception,
    inputs_of,
    inverted_bottleneck,
    loaded,
    mlp,
    parted,
    residual_cnn,
    run,
    transformer,
    unet,
    vgg,
)

MODELS = {
    "residual": residual_cnn(),
    "norms": residual_cnn(norm=True),
    "inverted": inverted_bottleneck(),
    "bottleneck": bottleneck(),
    "vgg": vgg(),
    "inception": inception(),
    "unet": unet(),
    "mlp": mlp(),
    "transformer": transformer(),
}
LINEAR = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


def layers(proto: onnx.ModelProto, **options: object) -> Partition:
    return parted(proto, granularity="layer", **options)[1]


def ops(neighbourhood: Neighbourhood) -> list[str]:
    return [node.op_type for node in neighbourhood.nodes]


def ends(parts: Partition) -> list[tuple[str | None, str | None]]:
    return [(n.entry.name, n.exit.name) for n in parts.distillable if n.entry and n.exit]


def test_a_residual_network_falls_into_its_convolutions() -> None:
    parts = layers(residual_cnn(2, norm=True))
    assert [ops(n) for n in parts.distillable] == [
        ["Conv", "Relu"],
        ["Conv", "BatchNormalization", "Relu"],
        ["Conv", "BatchNormalization"],
        ["Conv", "BatchNormalization", "Relu"],
        ["Conv", "BatchNormalization"],
        ["Gemm"],
    ]
    assert ends(parts)[0] == ("x", "unit0")
    (rest,) = {n.reason for n in parts.neighbourhoods if not n.distillable}
    assert rest == "holds no weights"
    assert [n.name for n in parts.neighbourhoods] == [f"n{i:02d}" for i in range(1, len(parts.neighbourhoods) + 1)]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_linear_weight_lies_in_one_layer(name: str) -> None:
    parts = layers(MODELS[name])
    held = [
        [v.name for v in node.inputs if v is not None and v.is_initializer() and len(v.shape or ()) > 1]
        for n in parts.distillable
        for node in n.nodes
        if node.op_type in LINEAR
    ]
    assert all(len(weights) == 1 for weights in held)
    weights = [name for found in held for name in found]
    assert len(weights) == len(set(weights)) == len(parts.distillable)
    assert parts.coverage()[0] > 0.9


@pytest.mark.parametrize("name", sorted(MODELS))
def test_each_layer_computes_what_it_does_in_the_teacher(name: str) -> None:
    proto = MODELS[name]
    feeds = inputs_of(proto, 3)
    parts = layers(proto)
    wanted = [name for pair in ends(parts) for name in pair if name and name not in feeds]
    values = {**run(proto, feeds, wanted), **feeds}
    for neighbourhood in parts.distillable:
        model = parts.slice_of(neighbourhood)
        given = {value.name or "": values[value.name or ""] for value in model.graph.inputs}
        exit_ = neighbourhood.exit.name if neighbourhood.exit else ""
        found = run(onnx.load_from_string(serialise(model)), given)[exit_ or ""]
        np.testing.assert_allclose(found, values[exit_ or ""], rtol=1e-4, atol=1e-5)


def test_a_bias_that_is_added_belongs_to_its_product() -> None:
    parts = layers(mlp())
    assert [ops(n) for n in parts.distillable][1] == ["MatMul", "Add", "Tanh"]


def test_a_sum_with_something_that_varies_does_not() -> None:
    net = Net()
    x = net.input("x", "N", 6)
    net.op("Add", net.matmul(x, 6, 6, out="product"), x, out="y")
    assert ends(layers(net.proto("y"))) == [("x", "product")]


def test_a_product_that_is_read_twice_ends_there() -> None:
    net = Net()
    y = net.matmul(net.input("x", "N", 6), 6, 6, out="product")
    net.op("Mul", net.op("Add", y, net.weight("b", 6)), y, out="y")
    assert ends(layers(net.proto("y"))) == [("x", "product")]


def test_a_value_to_cut_at_is_a_boundary() -> None:
    assert ends(layers(mlp(), cut=["h2"]))[1][1] == "h2"
    assert ends(layers(mlp(), cut=["h1"]))[0] == ("x", "h1")
    assert ends(layers(residual_cnn(1), cut=["stem"]))[0] == ("x", "stem")


def test_frozen_layers_are_kept_with_the_reason() -> None:
    parts = layers(residual_cnn(1), freeze=["first1"])
    assert next(n.reason for n in parts.neighbourhoods if n.entry and n.entry.name == "unit0") == (
        "frozen: it makes 'first1'"
    )


def test_a_weight_that_two_operators_share_has_one_student() -> None:
    net = Net()
    weight = net.weight("w", 8, 8)
    y = net.op("Gemm", net.relu(net.op("Gemm", net.input("x", "N", 8), weight)), weight)
    parts = layers(net.proto(net.gemm(y, 8, 5, out="y")))
    assert [len(parts.uses(n)) for n in parts.trained] == [2, 1]


def test_what_has_weights_and_no_linear_operator_is_kept_with_its_reason() -> None:
    net = Net()
    net.norm(net.op("AveragePool", net.input("x", "N", 4, 8, 8), kernel_shape=[2, 2]), 4, out="y")
    (piece,) = layers(net.proto("y")).neighbourhoods
    assert piece.reason == "no linear operator with a constant weight and one input that varies"


def test_products_of_two_values_are_no_layers() -> None:
    parts = layers(transformer(1))
    assert len(parts.distillable) == 6
    assert all(len([v for v in (n.entry, *n.context) if v is not None]) == 1 for n in parts.distillable)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_layers_get_their_zeros_and_the_student_runs(name: str) -> None:
    proto = MODELS[name]
    feeds = inputs_of(proto, 24)
    parts = layers(proto)
    values = {**run(proto, feeds, [entry for entry, _ in ends(parts) if entry and entry not in feeds]), **feeds}
    students = {}
    for n in parts.distillable:
        model = parts.slice_of(n)
        given = {value.name or "": values[value.name or ""] for value in model.graph.inputs}
        assert n.groups is not None
        teacher = TeacherSlice(n.name, model, n.groups, given)
        students[n.name] = Sparsity("0.5").build(teacher, np.random.default_rng(0)).model
    student = splice(loaded(proto), students)
    zeros = total = 0
    for node in student.graph:
        for value in node.inputs:
            if (
                node.op_type in LINEAR
                and value is not None
                and value.const_value is not None
                and len(value.shape or ()) > 1
            ):
                zeros += int((value.const_value.numpy() == 0).sum())
                total += value.const_value.size
    assert zeros == pytest.approx(total / 2, abs=len(students))
    outputs = run(onnx.load_from_string(serialise(student)), feeds)
    assert all(np.isfinite(array).all() for array in outputs.values())


def test_a_layer_has_no_width() -> None:
    parts = layers(vgg())
    (first, *_) = parts.distillable
    assert first.widths == []
    assert first.groups is not None
    teacher = TeacherSlice("n01", parts.slice_of(first), first.groups, inputs_of(vgg(), 8))
    with pytest.raises(ShrinkError, match="no width to shrink inside"):
        Width(0.5).build(teacher, np.random.default_rng(0))


def test_other_granularities_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="use 'block' or 'layer'"):
        parted(vgg(), granularity="crumb")
