"""What students learn on, how far they look, and what is done to them together: every mode from end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from ndonnx.api.compress import CompressResult, compress
from ndonnx.config.recipe import Recipe
from ndonnx.errors import RecipeError
from tests.helpers.models import Array, Net, inputs_of, mlp, residual_cnn, run
from tests.helpers.runs import LEARNING, Recorder

SETTINGS = LEARNING | {"steps": 20}

pytestmark = pytest.mark.usefixtures("one_core")


def go(
    folder: Path, model: onnx.ModelProto, name: str = "student", samples: int = 128, **options: Any
) -> CompressResult:
    teacher, data = folder / "teacher.onnx", folder / "data.npz"
    if not teacher.exists():
        onnx.save(model, teacher)
        arrays: dict[str, Array] = inputs_of(model, samples)
        np.savez(data, label=np.arange(samples) % 5, **arrays)  # type: ignore[arg-type]
    progress = options.pop("progress", None)
    return compress(
        teacher,
        data=str(data),
        recipe=Recipe(**(SETTINGS | options)),
        output=folder / f"{name}.onnx",
        run_dir=folder / f"{name}.run",
        progress=progress,
    )


def error(folder: Path, name: str) -> float:
    """Mean squared error of a student's logits on new inputs."""
    fresh = inputs_of(onnx.load(folder / "teacher.onnx"), 100, seed=7)
    teacher, student = (run(onnx.load(folder / f"{n}.onnx"), fresh)["logits"] for n in ("teacher", name))
    return float(np.square(teacher - student).mean())


@pytest.mark.slow
def test_every_way_to_learn_beats_cutting_channels_alone(tmp_path: Path) -> None:
    go(tmp_path, residual_cnn(4), "cut", steps=0, init="teacher")
    students = set()
    for mode in ("teacher", "refit", "student"):
        result = go(tmp_path, residual_cnn(4), f"by-{mode}", inputs=mode)
        assert [n.status for n in result.report.neighbourhoods].count("distilled") == 4
        assert error(tmp_path, f"by-{mode}") < 0.5 * error(tmp_path, "cut")
        students.add((tmp_path / f"by-{mode}.onnx").read_bytes())
    assert len(students) == 3


def test_students_are_trained_apart_where_a_fine_tuning_follows_and_in_order_where_not(tmp_path: Path) -> None:
    def bytes_of(name: str, **options: object) -> bytes:
        go(tmp_path, residual_cnn(), name, **options)
        return (tmp_path / f"{name}.onnx").read_bytes()

    assert bytes_of("a", inputs=None) == bytes_of("b", inputs="student")
    tuned, walked = Recorder(), Recorder()
    go(tmp_path, residual_cnn(), "c", inputs=None, finetune_steps=3, progress=tuned)
    go(tmp_path, residual_cnn(), "d", inputs="refit", finetune_steps=3, progress=walked)
    assert [stage for stage in tuned.stages if stage in ("refit", "finetune")] == ["refit", "finetune"]
    assert tuned.stages == walked.stages and (tmp_path / "c.onnx").read_bytes() == (tmp_path / "d.onnx").read_bytes()
    apart = Recorder()
    go(tmp_path, residual_cnn(), "e", inputs="teacher", finetune_steps=3, progress=apart)
    assert "refit" not in apart.stages and "finetune" in apart.stages


@pytest.mark.parametrize("mode", ["refit", "student"])
def test_a_second_run_repeats_the_bytes_and_trains_nothing(tmp_path: Path, mode: str) -> None:
    go(tmp_path, residual_cnn(), inputs=mode, finetune_steps=5)
    first = (tmp_path / "student.onnx").read_bytes()
    recorder = Recorder()
    again = go(tmp_path, residual_cnn(), inputs=mode, finetune_steps=5, progress=recorder)
    assert {n.status for n in again.report.neighbourhoods} == {"reused", "kept"}
    assert not {"capture", "distil", "refit", "answers", "finetune"}.intersection(recorder.stages)
    assert (tmp_path / "student.onnx").read_bytes() == first


def test_a_chain_continues_behind_what_is_done(tmp_path: Path) -> None:
    """Each student depends on all before it: those before a missing one are re-used, the rest is made again."""
    go(tmp_path, residual_cnn(), inputs="student")
    first = (tmp_path / "student.onnx").read_bytes()
    (gone,) = (tmp_path / "student.run").glob("students/n03-*/done.json")
    gone.unlink()
    again = go(tmp_path, residual_cnn(), inputs="student")
    ends = {n.name: n.status for n in again.report.neighbourhoods}
    assert (ends["n02"], ends["n03"], ends["n04"]) == ("reused", "distilled", "reused")
    assert (tmp_path / "student.onnx").read_bytes() == first
    assert not (tmp_path / "student.run" / "prefix").exists()


