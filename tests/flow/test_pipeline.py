"""The whole way from teacher to student: promises of the result, and whatever may interrupt it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from ndonnx import demo
from ndonnx.api.compress import compress
from ndonnx.assemble.splice import splice
from ndonnx.config.recipe import DataRecipe, Recipe
from ndonnx.data import input_specs, open_source
from ndonnx.data.split import draw
from ndonnx.errors import DataError, ModelError, RunDirError, UsageError, VerificationError
from ndonnx.flow import assembly
from ndonnx.graph import load, slice_cost
from ndonnx.teacher import make_session
from tests.helpers.models import Array, Net, inputs_of, mlp, residual_cnn, run, transformer
from tests.helpers.runs import SMALL, UNITS, Bench, Recorder, done_markers, statuses

pytestmark = pytest.mark.usefixtures("one_core")


# What comes out


def test_the_demo_from_end_to_end(tmp_path: Path) -> None:
    output = tmp_path / "student.onnx"
    recorder = Recorder()
    result = compress(
        demo.teacher_path(),
        data=str(demo.data_path("train")),
        eval_data=str(demo.data_path("test")),
        output=output,
        recipe=Recipe(**(SMALL | {"samples": 64, "steps": 2, "init": "teacher"})),
        progress=recorder,
    )
    report = json.loads((tmp_path / "student.run" / "report.json").read_text())
    assert report == json.loads(json.dumps(result.report.to_json(), allow_nan=False))
    assert report.keys() == {
        *(
            "teacher",
            "student",
            "metrics",
            "neighbourhoods",
            "finetune",
            "stages",
            "seconds",
            "peak_rss_bytes",
            "run_dir",
            "shapes",
            "task",
            "asked",
            "command",
            "files",
            "versions",
            "machine",
            "warnings",
        )
    }
    for side, path in (("teacher", demo.teacher_path()), ("student", output)):
        assert {"path", "parameters", "macs", "bytes"} <= report[side].keys()
        assert report[side]["path"] == str(path)
        assert report[side]["bytes"] == path.stat().st_size
        assert report[side]["parameters"] == slice_cost(load(path)).parameters
        assert report["metrics"][side]["samples"] == 500
        assert 0 <= report["metrics"][side]["accuracy"] <= 1
    assert report["metrics"]["teacher"]["accuracy"] == 0.996
    assert report["metrics"]["student"]["agreement"] > 0.3
    stages = {"load", "partition", "capture", "distil", "refit", "splice", "finetune", "quantise", "evaluate", "total"}
    assert report["seconds"].keys() == stages
    assert sum(report["seconds"][name] for name in stages - {"total"}) == pytest.approx(
        report["seconds"]["total"], rel=0.1
    )
    assert report["peak_rss_bytes"] > 10**7
    assert report["run_dir"] == str(tmp_path / "student.run")
    names = [n["name"] for n in report["neighbourhoods"]]
    assert names == sorted(names) and len(names) == 8
    for n in report["neighbourhoods"]:
        assert {"name", "candidate", "status", "nmse", "steps", "seconds", "reason"} <= n.keys()
        if n["status"] == "kept":
            assert n["reason"] and n["candidate"] is None and n["nmse"] is None and n["steps"] == 0, n
        else:
            assert n["status"] == "distilled" and n["candidate"] == "width k=0.5" and n["steps"] == 2
            assert n["reason"] is None and 0 < n["nmse"] <= n["nmse_start"] and n["seconds"] > 0
    assert sum(n["status"] == "distilled" for n in report["neighbourhoods"]) == 6
    assert sum(n["parameters"] for n in report["neighbourhoods"]) == report["student"]["parameters"]
    assert sum(n["macs"] for n in report["neighbourhoods"]) == report["student"]["macs"]
    order = [name for i, name in enumerate(recorder.stages) if recorder.stages[i - 1 : i] != [name]]
    assert order == ["load", "partition", "capture", "distil", "splice", "evaluate"]
    assert {name for name, end in recorder.ends.items() if end == "distilled"} == {f"n0{i}" for i in range(2, 8)}


def test_the_student_is_a_drop_in_for_its_teacher(bench: Bench) -> None:
    proto = onnx.load(bench.model)
    proto.metadata_props.add(key="author", value="somebody")
    onnx.save(proto, bench.model)
    result = bench.compress()
    student = onnx.load(bench.student)
    onnx.checker.check_model(student, full_check=True)
    assert list(student.graph.input) == list(proto.graph.input)
    assert list(student.graph.output) == list(proto.graph.output)
    assert list(student.opset_import) == list(proto.opset_import)
    assert student.ir_version == proto.ir_version
    assert list(student.metadata_props) == list(proto.metadata_props)
    # 3 units of two 3x3 convolutions, each with 4 of its 8 inner channels left.
    assert result.report.teacher.parameters - result.report.student.parameters == 3 * 4 * (2 * 8 * 9 + 1)
    assert sum(numpy_helper.to_array(t).size for t in student.graph.initializer) == result.report.student.parameters
    session = ort.InferenceSession(bench.student, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, inputs_of(proto, 5))
    assert logits.shape == (5, 5)
    kept = {"stem.weight", "stem.bias", "logits.weight", "logits.bias"}
    old, new = ({t.name: t for t in m.graph.initializer} for m in (proto, student))
    assert all(old[name] == new[name] for name in kept)
    assert bench.model.read_bytes() == proto.SerializeToString()


def test_the_student_can_be_saved_without_an_output(bench: Bench) -> None:
    recipe = Recipe(**SMALL)
    result = compress(bench.model, data=str(bench.data), recipe=recipe)
    assert result.student.path is None and result.report.student.bytes is None
    assert result.report.run_dir == str(bench.folder / "teacher.run")
    result.student.save(bench.folder / "later.onnx")
    assert (bench.folder / "later.onnx").read_bytes() == bench.bytes()


@pytest.mark.parametrize("make", [residual_cnn, mlp, transformer, lambda: residual_cnn(norm=True)])
def test_all_of_the_width_and_no_steps_is_the_teacher_bit_for_bit(
    tmp_path: Path, make: Callable[[], onnx.ModelProto]
) -> None:
    bench = Bench(tmp_path).put(make())
    result = bench.compress(keep=1.0, steps=0)
    assert "distilled" in statuses(result).values()
    feed = inputs_of(make(), 7, seed=3)
    for optimised in (True, False):
        answers = []
        for path in (bench.model, bench.student):
            options = ort.SessionOptions()
            if not optimised:
                options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            answers.append(b"".join(array.tobytes() for array in session.run(None, feed)))
        assert answers[0] == answers[1]
    metrics = result.report.metrics["student"]
    assert metrics.nmse == 0 and metrics.max_error == 0


def test_the_demo_at_all_of_its_width_is_the_teacher_bit_for_bit(tmp_path: Path) -> None:
    output = tmp_path / "student.onnx"
    recipe = Recipe(**(SMALL | {"keep": 1.0, "steps": 0, "samples": 64}))
    compress(demo.teacher_path(), data=str(demo.data_path("test")), output=output, recipe=recipe)
    feed = {"image": np.load(demo.data_path("test"))["image"]}
    assert (
        run(onnx.load(output), feed)["logits"].tobytes()
        == run(onnx.load(demo.teacher_path()), feed)["logits"].tobytes()
    )


# Neighbourhoods that fail


def scaled(name: str, factor: float) -> onnx.ModelProto:
    model = residual_cnn()
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), name))
    return model


def test_a_frozen_neighbourhood_is_kept_and_the_others_are_distilled(bench: Bench) -> None:
    result = bench.compress(freeze=("second2",))
    assert statuses(result) == {"n01": "kept", "n02": "distilled", "n03": "kept", "n04": "distilled", "n05": "kept"}
    (kept,) = (n for n in result.report.neighbourhoods if n.name == "n03")
    assert kept.reason == "frozen: it makes 'second2'"
    old, new = ({t.name: t for t in onnx.load(path).graph.initializer} for path in (bench.model, bench.student))
    assert old["first2.weight"] == new["first2.weight"] and old["first1.weight"] != new["first1.weight"]


def test_a_unit_whose_activations_overflow_is_kept_with_its_reason(tmp_path: Path) -> None:
    """Its own output and so the next unit's input and output are Inf; the first unit is not concerned."""
    model = scaled("second2.weight", 1e38)
    model.graph.initializer.extend([numpy_helper.from_array(np.array([1e30], np.float32), "huge")])
    (conv,) = (node for node in model.graph.node if node.output[0] == "second2")
    conv.output[0] = "before"
    place = list(model.graph.node).index(conv)
    model.graph.node.insert(place + 1, onnx.helper.make_node("Mul", ["before", "huge"], ["second2"]))
    recorder = Recorder()
    result = Bench(tmp_path).put(model).compress(progress=recorder)
    reasons = {n.name: n.reason for n in result.report.neighbourhoods}
    assert statuses(result)["n02"] == "distilled"
    assert statuses(result)["n03"] == statuses(result)["n04"] == "kept"
    assert reasons["n03"] == "the teacher's activation 'unit2' holds NaN or Inf on this data"
    assert recorder.ends == {"n02": "distilled", "n03": "kept", "n04": "kept"}
    assert json.dumps(result.report.to_json(), allow_nan=False)


