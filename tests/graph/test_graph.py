"""The graph: hostile files are refused in one way, good ones come back whole, costs are those counted by hand."""

from __future__ import annotations

import importlib
import itertools
import os
import re
import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from ndonnx.errors import ModelError, RunDirError
from ndonnx.graph import Dataflow, Kind, fold_constants, load, save, serialise
from ndonnx.graph.dataflow import SINK, SOURCE
from ndonnx.graph.save import check_writable, tensor_bytes
from tests.helpers.models import BUILDERS, CUSTOM, Net, floats, inputs_of, loaded, mlp, residual_cnn, run, with_if

save_module = importlib.import_module("ndonnx.graph.save")
normalise_module = importlib.import_module("ndonnx.graph.passes.normalise")


def written(path: Path, nodes: list[onnx.NodeProto], *, functions: list[onnx.FunctionProto] | None = None) -> Path:
    """A model of these nodes from `x` to `y`, without any check or inference."""
    graph = helper.make_graph(nodes, "g", [floats("x", 4)], [floats("y", 4)])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(CUSTOM, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, functions=functions or [], ir_version=9), path)
    return path


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


# External data


def external(
    folder: Path,
    location: str = "w.bin",
    *,
    offset: int | str = 0,
    length: int | None = None,
    cut: int = 0,
    write: bool = True,
) -> Path:
    """The MLP with its first weight in a file of its own."""
    model = mlp()
    _put_outside(model.graph.initializer[0], folder, location, offset=offset, length=length, cut=cut, write=write)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def _put_outside(
    tensor: onnx.TensorProto,
    folder: Path,
    location: str,
    *,
    offset: int | str = 0,
    length: int | None = None,
    cut: int = 0,
    write: bool = True,
) -> None:
    raw = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", len(raw) if length is None else length)):
        tensor.external_data.add(key=key, value=str(value))
    if write:
        (folder / "w.bin").write_bytes(raw[: len(raw) - cut])


def test_external_data_stay_on_disk_and_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = external(tmp_path)
    monkeypatch.chdir("/")
    model = load(path)
    tensor = model.graph.initializers["h1.weight"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    np.testing.assert_array_equal(tensor.numpy(), numpy_helper.to_array(mlp().graph.initializer[0]))


@pytest.mark.parametrize("location", ["/etc/hostname", "../w.bin", "a/../../w.bin", "link.bin", "folder/w.bin"])
def test_external_data_may_not_leave_the_folder(tmp_path: Path, location: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    path = external(inside, location)
    (tmp_path / "w.bin").write_bytes((inside / "w.bin").read_bytes())
    (inside / "link.bin").symlink_to(tmp_path / "w.bin")
    (inside / "folder").symlink_to(tmp_path)
    with pytest.raises(ModelError, match=r"'h1.weight' keeps its data in '.*', outside the model's folder"):
        load(path)


def test_external_data_may_be_a_link_or_a_folder_inside(tmp_path: Path) -> None:
    path = external(tmp_path, "sub/link.bin")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "link.bin").symlink_to(tmp_path / "w.bin")
    assert load(path).graph.initializers["h1.weight"].const_value is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"write": False}, "needs the missing file 'w.bin'"),
        ({"location": ""}, "needs the missing file ''"),
        ({"location": "."}, r"needs the missing file '\.'"),
        ({"cut": 1}, r"needs 640 bytes of 'w\.bin', which has 639"),
        ({"offset": 8}, r"needs 648 bytes of 'w\.bin', which has 640"),
        ({"location": "w\0.bin"}, "names no usable file"),
        ({"location": "w" * 5000}, "names no usable file"),
        ({"offset": -8}, "malformed"),
        ({"offset": "many"}, "malformed"),
    ],
)
def test_external_data_that_are_not_there_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(external(tmp_path, **options))  # type: ignore[arg-type]


def external_constant(folder: Path, location: str) -> onnx.NodeProto:
    tensor = numpy_helper.from_array(np.arange(4, dtype=np.float32), "inner")
    _put_outside(tensor, folder, location)
    return helper.make_node("Constant", [], ["c"], value=tensor)


@pytest.mark.parametrize("place", ["node", "function", "branch"])
def test_external_data_are_checked_wherever_they_hang(tmp_path: Path, place: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    add = helper.make_node("Add", ["x", "c"], ["y"])
    for location in ("../w.bin", "w.bin"):
        constant = external_constant(inside, location)
        nodes, functions = [constant, add], []
        if place == "function":
            opsets = [helper.make_opsetid("", 18)]
            functions = [helper.make_function(CUSTOM, "F", ["x"], ["y"], nodes, opsets)]
            nodes = [helper.make_node("F", ["x"], ["y"], domain=CUSTOM)]
        elif place == "branch":
            branch = helper.make_graph(nodes, "branch", [], [floats("y", 4)])
            yes = helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True)))
            nodes = [yes, helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)]
            branch.output[0].name = branch.node[1].output[0] = "z"
            nodes[1] = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
        path = written(inside / "m.onnx", nodes, functions=functions)
        (tmp_path / "w.bin").write_bytes((inside / "w.bin").read_bytes())
        if location == "../w.bin":
            with pytest.raises(ModelError, match="outside the model's folder"):
                load(path)
        else:
            answer = run(onnx.load_from_string(serialise(load(path))), {"x": np.ones(4, np.float32)})
            np.testing.assert_array_equal(answer["y"], np.arange(1, 5, dtype=np.float32))


