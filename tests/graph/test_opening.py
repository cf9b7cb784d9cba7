"""What onnxruntime opens: odd but valid files are read as it reads them, and come back as they were."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from ndonnx.api.compress import compress
from ndonnx.config.recipe import Recipe
from ndonnx.errors import ModelError
from ndonnx.graph import fold_constants, load, save
from ndonnx.graph.storage.sparse import is_sparse
from ndonnx.partition import partition
from tests.helpers.models import Array, Net, floats, inputs_of, local_function, residual_cnn, run, transformer, with_if
from tests.helpers.runs import SMALL

UNITS = 2
"""Residual units of the models here, and so neighbourhoods that can be distilled."""


def _edited(edit: Callable[[onnx.ModelProto], Any]) -> onnx.ModelProto:
    model = residual_cnn(UNITS)
    edit(model)
    return model


def _import(model: onnx.ModelProto, *entries: tuple[str, int]) -> None:
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(*entry) for entry in entries)


def _spell_nodes(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.domain = "ai.onnx"


def _reverse(model: onnx.ModelProto) -> None:
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _double(model: onnx.ModelProto) -> None:
    twin = copy.deepcopy(model.graph.initializer[2])
    twin.raw_data = bytes(len(twin.raw_data))
    model.graph.initializer.append(twin)


def _without_import() -> onnx.ModelProto:
    net = Net(3)
    x = net.relu(net.gemm(net.input("x", "N", 12), 12, 16, out="unit0"))
    for _ in range(UNITS):
        x = net.op("Add", x, net.gemm(net.op("Gelu", net.gemm(x, 16, 20), domain="com.microsoft"), 20, 16))
    model = net.proto(net.gemm(x, 16, 4, out="y"), domains={"com.microsoft": 1}, types={"y": floats("y", "N", 4)})
    _import(model, ("", 18))
    return model


def _sparse(array: Array, *, coordinates: bool) -> onnx.SparseTensorProto:
    at = np.argwhere(array) if coordinates else np.flatnonzero(array)
    values = numpy_helper.from_array(array[array != 0])
    return helper.make_sparse_tensor(values, numpy_helper.from_array(at.astype(np.int64)), array.shape)


def _thin_out(model: onnx.ModelProto, *, coordinates: bool = False, as_constant: bool = False) -> None:
    """Most of the weights of the stem become zeros, and these are left out."""
    (dense,) = (tensor for tensor in model.graph.initializer if tensor.name == "stem.weight")
    array = numpy_helper.to_array(dense).copy()
    array.flat[np.arange(array.size) % 5 != 0] = 0
    tensor = _sparse(array, coordinates=coordinates)
    model.graph.initializer.remove(dense)
    if as_constant:
        model.graph.node.insert(0, helper.make_node("Constant", [], ["stem.weight"], sparse_value=tensor))
    else:
        tensor.values.name = "stem.weight"
        model.graph.sparse_initializer.append(tensor)


def _older_function() -> onnx.ModelProto:
    model = local_function()
    model.functions[0].opset_import[0].version = 14  # where Conv, Relu and Add are what they are at 18
    return model


def _overloads() -> onnx.ModelProto:
    model = local_function()
    model.ir_version = 10
    (first,), calls = model.functions, [node for node in model.graph.node if node.op_type == "Unit"]
    second = copy.deepcopy(first)
    second.node[1].op_type = "Sigmoid"
    first.overload, second.overload = "first", "second"
    model.functions.append(second)
    for call, name in zip(calls, ("first", "second"), strict=True):
        call.overload = name
    return model


def _sequence_between() -> onnx.ModelProto:
    net = Net(9)
    x = net.gemm(net.relu(net.gemm(net.input("x", "N", 12), 12, 32)), 32, 16)
    net.op("SplitToSequence", x, net.constant("size", np.array(8, np.int64)), out="parts", axis=1)
    parts = [net.op("SequenceAt", "parts", net.constant(f"at{i}", np.array(i, np.int64))) for i in (0, 1)]
    x = net.relu(net.gemm(net.op("Add", *parts), 8, 20))
    return net.proto(net.gemm(x, 20, 4, out="y"))


def _forget_input_size(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1


def _name_twice(model: onnx.ModelProto) -> None:
    model.graph.output.append(model.graph.output[0])


def _add_outputs(model: onnx.ModelProto) -> None:
    """Outputs that no node makes: an input, a weight that is read, and one that is not."""
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((0, 3), np.float32), "empty"))
    for name, shape in (("x", ("N", 3, 8, 8)), ("stem.weight", (8, 3, 3, 3)), ("empty", (0, 3))):
        model.graph.output.append(floats(name, *shape))


def _classifier() -> onnx.ModelProto:
    """As scikit-learn's converter writes it: a scaler, dense layers, a label and a map of probabilities."""
    net = Net(15)
    x = net.op("Scaler", net.input("x", "N", 12), domain="ai.onnx.ml", offset=[0.5] * 12, scale=[2.0] * 12)
    for before, after in ((12, 20), (20, 16)):
        x = net.relu(net.op("Add", net.matmul(x, before, after), net.weight(f"bias{after}", 1, after)))
    scores = net.op("Softmax", net.op("Add", net.matmul(x, 16, 3), net.weight("bias", 1, 3)), out="scores")
    net.op("ZipMap", scores, domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2], out="probabilities")
    label = net.op("ArgMax", scores, axis=1, keepdims=0, out="label")
    model = net.proto(domains={"ai.onnx.ml": 3}, opset=17)
    for name, elements in ((label, TensorProto.INT64), ("scores", TensorProto.FLOAT)):
        model.graph.output.append(helper.make_tensor_value_info(name, elements, ["N"] if name == label else ["N", 3]))
    table = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    model.graph.output.append(onnx.ValueInfoProto(name="probabilities", type=helper.make_sequence_type_proto(table)))
    return model