def test_looking_ahead_is_another_student_and_says_so(tmp_path: Path) -> None:
    go(tmp_path, residual_cnn(), "plain")
    result = go(tmp_path, residual_cnn(), "ahead", look_ahead=2)
    candidates = {n.name: n.candidate for n in result.report.neighbourhoods if n.candidate}
    assert candidates == {
        "n02": "width k=0.5, look-ahead 2",
        "n03": "width k=0.5, look-ahead 2",
        "n04": "width k=0.5, look-ahead 1",  # the last slice leads to the teacher's output
    }
    assert (tmp_path / "plain.onnx").read_bytes() != (tmp_path / "ahead.onnx").read_bytes()
    assert error(tmp_path, "ahead") < 1.2 * error(tmp_path, "plain")


def unknown_tail() -> onnx.ModelProto:
    """A residual network whose classifier has an operator that does not convert."""
    net = Net()
    x = net.relu(net.conv(net.input("x", "N", 3, 8, 8), 3, 8, out="stem"))
    for unit in ("unit1", "unit2"):
        y = net.conv(net.relu(net.conv(x, 8, 8)), 8, 8)
        x = net.relu(net.op("Add", y, x), out=unit)
    columns = net.op("Reshape", x, net.ints(-1, 8, 64))
    image = net.op("Col2Im", columns, net.ints(8, 8), net.ints(1, 1))
    return net.proto(net.pooled_classifier(image, 8))


def test_looking_ahead_ends_before_what_does_not_convert(tmp_path: Path) -> None:
    result = go(tmp_path, unknown_tail(), look_ahead=2, steps=2)
    candidates = {n.name: n.candidate for n in result.report.neighbourhoods if n.candidate}
    assert list(candidates.values()) == ["width k=0.5, look-ahead 1", "width k=0.5"]


def test_looking_ahead_ends_before_several_outputs(tmp_path: Path) -> None:
    model = residual_cnn()
    model.graph.output.append(onnx.helper.make_tensor_value_info("unit3", onnx.TensorProto.FLOAT, ["N", 8, 8, 8]))
    result = go(tmp_path, model, look_ahead=2, steps=2)
    candidates = [n.candidate for n in result.report.neighbourhoods if n.candidate]
    assert candidates[-1] == "width k=0.5" and candidates[0].endswith("look-ahead 2")


def test_where_nothing_can_be_fine_tuned_students_are_trained_in_order(tmp_path: Path) -> None:
    model = residual_cnn()
    model.graph.node.append(onnx.helper.make_node("ArgMax", ["logits"], ["class"], axis=1, keepdims=0))
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("class", onnx.TensorProto.INT64, ["N"]))
    result = go(tmp_path, model, inputs=None, finetune_steps=5)
    assert result.report.finetune is not None
    assert "no output ('class') is a tensor of floating-point numbers" in (result.report.finetune.reason or "")
    go(tmp_path, model, "ordered", inputs="student")
    assert (tmp_path / "student.onnx").read_bytes() == (tmp_path / "ordered.onnx").read_bytes()


def test_noise_at_each_neighbourhood_does_not_look_ahead(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="look_ahead: noise"):
        go(tmp_path, residual_cnn(), inputs="noise", look_ahead=1)


def test_noise_at_each_neighbourhood_trains_them_without_data(tmp_path: Path) -> None:
    """Its error is small on noise; what that is worth on data is for a benchmark to say."""
    result = go(tmp_path, residual_cnn(), inputs="noise")
    trained = [n for n in result.report.neighbourhoods if n.status == "distilled"]
    assert len(trained) == 3
    assert all(n.nmse is not None and n.nmse_start is not None and n.nmse <= n.nmse_start < 0.5 for n in trained)
    assert not (tmp_path / "student.run" / "noise").exists()


def test_look_ahead_weights_are_one_for_each(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="1 given for --look-ahead 2"):
        go(tmp_path, residual_cnn(), look_ahead=2, look_ahead_weights=(0.5,))
    weighted = go(tmp_path, residual_cnn(), "none", look_ahead=1, look_ahead_weights=(0.0,), steps=5)
    plain = go(tmp_path, residual_cnn(), "plain", steps=5)
    for one, other in zip(weighted.report.neighbourhoods, plain.report.neighbourhoods, strict=True):
        assert one.nmse == pytest.approx(other.nmse)


