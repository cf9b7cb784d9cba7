"""What is inferred without the weights is what ONNX's inference says of the whole model."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

from ndonnx.graph import load
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.graph.shapes.onnx_inference import weightless, weightless_of
from ndonnx.runtime.gc_pause import gc_paused
from tests.helpers.models import BUILDERS, CUSTOM, Net, floats, transformer, with_if


def types(model: ir.Model) -> Iterator[tuple[int, str | None, str, str]]:
    """Shape and type of every inner value, by the position of its graph and its name."""
    for position, graph in enumerate(model.graphs()):
        inner = (value for node in graph for value in node.outputs if not value.is_graph_output())
        for value in (*graph.inputs, *graph.initializers.values(), *inner):
            yield position, value.name, str(value.shape), str(value.type)


def by_the_pass(path: Path) -> ir.Model:
    """A model whose shapes `onnx_ir` has inferred, weights and all."""
    model = ir.load(path)
    if model.functions:
        model = InlinePass()(model).model
    return ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model).model


def check(path: Path) -> ir.Model:
    model = load(path)
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    expected = set(types(by_the_pass(path)))
    assert set(types(model)) == expected
    again = load(path)  # as students are inferred: from the graph, not from the file
    for graph in again.graphs():
        for node in graph:
            for value in node.outputs:
                if not value.is_graph_output():
                    value.shape = value.type = None
    if not onnx.load(path, load_external_data=False).graph.value_info:
        assert set(types(infer_shapes(again))) == expected
    return model


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_whole_models(tmp_path: Path, name: str) -> None:
    onnx.save(BUILDERS[name](), tmp_path / "m.onnx")
    check(tmp_path / "m.onnx")


def shapes_from_constants(*, among_inputs: bool = False) -> onnx.ModelProto:
    """Reshape, Slice, Expand, Pad, Resize and Range whose sizes stand in initializers and `Constant` nodes."""
    net = Net()
    x = net.input("x", "N", 4, 6, 6)
    x = net.conv(x, 4, 8)
    scales = net.constant("scales", np.array([1, 1, 2, 2], np.float32))
    big = net.op("Resize", x, "", scales, out="big", mode="nearest")
    part = net.op("Slice", big, net.ints(0, 2), net.ints(4, 10), net.ints(1, 2), out="part")
    flat = net.op("Reshape", part, net.ints(0, 4, -1), out="flat")
    padded = net.op("Pad", flat, net.ints(0, 0, 1, 0, 0, 1), out="padded")
    count = net.op("Range", *(net.constant(f"r{i}", np.array(n)) for i, n in enumerate((0, 9, 2))), out="count")
    shape = net.op("Constant", value=numpy_helper.from_array(np.array([2, 5]), "c"), out="shape")
    wide = net.op("Expand", count, shape, out="wide")
    rows = net.op("Cast", net.op("ReduceSum", wide, net.ints(0), keepdims=0), to=TensorProto.FLOAT, out="rows")
    picks = net.constant("picks", np.arange(400))  # larger than inference looks at
    chosen = net.op("Gather", padded, picks, axis=2, out="chosen")
    model = net.proto(net.op("Add", net.op("ReduceMean", chosen, keepdims=1), net.op("ReduceMax", rows, keepdims=0)))
    if among_inputs:
        for tensor in model.graph.initializer:
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return model


@pytest.mark.parametrize("among_inputs", [False, True])
def test_sizes_that_stand_in_constants(tmp_path: Path, among_inputs: bool) -> None:
    onnx.save(shapes_from_constants(among_inputs=among_inputs), tmp_path / "m.onnx")
    model = check(tmp_path / "m.onnx")
    found = {value.name: str(value.shape) for node in model.graph for value in node.outputs}
    assert found["part"].endswith(",4,8,12]") and found["flat"].endswith(",4,96]") and found["wide"] == "[2,5]"


def test_branches_and_loops(tmp_path: Path) -> None:
    onnx.save(with_if(), tmp_path / "m.onnx")
    check(tmp_path / "m.onnx")
    net = Net()
    x = net.relu(net.input("x", "N", 4), out="a")
    deep = helper.make_graph([helper.make_node("Neg", ["inner"], ["deep"])], "deep", [], [floats("deep", "N", 4)])
    nodes = [
        helper.make_node("Mul", ["state", "half"], ["inner"]),
        helper.make_node("If", ["go"], ["next"], then_branch=deep, else_branch=deep),
        helper.make_node("Identity", ["go"], ["go_on"]),
    ]
    flag = helper.make_tensor_value_info("go", TensorProto.BOOL, [])
    on = helper.make_tensor_value_info("go_on", TensorProto.BOOL, [])
    number = helper.make_tensor_value_info("i", TensorProto.INT64, [])
    half = numpy_helper.from_array(np.full((1, 4), 0.5, np.float32), "half")
    body = helper.make_graph(
        nodes, "body", [number, flag, floats("state", "N", 4)], [on, floats("next", "N", 4)], [half]
    )
    times, go = net.constant("times", np.array(3)), net.constant("start", np.array(True))
    onnx.save(net.proto(net.op("Relu", net.op("Loop", times, go, x, body=body))), tmp_path / "loop.onnx")
    check(tmp_path / "loop.onnx")


def test_functions_are_inlined_first(tmp_path: Path) -> None:
    inner = [helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Concat", ["b", "b"], ["c"], axis=1)]
    function = helper.make_function(CUSTOM, "Twice", ["a"], ["c"], inner, [helper.make_opsetid("", 18)])
    nodes = [helper.make_node("Twice", ["x"], ["t"], domain=CUSTOM), helper.make_node("Neg", ["t"], ["y"])]
    graph = helper.make_graph(nodes, "g", [floats("x", "N", 4)], [floats("y", "N", 8)])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(CUSTOM, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=9), tmp_path / "m.onnx")
    model = check(tmp_path / "m.onnx")
    assert [str(node.outputs[0].shape) for node in model.graph] == ["[N,4]", "[N,8]", "[N,8]"]


def test_an_operator_that_nobody_knows_keeps_the_rest(tmp_path: Path) -> None:
    net = Net()
    y = net.op("Neg", net.op("Magic", net.relu(net.input("x", "N", 4), out="a"), domain=CUSTOM))
    onnx.save(net.proto(y, domains={CUSTOM: 1}, types={y: floats(y, "N", 4)}), tmp_path / "m.onnx")
    model = check(tmp_path / "m.onnx")
    assert str(model.graph[0].outputs[0].shape) == "[N,4]" and model.graph[1].outputs[0].shape is None


def test_weights_beside_the_file_are_not_read(tmp_path: Path) -> None:
    """More of them than one message holds; their file is a hole, and whoever read it would need the memory."""
    size = 2**29
    net = Net()
    x = net.input("x", "N", 4)
    model = net.proto(net.op("Slice", net.op("MatMul", x, "w"), net.ints(0), net.ints(7), net.ints(1)))
    for part in range(5):
        name = "w" if part == 0 else f"w{part}"
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=(4, size // 16))
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "m.data"), ("offset", str(part * size)), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)
        model.graph.initializer.append(tensor)
    onnx.save(model, tmp_path / "m.onnx")
    with (tmp_path / "m.data").open("wb") as file:
        file.truncate(5 * size)
    found = load(tmp_path / "m.onnx")
    assert str(found.graph[0].outputs[0].shape) == f"[N,{size // 16}]"
    assert (tmp_path / "m.data").stat().st_blocks == 0


def test_no_large_tensor_is_in_the_message() -> None:
    model = transformer(layers=1, width=64, heads=4)
    whole = model.ByteSize()
    for slim in (weightless(model), weightless_of(ir.from_proto(model))):
        assert slim.ByteSize() < whole / 4
        assert {value.name for value in slim.graph.input} >= {tensor.name for tensor in model.graph.initializer}
        assert [node.output for node in slim.graph.node] == [node.output for node in model.graph.node]


def test_the_collector_is_as_it_was() -> None:
    with gc_paused():
        with gc_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with gc_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