def _optional_at_the_end() -> onnx.ModelProto:
    net = Net(16)
    x = net.gemm(net.relu(net.gemm(net.input("x", "N", 12), 12, 32)), 32, 16, out="features")
    net.op("Optional", net.gemm(net.relu(net.gemm(x, 16, 20)), 20, 4, out="y"), out="perhaps")
    return net.proto("y", "perhaps")


def _state_shapes(model: onnx.ModelProto, batch: int | None = None) -> None:
    """Write down what is inferred of the inner values, for so many samples; the model itself stays open."""
    other = copy.deepcopy(model)
    for value in other.graph.input if batch is not None else ():
        value.type.tensor_type.shape.dim[0].dim_value = batch or 0
    for value in other.graph.output:
        value.type.tensor_type.ClearField("shape")
    model.graph.value_info.extend(onnx.shape_inference.infer_shapes(other).graph.value_info)


def _state_other_sizes(model: onnx.ModelProto) -> None:
    _state_shapes(model)
    for value in model.graph.value_info:
        for size in value.type.tensor_type.shape.dim[2:]:
            size.dim_value *= 2


RELATIVES: dict[str, Callable[[], onnx.ModelProto]] = {
    "import under the long name": lambda: _edited(lambda m: _import(m, ("ai.onnx", 18))),
    "nodes under the long name": lambda: _edited(_spell_nodes),
    "both names": lambda: _edited(lambda m: _import(m, ("", 18), ("ai.onnx", 18))),
    "both names, the last one counts": lambda: _edited(lambda m: _import(m, ("ai.onnx", 11), ("", 18))),
    "one import twice": lambda: _edited(lambda m: _import(m, ("", 18), ("", 18))),
    "no import of onnxruntime's domain": _without_import,
    "function of another opset": _older_function,
    "overloaded functions": _overloads,
    "nodes in reverse": lambda: _edited(_reverse),
    "one initializer twice": lambda: _edited(_double),
    "sparse by positions": lambda: _edited(_thin_out),
    "sparse by coordinates": lambda: _edited(lambda m: _thin_out(m, coordinates=True)),
    "sparse constant": lambda: _edited(lambda m: _thin_out(m, as_constant=True)),
    "sequence in the middle": _sequence_between,
    "optional at the end": _optional_at_the_end,
    "branches": with_if,
    "input of size -1": lambda: _edited(_forget_input_size),
    "inner shapes stated": lambda: _edited(_state_shapes),
    "inner shapes of another batch": lambda: _edited(lambda m: _state_shapes(m, batch=1)),
    "inner shapes of another size": lambda: _edited(_state_other_sizes),
    "one inner shape of another rank": lambda: _edited(lambda m: m.graph.value_info.append(floats("first1", "N", 8))),
    "shape of a value that there is not": lambda: _edited(lambda m: m.graph.value_info.append(floats("none", 1))),
    "no graph name": lambda: _edited(lambda m: m.graph.ClearField("name")),
    "no shape of an output": lambda: _edited(lambda m: m.graph.output[0].type.tensor_type.ClearField("shape")),
    "one output twice": lambda: _edited(_name_twice),
    "outputs that nothing makes": lambda: _edited(_add_outputs),
    "opset 7": lambda: residual_cnn(UNITS, opset=7, ir_version=3),
    "opset 23": lambda: residual_cnn(UNITS, opset=23, ir_version=10),
}


