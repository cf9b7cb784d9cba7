"""Constants and dataflow of a graph."""

from __future__ import annotations

import importlib

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from ndonnx.errors import ModelError
from ndonnx.graph import Dataflow, Kind, fold_constants, serialise
from ndonnx.graph.dataflow import SINK, SOURCE
from tests.helpers.models import BUILDERS, CUSTOM, Net, floats, inputs_of, loaded, run, with_if

normalise_module = importlib.import_module("ndonnx.graph.passes.normalise")
# Constants


@pytest.mark.parametrize("name", BUILDERS)
def test_folding_keeps_the_outputs_and_leaves_no_constant_nodes(name: str) -> None:
    original = BUILDERS[name]()
    folded = fold_constants(loaded(original))
    assert not [node for node in folded.graph if node.op_type == "Constant"]
    assert not [node for node in folded.graph if node.inputs and all(v and v.is_initializer() for v in node.inputs)]
    assert not set(folded.graph.initializers) & {value.name for value in folded.graph.inputs}
    feed = inputs_of(original)
    for output, expected in run(original, feed).items():
        np.testing.assert_array_equal(run(folded, feed)[output], expected)
    once = serialise(folded)
    assert serialise(fold_constants(folded)) == once


def test_computed_weights_become_initializers_under_their_names() -> None:
    folded = fold_constants(loaded(BUILDERS["constant_nodes"]()))
    assert [node.op_type for node in folded.graph] == ["MatMul", "Relu", "Gemm", "Add", "Relu", "Gemm"]
    shapes = {name: tuple(value.shape or ()) for name, value in folded.graph.initializers.items()}
    assert shapes == {"w1t": (6, 10), "w2i": (4, 10), "b2r": (1, 4), "y.weight": (3, 4), "y.bias": (3,)}


def folded_ops(
    net: Net, *outputs: str, opset: int = 18, types: dict[str, onnx.ValueInfoProto] | None = None
) -> list[str]:
    model = net.proto(*outputs, domains={CUSTOM: 1}, opset=opset, types=types)
    return [node.op_type for node in fold_constants(loaded(model)).graph]


def test_what_cannot_be_computed_ahead_is_left_alone() -> None:
    net = Net()
    net.op("Add", net.input("x", 4), net.op("Magic", net.weight("w", 4), domain=CUSTOM), out="y")
    assert folded_ops(net, "y", types={"y": floats("y", 4)}) == ["Magic", "Add"]
    net = Net()
    net.op("Add", net.input("x", 4), net.op("RandomUniform", shape=[4]), out="y")
    assert folded_ops(net, "y") == ["RandomUniform", "Add"]
    net = Net()
    place = net.op("Squeeze", net.op("Sub", net.op("Shape", net.input("x", "N")), net.op("Shape", "x")))
    net.op("SequenceAt", net.op("SequenceConstruct", net.weight("v", 4), net.weight("w", 4)), place, out="y")
    assert "SequenceConstruct" in folded_ops(net, "y")


def test_a_branch_that_draws_at_random_is_left_alone() -> None:
    branch = helper.make_graph(
        [helper.make_node("RandomUniform", [], ["r"], shape=[4])], "branch", [], [floats("r", 4)]
    )
    net = Net()
    net.op("If", net.constant("yes", np.array(True)), out="c", then_branch=branch, else_branch=branch)
    net.op("Add", net.input("x", 4), "c", out="y")
    assert folded_ops(net, "y") == ["If", "Add"]


def test_strings_and_constant_outputs_fold() -> None:
    net = Net()
    net.op("Identity", net.constant("word", np.array(["a", "b"], dtype=object)), out="words")
    net.op("Equal", net.input("x", "N", 2, dtype=TensorProto.STRING), "words", out="y")
    net.op("Neg", net.weight("w", 3), out="z")
    model = net.proto("y", "z", opset=19)
    folded = fold_constants(loaded(model))
    assert [node.op_type for node in folded.graph] == ["Equal"]
    assert [value.name for value in folded.graph.outputs] == ["y", "z"]
    np.testing.assert_array_equal(folded.graph.initializers["z"].const_value.numpy(), -net.weights["w"])  # type: ignore[union-attr]