def test_activations_that_overflow_when_squared_do_not_fail_the_run(tmp_path: Path) -> None:
    result = Bench(tmp_path).put(scaled("first2.weight", 1e20)).compress()
    assert statuses(result)["n02"] == "distilled" and statuses(result)["n03"] == "kept"


def test_dead_channels_do_not_fail_the_run(tmp_path: Path) -> None:
    model = residual_cnn()
    for tensor in model.graph.initializer:
        if tensor.name.startswith("first2"):
            value = np.zeros(tensor.dims, np.float32) - (tensor.name == "first2.bias")
            tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), tensor.name))
    result = Bench(tmp_path).put(model).compress()
    assert {n for n, status in statuses(result).items() if status == "distilled"} == UNITS


def test_if_every_neighbourhood_fails_the_student_is_the_teacher(bench: Bench) -> None:
    result = bench.compress(lr=1e30)
    assert set(statuses(result).values()) == {"kept"}
    assert all("lower --lr" in (n.reason or "") for n in result.report.neighbourhoods if n.name in UNITS)
    assert result.report.student.parameters == result.report.teacher.parameters
    feed = inputs_of(residual_cnn(), 5)
    answers = [run(onnx.load(path), feed)["logits"].tobytes() for path in (bench.model, bench.student)]
    assert answers[0] == answers[1]


