"""The graph: hostile files are refused in one way, good ones come back whole, costs are those counted by hand."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from ndonnx.errors import ModelError
from ndonnx.graph import load
from tests.helpers.models import BUILDERS, CUSTOM, inputs_of, loaded, mlp, residual_cnn, run, with_if
from tests.helpers.written import written

# Loading


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.onnx", b""),
        ("text.onnx", b"this is not a model\n"),
        ("page.onnx", b"<!DOCTYPE html><html></html>"),
        ("pickle.onnx", b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00."),
        ("model.json", b"{"),
        ("model.textproto", b"graph {"),
        ("model.onnxtxt", b"<ir_version: 8>"),
        ("model.pbtxt", b"\xff\xfe"),
    ],
)
def test_what_is_no_model_is_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"{name}: not an ONNX") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_file_of_onnxruntimes_own_format_is_told_from_others(tmp_path: Path) -> None:
    onnx.save(mlp(), tmp_path / "m.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "m.ort")
    options.log_severity_level = 4
    options.add_session_config_entry("session.save_model_format", "ORT")
    ort.InferenceSession(str(tmp_path / "m.onnx"), options, providers=["CPUExecutionProvider"])
    with pytest.raises(
        ModelError, match=r"m\.ort: not an ONNX file, in onnxruntime's own format: give the \.onnx file"
    ):
        load(tmp_path / "m.ort")


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere\.onnx: no such file"):
        load(tmp_path / "nowhere.onnx")
    with pytest.raises(ModelError, match="cannot read the model"):
        load(tmp_path)


def test_model_without_outputs_or_opset_is_refused(tmp_path: Path) -> None:
    model = mlp()
    del model.graph.output[:]
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(ModelError, match="no graph with an output"):
        load(tmp_path / "a.onnx")
    model = mlp()
    del model.opset_import[:]
    onnx.save(model, tmp_path / "b.onnx")
    with pytest.raises(ModelError, match="states no opset"):
        load(tmp_path / "b.onnx")


WHOLE = [BUILDERS[name]().SerializeToString() for name in ("with_if", "local_function", "constant_nodes", "old_style")]


def loads_or_is_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(content)
        try:
            model = load(path)
        except ModelError as error:
            assert str(error).startswith(str(path))
        else:
            assert model.graph.outputs


@settings(max_examples=60)
@given(st.sampled_from(WHOLE), st.floats(0, 1, exclude_max=True))
def test_truncated_file_never_raises_anything_else(whole: bytes, part: float) -> None:
    loads_or_is_refused(whole[: int(part * len(whole))])


@settings(max_examples=120)
@given(
    st.sampled_from(WHOLE),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4),
)
def test_damaged_file_never_raises_anything_else(whole: bytes, flips: list[tuple[float, int]]) -> None:
    damaged = bytearray(whole)
    structure = [i for i in range(len(whole)) if i < 200 or i > len(whole) - 800]  # weights lie between
    for where, change in flips:
        damaged[structure[int(where * len(structure))]] ^= change
    loads_or_is_refused(bytes(damaged))


def test_values_that_nothing_makes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    relu, neg = helper.make_node("Relu", ["b"], ["y"], name="reader"), helper.make_node("Neg", ["x"], ["b"])
    with pytest.raises(ModelError, match="'reader' reads 'b' before anything makes it"):
        load(written(path, [relu]))
    with pytest.raises(ModelError, match="the output 'y' is made by no node"):
        load(written(path, [neg]))
    with pytest.raises(ModelError, match="'a'"):
        load(written(path, [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Neg", ["x"], ["a"])]))


def test_values_that_nothing_makes_are_refused_in_branches_too(tmp_path: Path) -> None:
    model = with_if()
    branch = next(node for node in model.graph.node if node.op_type == "If").attribute[0].g
    branch.node[0].input[1] = "nowhere"
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="reads 'nowhere'"):
        load(tmp_path / "m.onnx")


def test_functions_are_inlined(tmp_path: Path) -> None:
    model = BUILDERS["local_function"]()
    ours = loaded(model)
    assert not ours.functions
    assert {node.domain for node in ours.graph} == {""}
    feed = inputs_of(model)
    np.testing.assert_array_equal(run(ours, feed)["logits"], run(model, feed)["logits"])


def test_recursive_function_is_refused(tmp_path: Path) -> None:
    call = helper.make_node("F", ["x"], ["y"], domain=CUSTOM)
    body = helper.make_function(CUSTOM, "F", ["x"], ["y"], [call], [helper.make_opsetid(CUSTOM, 1)])
    with pytest.raises(ModelError, match="'F' calls itself"):
        load(written(tmp_path / "m.onnx", [call], functions=[body]))


def test_shapes_are_inferred_and_the_rest_is_kept() -> None:
    model = residual_cnn(2, opset=13, ir_version=7)
    model.doc_string, model.producer_name, model.model_version = "what it is", "someone", 3
    model.metadata_props.add(key="classes", value="cat,dog")
    ours = loaded(model)
    values = ir.convenience.create_value_mapping(ours.graph)
    assert values["unit1"].shape == ir.Shape(["N", 8, 8, 8])
    again = ir.to_proto(ours)
    assert [*again.graph.node] == [*model.graph.node]
    by_name = {weight.name: weight for weight in again.graph.initializer}
    assert by_name == {weight.name: weight for weight in model.graph.initializer}
    for name in ("doc_string", "producer_name", "model_version", "ir_version", "opset_import", "metadata_props"):
        assert getattr(again, name) == getattr(model, name), name
    for side in ("input", "output"):
        assert getattr(again.graph, side) == getattr(model.graph, side)
