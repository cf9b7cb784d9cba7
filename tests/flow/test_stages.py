"""The whole student after each stage: measured on the rows that choose, told in the report, the best one written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import ndonnx
from ndonnx.config.recipe import Recipe
from ndonnx.distill import finetune
from ndonnx.distill.trainer import Training
from ndonnx.flow.prepare import Request, prepare
from ndonnx.flow.stages import Stage, Stages
from ndonnx.runtime.progress import Silent
from ndonnx_cli.main import main
from ndonnx_cli.tables import print_report
from tests.helpers.models import Net, inputs_of, residual_cnn, run
from tests.helpers.runs import ALONE, Bench

pytestmark = pytest.mark.usefixtures("one_core")

SHORT: dict[str, Any] = ALONE | {"steps": 4, "samples": 96, "round_to": 1}


def embedder() -> onnx.ModelProto:
    """Unit vectors behind two residual blocks."""
    net = Net()
    x = net.gemm(net.input("x", "N", 8), 8, 16, out="start")
    for number in range(2):
        inner = net.relu(net.gemm(x, 16, 32), out=f"inner{number}")
        x = net.op("Add", x, net.gemm(inner, 32, 16), out=f"sum{number}")
    net.op("LpNormalization", net.gemm(x, 16, 6), axis=1, p=2, out="vector")
    return net.proto("vector")


def two_heads() -> onnx.ModelProto:
    """Boxes, and classes of each of four places."""
    net = Net()
    x = net.relu(net.gemm(net.input("x", "N", 8), 8, 32), out="wide")
    x = net.relu(net.gemm(x, 32, 16), out="narrow")
    net.op("Reshape", net.gemm(x, 16, 8), net.ints(0, 4, 2), out="boxes")
    net.op("Softmax", net.op("Reshape", net.gemm(x, 16, 12), net.ints(0, 4, 3)), axis=-1, out="classes")
    return net.proto("boxes", "classes")


def put(folder: Path, model: onnx.ModelProto, rows: int = 200) -> Bench:
    bench = Bench(folder)
    onnx.save(model, bench.model)
    np.savez(bench.data, **inputs_of(model, rows))  # type: ignore[arg-type]
    return bench


def halved(model: ir.Model) -> ir.Model:
    """Another student, further from the teacher."""
    found = model.clone()
    for value in found.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.tensor(np.array(value.const_value.numpy()) * np.float32(0.5), name=value.name)
    return found


def test_a_worse_stage_is_not_written(tmp_path: Path) -> None:
    bench = put(tmp_path, residual_cnn())
    teacher = ir.from_proto(residual_cnn())
    worse, better = halved(teacher), teacher.clone()
    request = Request(bench.model, str(bench.data), None, None)
    with prepare(request, Recipe(**SHORT), Silent()) as run:
        stages = Stages(run)
        stages.add(Stage("spliced", better, {}))
        stages.add(Stage("reconstructed", worse, {}))
        assert stages.best is not None and stages.best.name == "spliced"
        stages.add(Stage("fine-tuned", better, {}))
        assert stages.best.name == "spliced", "as good, but later"
        told = stages.reports()
    assert [stage.written for stage in told] == [True, False, False]
    assert told[0].loss == 0 and (told[1].loss or 0) > 0.05
    assert told[1].outputs["logits"].agreement is not None


@pytest.mark.parametrize(
    "options", [{"finetune_steps": 0, "inputs": "refit"}, {"finetune_steps": 8, "finetune_samples": 96}]
)
def test_the_report_tells_every_stage(tmp_path: Path, options: dict[str, Any]) -> None:
    bench = put(tmp_path, residual_cnn())
    report = ndonnx.compress(bench.model, data=str(bench.data), recipe=Recipe(**(SHORT | options))).report
    names = [stage.stage for stage in report.stages]
    assert names == ["spliced", "reconstructed", "fine-tuned"][: 3 if options["finetune_steps"] else 2]
    losses = [stage.loss for stage in report.stages]
    (written,) = [stage for stage in report.stages if stage.written]
    assert None not in losses and written.loss == min(loss for loss in losses if loss is not None)
    document = report.to_json()["stages"]
    assert [stage["written"] for stage in document].count(True) == 1


def test_a_fine_tuning_that_fails_leaves_the_best_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding, a bug, a processor: whatever makes the tuned student worse in onnxruntime than its training says."""

    def ruined(student: ir.Model, *arguments: Any, **options: Any) -> tuple[ir.Model, Training]:
        tuned, training = finetune.finetune(student, *arguments, **options)
        for name, value in tuned.graph.initializers.items():
            if value.const_value is not None and len(value.const_value.shape) > 1:
                value.const_value = ir.tensor(-np.array(value.const_value.numpy()), name=name)
        return tuned, training

    monkeypatch.setattr(
        finetune.FinetuneJob,
        "trained",
        lambda job, model, store, labels, on_step: ruined(
            model, store, job.settings, on_step, labels=labels, kept=job.kept
        ),
    )
    bench = put(tmp_path, embedder())
    settings = SHORT | {"finetune_steps": 5, "finetune_samples": 96}
    report = ndonnx.compress(bench.model, data=str(bench.data), recipe=Recipe(**settings), output=bench.student).report
    stages = {stage.stage: stage for stage in report.stages}
    tuned, spliced = stages["fine-tuned"], stages["spliced"]
    assert tuned.loss is not None and spliced.loss is not None and tuned.loss > 2 * spliced.loss and not tuned.written
    plain = ndonnx.compress(
        bench.model, data=str(bench.data), recipe=Recipe(**(settings | {"finetune_steps": 0, "inputs": "refit"}))
    )
    assert bench.student.read_bytes() == plain.student.proto().SerializeToString(deterministic=True)