# Teachers of one batch size


def fixed_batch(model: onnx.ModelProto, size: int) -> onnx.ModelProto:
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    del fixed.graph.value_info[:]
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = size
    return onnx.shape_inference.infer_shapes(fixed)


@pytest.mark.parametrize("size", [1, 5, 64])
def test_a_teacher_of_one_batch_size_is_distilled_as_any_other(tmp_path: Path, size: int) -> None:
    """48 samples: the last batch of 5 is not full, and not one batch of 64 is."""
    model = residual_cnn()
    free = Bench(tmp_path).put(model)
    expected = free.compress("free")
    fixed = Bench(tmp_path).put(fixed_batch(model, size), free=model)
    result = fixed.compress("fixed")
    assert statuses(result) == statuses(expected)
    for one, other in zip(result.report.neighbourhoods, expected.report.neighbourhoods, strict=True):
        assert one.nmse == other.nmse or one.nmse == pytest.approx(other.nmse, rel=1e-3)
    student = onnx.load(fixed.student)
    onnx.checker.check_model(student, full_check=True)
    assert list(student.graph.input) == list(onnx.load(fixed.model).graph.input)
    assert run(student, inputs_of(model, size))["logits"].shape == (size, 5)


# Refused before any work


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"output": "missing/student.onnx"}, RunDirError, "missing"),
        ({"output": "."}, RunDirError, "is a directory"),
        ({"output": "teacher.onnx"}, ModelError, "is the teacher itself"),
        ({"model": "nothing.onnx"}, ModelError, "no such file"),
        ({"data": "nothing.npz"}, DataError, "nothing.npz"),
        ({"eval_data": "nothing.npz"}, DataError, "nothing.npz"),
        ({"recipe": Recipe(cut=("nowhere",))}, UsageError, "nowhere"),
    ],
    ids=str,
)
def test_bad_input_fails_before_any_work(bench: Bench, change: dict[str, Any], error: type, words: str) -> None:
    recorder = Recorder()
    paths = {"model": "teacher.onnx", "data": "data.npz", "output": "student.onnx"} | change
    arguments = {key: str(bench.folder / value) if isinstance(value, str) else value for key, value in paths.items()}
    before = bench.model.read_bytes()
    with pytest.raises(error, match=words) as caught:
        compress(progress=recorder, run_dir=bench.folder / "run", **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not {"capture", "distil"} & set(recorder.stages)
    assert sorted(path.name for path in bench.folder.iterdir()) == ["data.npz", "teacher.onnx"]
    assert bench.model.read_bytes() == before


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_fails_before_any_work(bench: Bench) -> None:
    locked = bench.folder / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(RunDirError, match="cannot write there"):
        compress(bench.model, data=str(bench.data), output=locked / "student.onnx", recipe=Recipe(**SMALL))


def test_zeros_and_what_they_save_are_told(bench: Bench) -> None:
    report = bench.compress(method="sparsity", sparsity="0.7").report
    dense = bench.compress(keep=0.5).report
    assert report.teacher.zeros == 0 and report.student.parameters == report.teacher.parameters
    weights = sum(
        int(value.const_value.size) - np.count_nonzero(value.const_value.numpy())
        for value in ir.load(bench.student).graph.initializers.values()
        if value.const_value is not None
    )
    assert dense.student.zeros == weights == 0, "the second student lies under the name"
    assert 0.4 < report.student.zeros / report.student.parameters < 0.7
    assert report.student.compressed_bytes is not None and report.teacher.compressed_bytes is not None
    assert report.student.compressed_bytes < 0.75 * report.teacher.compressed_bytes
    assert dense.student.compressed_bytes is None


def test_a_student_that_fails_at_its_place_is_left_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(teacher: ir.Model, students: dict[str, ir.Model], shared: dict[str, str]) -> ir.Model:
        model = splice(teacher, students, shared)
        if "n03" in students:
            value = model.graph.initializers["first2.bias"]
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy() + np.float32(0.1), name=value.name)
        return model

    monkeypatch.setattr(assembly, "splice", careless)
    found = {n.name: n for n in bench.compress().report.neighbourhoods}
    assert found["n03"].status == "kept" and "in the spliced student" in (found["n03"].reason or "")
    assert all(found[name].status == "distilled" for name in UNITS - {"n03"})
    theirs, ours = (ir.load(path).graph.initializers for path in (bench.model, bench.student))
    np.testing.assert_array_equal(ours["first2.bias"].const_value, theirs["first2.bias"].const_value)