def test_fine_tuning_brings_the_whole_nearer_to_the_teacher(tmp_path: Path) -> None:
    go(tmp_path, residual_cnn(), "plain", steps=0)
    result = go(tmp_path, residual_cnn(), "tuned", steps=0, finetune_steps=100, finetune_lr=0.005)
    tuned = result.report.finetune
    assert tuned is not None and tuned.reason is None and tuned.steps == 100
    assert tuned.loss is not None and tuned.loss_start is not None and tuned.loss < tuned.loss_start
    assert error(tmp_path, "tuned") < error(tmp_path, "plain")
    assert not (tmp_path / "tuned.run" / "finetune").exists()


def test_fine_tuning_leaves_alone_what_is_outside_the_neighbourhoods(tmp_path: Path) -> None:
    go(tmp_path, residual_cnn(), steps=0, finetune_steps=10)
    teacher, student = (
        {w.name: w for w in onnx.load(tmp_path / f"{name}.onnx").graph.initializer} for name in ("teacher", "student")
    )
    inner = {name for name in teacher if name.startswith(("first", "second"))}
    outside = teacher.keys() - inner
    assert len(outside) >= 4 and inner
    assert all(teacher[name] == student[name] for name in outside)
    assert not any(teacher[name] == student.get(name) for name in inner)


def test_labels_of_the_data_are_used_when_asked_for(tmp_path: Path) -> None:
    go(tmp_path, residual_cnn(), "plain", steps=0, finetune_steps=10)
    go(tmp_path, residual_cnn(), "labelled", steps=0, finetune_steps=10, label_weight=0.5)
    with np.load(tmp_path / "data.npz") as data:
        feed, labels = {"x": data["x"]}, data["label"]
    plain, labelled = (run(onnx.load(tmp_path / f"{name}.onnx"), feed)["logits"] for name in ("plain", "labelled"))
    assert of_labels(labelled, labels) < of_labels(plain, labels) - 0.01


def of_labels(logits: Array, labels: Array) -> float:
    """Mean cross-entropy of the labels."""
    shifted = logits - logits.max(-1, keepdims=True)
    scores = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return float(-scores[np.arange(len(labels)), labels].mean())


def test_a_model_that_does_not_train_as_a_whole_keeps_its_distilled_student(tmp_path: Path) -> None:
    recorder = Recorder()
    result = go(tmp_path, unknown_tail(), finetune_steps=5, progress=recorder)
    assert result.report.finetune is not None and "Col2Im" in (result.report.finetune.reason or "")
    assert any("not fine-tuned" in note and "Col2Im" in note for note in recorder.notes)
    go(tmp_path, unknown_tail(), "distilled", finetune_steps=0)
    assert (tmp_path / "student.onnx").read_bytes() == (tmp_path / "distilled.onnx").read_bytes()


def test_data_free_needs_no_data(tmp_path: Path) -> None:
    onnx.save(mlp(), tmp_path / "teacher.onnx")
    recipe = Recipe(**(SETTINGS | {"data_free": True, "samples": 64, "steps": 2}))
    result = compress(tmp_path / "teacher.onnx", recipe=recipe, output=tmp_path / "student.onnx")
    assert any(n.status == "distilled" for n in result.report.neighbourhoods)


def test_a_time_budget_ends_what_steps_alone_would_not(tmp_path: Path) -> None:
    result = go(tmp_path, residual_cnn(), time_budget=4, steps=10**6, finetune_steps=None)
    tuned = result.report.finetune
    assert tuned is not None and tuned.reason is None and 0 < tuned.steps < 10**6
    assert all(0 < n.steps < 10**6 for n in result.report.neighbourhoods if n.status == "distilled")


def test_a_time_budget_goes_to_the_parts_where_the_whole_cannot_be_trained(tmp_path: Path) -> None:
    recorder = Recorder()
    result = go(tmp_path, unknown_tail(), time_budget=4, steps=10**6, finetune_steps=None, progress=recorder)
    assert any("will not be fine-tuned" in note and "Col2Im" in note for note in recorder.notes)
    seconds = result.report.seconds.distil
    assert seconds > 0.4 * 4, "a tenth is what they get where a fine-tuning follows"