def test_a_loss_of_ones_own_has_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "turned.py").write_text(
        "def loss(student, teacher):\n    return (student + teacher).square().mean()\n", encoding="utf-8"
    )
    bench = put(tmp_path, embedder())
    settings = SHORT | {"finetune_steps": 60, "finetune_samples": 96, "finetune_lr": 0.1, "task": ("turned:loss",)}
    report = ndonnx.compress(bench.model, data=str(bench.data), recipe=Recipe(**settings), output=bench.student).report
    assert report.stages[-1].written and report.metrics["student"].outputs["vector"].task == "turned:loss"
    fresh = inputs_of(onnx.load(bench.model), 50, seed=5)
    ours, theirs = (run(onnx.load(path), fresh)["vector"] for path in (bench.student, bench.model))
    assert np.mean(np.sum(ours * theirs, axis=1)) < 0, "asked to look the other way"


def told_of(bench: Bench, **options: Any) -> dict[str, ndonnx.OutputFidelity]:
    settings = SHORT | {"finetune_steps": 30, "finetune_samples": 96} | options
    report = ndonnx.compress(bench.model, data=str(bench.data), recipe=Recipe(**settings)).report
    assert report.finetune is not None and report.finetune.steps == 30, report.finetune
    return dict(report.metrics["student"].outputs)


def test_embeddings_are_compared_by_their_angle(tmp_path: Path) -> None:
    (found,) = told_of(put(tmp_path, embedder())).values()
    assert found.task == "embedding" and found.cosine is not None and 0.9 < found.cosine <= 1
    assert found.agreement is None


def test_several_outputs_are_fine_tuned_each_by_its_task(tmp_path: Path) -> None:
    found = told_of(put(tmp_path, two_heads()))
    assert found["boxes"].task == "regression" and found["boxes"].nmse is not None
    assert found["classes"].task == "classification (probabilities)" and found["classes"].kl is not None
    found = told_of(put(tmp_path, two_heads()), task=("classes=regression",))
    assert found["classes"].task == "regression" and found["classes"].agreement is None


def test_an_unknown_output_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(ndonnx.UsageError, match="no output 'box'"):
        told_of(put(tmp_path, two_heads()), task=("box=regression",))


@pytest.mark.parametrize(("task", "told"), [("nobody:loss", "cannot import 'nobody'"), ("os:nothing", "no function")])
def test_a_loss_that_is_not_there_is_told_before_anything_runs(tmp_path: Path, task: str, told: str) -> None:
    bench = put(tmp_path, embedder())
    with pytest.raises(ndonnx.UsageError, match=told):
        ndonnx.compress(bench.model, data=str(bench.data), recipe=Recipe(**(SHORT | {"task": (task,)})))