def test_a_whole_that_is_not_the_teachers_gets_no_name(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(teacher: ir.Model, students: dict[str, ir.Model], shared: dict[str, str]) -> ir.Model:
        model = splice(teacher, students, shared)
        model.graph.outputs[0].name = "another"
        return model

    monkeypatch.setattr(assembly, "splice", careless)
    with pytest.raises(VerificationError, match=r"the student's outputs .* are not the teacher's"):
        bench.compress()
    assert not bench.student.exists()
    assert done_markers(bench.folder / "run").keys() == UNITS, "what was trained is kept for the next run"


def test_two_samples_are_too_few_and_three_will_do(bench: Bench) -> None:
    np.savez(bench.data, **inputs_of(residual_cnn(), 2))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="holds 2 samples; at least 3 are needed"):
        bench.compress()
    np.savez(bench.data, **inputs_of(residual_cnn(), 3))  # type: ignore[arg-type]
    recorder = Recorder()
    result = bench.compress(progress=recorder, inputs="refit", finetune_steps=2)
    assert {n.status for n in result.report.neighbourhoods} == {"distilled", "kept"}
    assert result.report.metrics["student"].samples == 1
    assert any("leave 1 to compare" in note for note in recorder.notes)


def test_an_input_that_the_data_lack_is_named(bench: Bench) -> None:
    np.savez(bench.data, image=np.zeros((8, 3, 8, 8), np.float32), other=np.zeros(8, np.float32))
    with pytest.raises(DataError, match="x"):
        bench.compress()


def test_without_data_random_inputs_do(bench: Bench) -> None:
    proto = Net()
    y = proto.relu(proto.gemm(proto.input("x", "N", 10), 10, 16, out="h"))
    onnx.save(proto.proto(proto.gemm(y, 16, 4, out="y")), bench.model)
    result = compress(bench.model, data="gaussian:64", output=bench.student, recipe=Recipe(**SMALL))
    assert "distilled" in statuses(result).values()


def test_context_is_handed_to_the_student(tmp_path: Path) -> None:
    result = Bench(tmp_path).put(transformer()).compress()
    assert "distilled" in statuses(result).values()
    assert result.report.metrics["student"].nmse is not None


def test_the_report_tells_what_the_student_file_does(bench: Bench) -> None:
    result = bench.compress()
    source = open_source(str(bench.data), input_specs(make_session(bench.model)), DataRecipe())
    unseen = draw(source, 48, seed=0, holdout=0.05)
    data: Array = np.load(bench.data)["x"][unseen.comparison]
    assert len(data) == result.report.metrics["student"].samples == 4
    answers = [run(onnx.load(path), {"x": data})["logits"].astype(np.float64) for path in (bench.model, bench.student)]
    expected = np.square(answers[1] - answers[0]).mean() / answers[0].var()
    assert result.report.metrics["student"].nmse == pytest.approx(expected, rel=1e-3)
    assert result.report.metrics["student"].max_error == pytest.approx(np.abs(answers[1] - answers[0]).max(), rel=1e-3)
    assert result.report.metrics["teacher"].nmse is None
    assert asdict(result.report)["student"]["path"] == str(bench.student)
    assert ir.load(bench.student).graph.name == ir.load(bench.model).graph.name