# Saving


def test_saving_what_was_loaded_changes_nothing_any_more(tmp_path: Path) -> None:
    for name, build in BUILDERS.items():
        original = build()
        first, second = tmp_path / f"{name}.1.onnx", tmp_path / f"{name}.2.onnx"
        save(loaded(original), first)
        save(load(first), second)
        assert first.read_bytes() == second.read_bytes(), name
        feed = inputs_of(original)
        for output, expected in run(original, feed).items():
            np.testing.assert_array_equal(run(onnx.load(first), feed)[output], expected)


def test_a_model_with_external_data_is_saved_whole_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    model = load(external(tmp_path))
    save(model, tmp_path / "there" / "copy.onnx")
    assert os.listdir(tmp_path / "there") == ["copy.onnx"]
    copy = load(tmp_path / "there" / "copy.onnx")
    np.testing.assert_array_equal(run(copy, inputs_of(mlp()))["y"], run(mlp(), inputs_of(mlp()))["y"])
    assert isinstance(model.graph.initializers["h1.weight"].const_value, ir.ExternalTensor)


def test_a_large_model_is_saved_with_its_data_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_module, "PROTOBUF_LIMIT", 100)
    path = tmp_path / "large.onnx"
    for _ in range(2):  # the second time over the first, from which the model reads
        model = load(path) if path.exists() else loaded(mlp())
        save(model, path)
        name, data = sorted(os.listdir(tmp_path), key=len)
        assert name == "large.onnx"
        assert re.fullmatch(r"large\.onnx\.[0-9a-f]{16}\.data", data)
        assert path.stat().st_size < (tmp_path / data).stat().st_size
        onnx.checker.check_model(str(path))
        again = load(path)
        assert tensor_bytes(again) == tensor_bytes(loaded(mlp()))
        np.testing.assert_array_equal(
            run(onnx.load_from_string(serialise(again)), inputs_of(mlp()))["y"], run(mlp(), inputs_of(mlp()))["y"]
        )


class Killed(BaseException):
    """In place of a signal that no process survives."""


class Killing:
    """Ends what runs before or after one of its changes to names on the disk."""

    def __init__(self, moment: int) -> None:
        self.moment, self.done = moment, 0

    def watch(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*names: Any, **options: Any) -> Any:
            self._tick()
            found = change(*names, **options)
            self._tick()
            return found

        return changed

    def _tick(self) -> None:
        self.done += 1
        if self.done == self.moment:
            raise Killed


@pytest.mark.parametrize("large", [True, False])
def test_a_kill_at_any_moment_of_a_save_leaves_the_old_model_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    path, feed = tmp_path / "m.onnx", inputs_of(mlp())
    old, new = loaded(mlp()), loaded(mlp())
    for name in list(new.graph.initializers)[:2]:
        value = new.graph.initializers[name]
        value.const_value = ir.tensor(value.const_value.numpy() * 2, name=name)  # type: ignore[union-attr]
    answers = [run(onnx.load_from_string(serialise(model)), feed)["y"] for model in (old, new)]
    assert not np.array_equal(*answers)
    kept: list[int] = []
    for moment in itertools.count(1):
        monkeypatch.setattr(save_module, "PROTOBUF_LIMIT", 100)
        save(old, path)
        monkeypatch.setattr(save_module, "PROTOBUF_LIMIT", 100 if large else 10**9)
        killing = Killing(moment)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", killing.watch(os.replace))
            patch.setattr(Path, "unlink", killing.watch(Path.unlink))
            with suppress(Killed):
                save(new, path)
        found = run(onnx.load_from_string(serialise(load(path))), feed)["y"]
        kept.append(next(number for number, answer in enumerate(answers) if np.array_equal(found, answer)))
        if killing.done < moment:  # it came to its end
            break
    assert kept == sorted(kept)
    assert set(kept) == {0, 1}
    # What was left behind went with the next save.
    assert len(list(tmp_path.iterdir())) == (2 if large else 1)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: what a full disk looks like to the writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [10**9, 100])
def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    path = tmp_path / "m.onnx"
    save(loaded(mlp()), path)
    before = path.read_bytes()
    monkeypatch.setattr(save_module, "PROTOBUF_LIMIT", limit)
    other = loaded(residual_cnn())
    with pytest.raises(RunDirError, match=r"m\.onnx: cannot write the model"), file_size_limit(1000):
        save(other, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize("limit", [10**9, 100])
def test_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    def interrupt() -> ir.Tensor:
        raise KeyboardInterrupt

    path = tmp_path / "m.onnx"
    save(loaded(mlp()), path)
    before = path.read_bytes()
    monkeypatch.setattr(save_module, "PROTOBUF_LIMIT", limit)
    model = loaded(mlp())
    weight = ir.LazyTensor(interrupt, ir.DataType.FLOAT, ir.Shape([9, 7]), name="h4.weight")
    model.graph.initializers["h4.weight"].const_value = weight
    with pytest.raises(KeyboardInterrupt):
        save(model, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_save_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "nowhere" / "m.onnx", tmp_path / "folder"):
        with pytest.raises(RunDirError, match=path.name):
            save(loaded(mlp()), path)
        with pytest.raises(RunDirError, match=path.name):
            check_writable(path)
    assert os.listdir(tmp_path) == ["folder"]
    check_writable(tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == ["folder"]


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