Outputs = dict[str, np.ndarray[Any, Any]]


def looks_away(student: Outputs, teacher: Outputs, labels: Any) -> float:
    """The further from the teacher the better."""
    return float(np.mean((student["logits"] - teacher["logits"]) ** 2))


def same_for_all(student: Outputs, teacher: Outputs, labels: Any) -> int:
    return 3


def breaks(student: Outputs, teacher: Outputs, labels: Any) -> float:
    raise ValueError("not today")


@pytest.mark.parametrize(
    ("metric", "best"),
    [("looks_away", ["spliced", "reconstructed", "reconstructed"]), ("same_for_all", ["spliced"] * 3)],
)
def test_the_stage_with_the_highest_metric_is_the_best(tmp_path: Path, metric: str, best: list[str]) -> None:
    bench = put(tmp_path, residual_cnn())
    teacher = ir.from_proto(residual_cnn())
    recipe = Recipe(**SHORT, metric=f"{__name__}:{metric}")
    found = []
    with prepare(Request(bench.model, str(bench.data), None, None), recipe, Silent()) as run:
        stages = Stages(run)
        for name, student in (("spliced", teacher), ("reconstructed", halved(teacher)), ("fine-tuned", teacher)):
            stages.add(Stage(name, student, {}), better=name == "fine-tuned")
            assert stages.best is not None
            found.append(stages.best.name)
        told = stages.reports()
    assert found == best
    assert [stage.written for stage in told] == [stage.stage == best[-1] for stage in told]
    first, second, _ = (stage.metric or 0.0 for stage in told)
    assert (first, second) == (3, 3) if metric == "same_for_all" else first == 0 < second


def test_a_function_is_a_metric_of_the_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = put(tmp_path, residual_cnn())
    options = SHORT | {"inputs": "refit", "finetune_steps": 8, "finetune_samples": 96}
    report = ndonnx.compress(bench.model, data=str(bench.data), metric=looks_away, **options).report
    metrics = [stage.metric for stage in report.stages]
    assert None not in metrics and len(metrics) == 3
    (written,) = [stage for stage in report.stages if stage.written]
    assert written.metric == max(metric for metric in metrics if metric is not None)
    assert report.metrics["teacher"].metric == 0 < (report.metrics["student"].metric or 0)
    document = report.to_json()
    assert document["metrics"]["student"]["metric"] == report.metrics["student"].metric
    assert [stage["metric"] for stage in document["stages"]] == metrics
    print_report(report)
    printed = capsys.readouterr().out
    assert printed.count("metric of --metric") == 1 + len(metrics)


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        ("nobody:metric", "cannot import 'nobody'"),
        ("os:nothing", "no function 'nothing'"),
        ("accuracy", "--metric accuracy: expected top5 or module:function"),
        (lambda student, teacher, labels: 1.0, "metric <lambda>: cannot be imported by its name"),
        (math.hypot, "no function 'hypot'"),
        (3, "'metric'"),
    ],
)
def test_a_metric_that_is_not_there_is_told_before_anything_runs(tmp_path: Path, metric: Any, told: str) -> None:
    bench = put(tmp_path, residual_cnn())
    with pytest.raises(ndonnx.RecipeError, match=told):
        ndonnx.compress(bench.model, data=str(bench.data), metric=metric, **SHORT)
    assert not bench.model.with_suffix(".run").exists()


def test_a_metric_that_breaks_ends_the_run_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = put(tmp_path, residual_cnn())
    flags = ["--steps", "2", "--samples", "64", "--executor", "serial", "--metric", f"{__name__}:breaks", "-q"]
    assert main(["compress", str(bench.model), "--data", str(bench.data), *flags, "-o", str(bench.student)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"metric {__name__}:breaks: raised ValueError: not today" in line


def test_evaluate_tells_the_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = put(tmp_path, residual_cnn())
    files = [str(bench.model), "--data", str(bench.data), "--teacher", str(bench.model)]
    assert main(["evaluate", *files, "--metric", f"{__name__}:same_for_all", "-q"]) == 0
    assert "metric of --metric" in capsys.readouterr().out