def test_a_constant_that_asks_for_terabytes_is_refused() -> None:
    net = Net()
    ones = net.op("ConstantOfShape", net.ints(10**5, 10**4, 10**3), out="ones")
    net.op("Add", net.input("x", 4), net.op("ReduceSum", ones, keepdims=0), out="y")
    with pytest.raises(ModelError, match=r"'ones' would take 4e\+12 bytes"):
        fold_constants(loaded(net.proto("y")))


def test_a_constant_as_large_as_the_weights_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalise_module, "FOLD_LIMIT", 100)
    net = Net()
    net.op("MatMul", net.input("x", "N", 20), net.op("Transpose", net.weight("w", 30, 20), perm=[1, 0]), out="y")
    assert folded_ops(net, "y") == ["MatMul"]


def test_a_constant_that_fails_is_the_models_fault() -> None:
    net = Net()
    net.op("Gather", net.weight("w", 3), net.ints(7), axis=0, out="bad")
    net.op("Add", net.input("x", 1), "bad", out="y")
    with pytest.raises(ModelError, match="'bad', cannot be computed"):
        fold_constants(loaded(net.proto("y")))


# Dataflow


def kinds_of(flow: Dataflow) -> dict[str, Kind]:
    return {value.name or "": kind for value, kind in flow.kinds.items()}


def test_kinds_of_values() -> None:
    net = Net()
    x, mask = net.input("x", "N", 4, 6), net.input("mask", "N", 6)
    net.op("Neg", net.weight("w", 4, 1), out="constant")
    net.op("Slice", net.op("Shape", x, out="shape"), net.ints(0), net.ints(1), out="batch")
    net.op("Concat", "batch", net.ints(24), axis=0, out="target")
    net.op("Unsqueeze", mask, net.ints(1), out="context")
    net.op("Shape", "context", out="context shape")
    net.op("Add", x, "constant", out="stream")
    net.op("Mul", "stream", "context", out="both")
    net.op("Reshape", "both", "target", out="y")
    net.op("RandomNormal", shape=[3], out="random")
    net.op("RandomNormalLike", x, out="like")
    graph = loaded(net.proto("y", "random", "like", "context shape")).graph
    flow = Dataflow.of(graph, ["x"])
    kinds = kinds_of(flow)
    wanted = {
        Kind.CONSTANT: ["w", "constant"],
        Kind.METADATA: ["shape", "batch", "target", "context shape"],
        Kind.CONTEXT: ["mask", "context", "random"],
        Kind.STREAM: ["x", "stream", "both", "y", "like"],
    }
    for kind, names in wanted.items():
        assert {name: kinds[name] for name in names} == dict.fromkeys(names, kind)
    edges = {tuple(getattr(v, "name", v) for v in edge) for edge in flow.flow.edges}
    assert edges == {
        (SOURCE, "x"), ("x", "stream"), ("stream", "both"), ("both", "y"), ("y", SINK), ("x", "like"), ("like", SINK)
    }  # fmt: skip
    both = kinds_of(Dataflow.of(graph))
    assert both["mask"] is both["context"] is Kind.STREAM
    assert kinds_of(Dataflow.of(graph, ["mask"]))["x"] is Kind.CONTEXT


def test_dead_values_are_no_part_of_the_flow_and_branches_read_what_they_name() -> None:
    model = with_if()
    model.graph.node.insert(0, helper.make_node("Neg", ["x"], ["dead"]))
    flow = Dataflow.of(loaded(model).graph)
    names = {getattr(value, "name", value): value for value in flow.flow}
    assert "dead" not in names
    assert names["chosen"] in flow.flow.successors(names["unit1"])
    chooser = next(node for node in flow.order if node.op_type == "If")
    assert {value.name for value in flow.stream_reads(chooser)} >= {"unit1"}


def test_initializers_among_the_inputs_are_constants() -> None:
    flow = Dataflow.of(loaded(BUILDERS["old_style"]()).graph)
    assert flow.stream_inputs == ("x",)
    assert {value.name for value, kind in flow.kinds.items() if kind is Kind.CONSTANT} == {
        weight.name for weight in BUILDERS["old_style"]().graph.initializer
    }