@pytest.fixture(params=RELATIVES)
def relative(request: pytest.FixtureRequest) -> onnx.ModelProto:
    """A model that onnxruntime opens."""
    return RELATIVES[request.param]()


def test_it_comes_back_as_it_was(relative: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(relative, tmp_path / "model.onnx")
    save(load(tmp_path / "model.onnx"), tmp_path / "again.onnx")
    again = onnx.load(tmp_path / "again.onnx")
    assert again.opset_import == relative.opset_import
    assert again.graph.output == relative.graph.output
    assert again.graph.input == _fed(relative).graph.input
    feed = inputs_of(_fed(relative), batch=4)
    for name, value in run(relative, feed).items():
        np.testing.assert_array_equal(run(again, feed)[name], value)
    assert not {value.name for value in again.graph.value_info}.intersection(t.name for t in again.graph.initializer)


def test_its_working_copy_answers_alike_and_can_be_cut(relative: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(relative, tmp_path / "model.onnx")
    parts = partition(fold_constants(load(tmp_path / "model.onnx")))
    assert len(parts.distillable) == UNITS
    made = (value for n in parts.distillable for node in n.nodes for value in node.outputs)
    assert all(value.dtype == ir.DataType.FLOAT and value.shape is not None for value in made)
    feed = inputs_of(_fed(relative), batch=4)
    for name, value in run(relative, feed).items():
        np.testing.assert_allclose(run(parts.model, feed)[name], value, rtol=1e-5, atol=1e-5)


def test_all_of_its_width_and_no_steps_is_the_same(relative: onnx.ModelProto, tmp_path: Path) -> None:
    path, data, student = tmp_path / "model.onnx", tmp_path / "data.npz", tmp_path / "student.onnx"
    onnx.save(relative, path)
    np.savez(data, **inputs_of(_fed(relative), batch=8))  # type: ignore[arg-type]
    compress(path, data=str(data), output=student, recipe=Recipe(**SMALL | {"keep": 1.0, "steps": 0}))
    feed = inputs_of(_fed(relative), batch=4, seed=1)
    found = run(onnx.load(student), feed)
    for name, value in run(relative, feed).items():
        np.testing.assert_array_equal(found[name], value)
    stated = {value.name: value for value in relative.graph.value_info if value.name != "none"}
    assert {value.name: value for value in onnx.load(student).graph.value_info} == stated


def _fed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same with sizes of inputs left open where they are below zero."""
    opened = copy.deepcopy(model)
    for value in opened.graph.input:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_value < 0:
                size.ClearField("dim_value")
    return opened


# Statements about inner values


@pytest.mark.parametrize("batch", [None, 1])
def test_statements_of_another_batch_are_not_believed(tmp_path: Path, batch: int | None) -> None:
    """Those of a reshape's outcome, too, which inference alone does not know."""
    model = transformer()
    _state_shapes(model, batch)
    onnx.save(model, tmp_path / "model.onnx")
    values = {value.name: value for node in load(tmp_path / "model.onnx").graph for value in node.outputs}
    firsts = {str(value.shape[0]) for value in values.values() if value.shape and len(value.shape) == 4}
    assert "1" not in firsts


def test_a_student_states_what_still_holds(tmp_path: Path) -> None:
    path, data, student = tmp_path / "model.onnx", tmp_path / "data.npz", tmp_path / "student.onnx"
    teacher = _edited(_state_shapes)
    onnx.save(teacher, path)
    np.savez(data, **inputs_of(teacher, batch=16))  # type: ignore[arg-type]
    compress(path, data=str(data), output=student, recipe=Recipe(**SMALL | {"keep": 0.5}))
    before, after = ({value.name: value for value in onnx.load(p).graph.value_info} for p in (path, student))
    assert {"stem", "unit0", "unit1", "unit2"} <= set(after) < set(before)
    assert "first1" not in after  # half of its channels went
    assert all(after[name] == before[name] for name in after)


# Sequences and maps


@pytest.mark.parametrize("steps", [0, 3])
def test_a_classifier_with_a_map_of_probabilities_is_distilled(tmp_path: Path, steps: int) -> None:
    path, data, student = tmp_path / "model.onnx", tmp_path / "data.npz", tmp_path / "student.onnx"
    teacher = _classifier()
    onnx.save(teacher, path)
    np.savez(data, **inputs_of(teacher, batch=16))  # type: ignore[arg-type]
    recipe = Recipe(**SMALL | {"keep": 0.5, "finetune_steps": steps})
    report = compress(path, data=str(data), output=student, recipe=recipe).report
    assert report.student.parameters < 0.6 * report.teacher.parameters
    found = onnx.load(student)
    assert found.graph.output == teacher.graph.output
    (first, *_) = run(found, inputs_of(teacher))["probabilities"]
    assert sorted(first) == [0, 1, 2]
    assert sum(first.values()) == pytest.approx(1, abs=1e-5)


def test_all_of_the_width_of_a_classifier_with_a_map_is_itself(tmp_path: Path) -> None:
    path, data, student = tmp_path / "model.onnx", tmp_path / "data.npz", tmp_path / "student.onnx"
    teacher = _classifier()
    onnx.save(teacher, path)
    np.savez(data, **inputs_of(teacher, batch=16))  # type: ignore[arg-type]
    compress(path, data=str(data), output=student, recipe=Recipe(**SMALL | {"keep": 1.0, "steps": 0}))
    one, other = (run(model, inputs_of(teacher)) for model in (teacher, onnx.load(student)))
    assert one["probabilities"] == other["probabilities"]
    np.testing.assert_array_equal(one["scores"], other["scores"])


def test_trees_hold_nothing_to_distil(tmp_path: Path) -> None:
    tree: dict[str, Any] = {
        "nodes_treeids": [0, 0, 0], "nodes_nodeids": [0, 1, 2], "nodes_featureids": [0, 0, 0],
        "nodes_modes": ["BRANCH_LEQ", "LEAF", "LEAF"], "nodes_values": [0.0, 0.0, 0.0],
        "nodes_truenodeids": [1, 0, 0], "nodes_falsenodeids": [2, 0, 0], "target_treeids": [0, 0],
        "target_nodeids": [1, 2], "target_ids": [0, 0], "target_weights": [1.0, 2.0], "n_targets": 1,
    }  # fmt: skip
    net = Net(17)
    y = net.op("TreeEnsembleRegressor", net.input("x", "N", 2), domain="ai.onnx.ml", **tree)
    teacher = net.proto(y, domains={"ai.onnx.ml": 3}, types={y: floats(y, "N", 1)})
    path, data, student = tmp_path / "model.onnx", tmp_path / "data.npz", tmp_path / "student.onnx"
    onnx.save(teacher, path)
    np.savez(data, **inputs_of(teacher, batch=16))  # type: ignore[arg-type]
    report = compress(path, data=str(data), output=student, recipe=Recipe(**SMALL)).report
    assert [n.reason for n in report.neighbourhoods] == [
        "nothing to distil: ai.onnx.ml::TreeEnsembleRegressor holds trees, no weights"
    ]
    np.testing.assert_array_equal(run(onnx.load(student), inputs_of(teacher))[y], run(teacher, inputs_of(teacher))[y])


# Sparse initializers


def test_a_sparse_tensor_stays_sparse_until_it_changes(tmp_path: Path) -> None:
    onnx.save(_edited(_thin_out), tmp_path / "model.onnx")
    model = load(tmp_path / "model.onnx")
    assert is_sparse(model.graph.initializers["stem.weight"])
    save(model.clone(), tmp_path / "same.onnx")
    assert [tensor.values.name for tensor in onnx.load(tmp_path / "same.onnx").graph.sparse_initializer]
    held = model.graph.initializers["stem.weight"]
    held.const_value = ir.tensor(held.const_value.numpy() + 1, name=held.name)  # type: ignore[union-attr]
    save(model, tmp_path / "other.onnx")
    other = onnx.load(tmp_path / "other.onnx").graph
    assert not other.sparse_initializer
    assert "stem.weight" in {tensor.name for tensor in other.initializer}


def _sparse_units(model: onnx.ModelProto, part: float = 0.1) -> None:
    """All but a tenth of the weights of the residual units are zeros that the file leaves out."""
    rng = np.random.default_rng(0)
    for dense in [tensor for tensor in model.graph.initializer if tensor.name.endswith(("1.weight", "2.weight"))]:
        array = numpy_helper.to_array(dense).copy()
        array[rng.random(array.shape) > part] = 0
        tensor = _sparse(array, coordinates=False)
        tensor.values.name = dense.name
        model.graph.initializer.remove(dense)
        model.graph.sparse_initializer.append(tensor)


def _stored(model: onnx.ModelProto) -> int:
    tensors = (*model.graph.initializer, *(tensor.values for tensor in model.graph.sparse_initializer))
    return sum(int(np.prod(tensor.dims)) for tensor in tensors if tensor.data_type == TensorProto.FLOAT)


@pytest.mark.parametrize("steps", [0, 3])
def test_students_of_sparse_weights_are_sparse(tmp_path: Path, steps: int) -> None:
    """Half of a tenth is less than a tenth; half of the dense matrix would be five times as much."""
    path, data, student = tmp_path / "model.onnx", tmp_path / "data.npz", tmp_path / "student.onnx"
    teacher = _edited(_sparse_units)
    onnx.save(teacher, path)
    np.savez(data, **inputs_of(teacher, batch=16))  # type: ignore[arg-type]
    recipe = Recipe(**SMALL | {"keep": 0.5, "finetune_steps": steps})
    report = compress(path, data=str(data), output=student, recipe=recipe).report
    assert [n.status for n in report.neighbourhoods].count("distilled") == UNITS
    assert student.stat().st_size < path.stat().st_size
    assert _stored(onnx.load(student)) < 0.8 * _stored(teacher)
    assert len(onnx.load(student).graph.sparse_initializer) == 2 * UNITS


@pytest.mark.parametrize(
    ("dims", "indices", "words"),
    [
        ([4], [4], "names elements that it does not have"),
        ([4], [-1], "names elements that it does not have"),
        ([2, 2], [[0, 2]], "names elements that it does not have"),
        ([4], [0, 1], "names elements that it does not have"),
        ([2**40], [0], "would take"),
        ([-4], [0], "would take"),
    ],
)
def test_a_sparse_tensor_that_cannot_be_is_refused(
    tmp_path: Path, dims: list[int], indices: list[Any], words: str
) -> None:
    model = residual_cnn(1)
    values = numpy_helper.from_array(np.ones(1, np.float32), "broken")
    at = numpy_helper.from_array(np.array(indices, np.int64))
    model.graph.sparse_initializer.append(onnx.SparseTensorProto(values=values, indices=at, dims=dims))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=f"model.onnx: .*'broken' {words}"):
        load(tmp_path / "model.onnx")


# External data in a model hub's cache


def _in_hub(folder: Path, data: str = "model.onnx_data") -> Path:
    """A model with its data in `blobs`, linked from `snapshots`."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "1a2b"
    blobs.mkdir()
    (snapshot / data).parent.mkdir(parents=True)
    onnx.save(residual_cnn(UNITS), blobs / "m", save_as_external_data=True, location="d", size_threshold=0)
    model = onnx.load(blobs / "m", load_external_data=False)
    for tensor in model.graph.initializer:
        (place,) = (entry for entry in tensor.external_data if entry.key == "location")
        place.value = data
    (blobs / "m").write_bytes(model.SerializeToString())
    for link, target in (("model.onnx", "m"), (data, "d")):
        (snapshot / link).symlink_to(os.path.relpath(blobs / target, (snapshot / link).parent))
    return snapshot / "model.onnx"


@pytest.mark.parametrize("data", ["model.onnx_data", "data/model.bin"])
def test_external_data_may_be_linked_as_a_hub_does(tmp_path: Path, data: str) -> None:
    path = _in_hub(tmp_path, data)
    feed = inputs_of(residual_cnn(UNITS))
    for name, value in run(residual_cnn(UNITS), feed).items():
        save(load(path), tmp_path / "whole.onnx")
        np.testing.assert_array_equal(run(onnx.load(tmp_path / "whole.onnx"), feed)[name], value)


@pytest.mark.parametrize("location", ["../secret", "../../secret", "linked", "folder/secret"])
def test_external_data_of_a_linked_model_may_not_lie_anywhere_else(tmp_path: Path, location: str) -> None:
    path = _in_hub(tmp_path)
    snapshot, blob = path.parent, path.resolve()
    for secret in (tmp_path / "secret", tmp_path / "snapshots" / "secret"):
        secret.write_bytes((blob.parent / "d").read_bytes())
    (snapshot / "linked").symlink_to(tmp_path / "secret")
    (snapshot / "folder").symlink_to(tmp_path)
    model = onnx.load(blob, load_external_data=False)
    (place,) = (entry for entry in model.graph.initializer[0].external_data if entry.key == "location")
    place.value = location
    blob.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="outside the model's folder"):
        load(path)


# Graphs that cannot be


def test_nodes_that_read_each_other_in_a_circle_are_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    graph = helper.make_graph(nodes, "g", [floats("x", 4)], [floats("b", 4)])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"m\.onnx: the graph is malformed"):
        load(tmp_path / "m.onnx")


def test_a_rank_that_nobody_knows_is_found_by_trying(tmp_path: Path) -> None:
    """onnxruntime has no inference for `Scaler`: runs of several sizes tell which axes are open."""
    net = Net(18)
    y = net.op("Scaler", net.input("x", "N", "L"), out="scaled", domain="ai.onnx.ml", offset=[0.0], scale=[2.0])
    y = net.relu(net.matmul(net.op("Concat", y, y, axis=1), 8, 4))
    onnx.save(net.proto(y, domains={"ai.onnx.ml": 3}, types={y: floats(y, "N", 4)}), tmp_path / "model.onnx")
    # The product wants four columns, so that such inputs cannot be tried: nothing is known, and nothing is wrong.
    assert load(tmp_path / "model.onnx").graph[0].outputs[0].shape is None
    net = Net(18)
    y = net.op("Scaler", net.input("x", "N", "L"), out="scaled", domain="ai.onnx.ml", offset=[0.0], scale=[2.0])
    y = net.relu(net.op("Concat", y, y, net.input("z", "N", 4), axis=1))
    onnx.save(net.proto(y, domains={"ai.onnx.ml": 3}, types={y: floats(y, "N", "M")}), tmp_path / "model.onnx")
    graph = load(tmp_path / "model.onnx").graph
    assert str(graph[0].outputs[0].shape) == "[N,L]"


def test_types_of_sequences_are_no_types_of_tensors(tmp_path: Path) -> None:
    onnx.save(_sequence_between(), tmp_path / "model.onnx")
    values = {value.name: value for node in load(tmp_path / "model.onnx").graph for value in node.outputs}
    assert values["parts"].type == ir.SequenceType(ir.TensorType(ir.DataType.FLOAT))
