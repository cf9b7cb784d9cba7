"""A task and a metric of the pages that tell how to add one: through recipe, command, Python, report and search."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import ndonnx
from ndonnx.distill.tasks import kinds
from ndonnx.distill.tasks import registry as task_registry
from ndonnx.distill.tasks.base import REGISTERED as TASKS
from ndonnx.distill.tasks.outputs import tasks_of
from ndonnx.metrics import named
from ndonnx.metrics import registry as metric_registry
from ndonnx.metrics.metric import REGISTERED as METRICS
from ndonnx_cli.main import main
from tests.helpers.models import Net, inputs_of

DOCS = Path(__file__).parents[2] / "docs"
FLAGS = ["--data", "data.npz", "--steps", "2", "--finetune-steps", "4", "--samples", "64", "--executor", "serial", "-q"]
SHORT: dict[str, Any] = {"steps": 2, "finetune_steps": 4, "samples": 64, "executor": "serial"}


def code_of(page: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    return code


def added(page: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Import the code of a page as a module of this name."""
    (folder / f"{name}.py").write_text(code_of(page), encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.import_module(name)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a teacher of two outputs, its data, and the task and the metric of the pages."""
    net = Net()
    x = net.relu(net.gemm(net.input("x", "N", 6), 6, 16))
    model = net.proto(net.op("Identity", net.gemm(x, 16, 3), out="angles"))
    onnx.save(model, tmp_path / "teacher.onnx")
    np.savez(tmp_path / "data.npz", **inputs_of(model, 80))
    monkeypatch.chdir(tmp_path)
    added("adding-a-task.md", "docs_angles", tmp_path, monkeypatch)
    added("adding-a-metric.md", "docs_close", tmp_path, monkeypatch)
    yield tmp_path
    TASKS.pop("angles", None)
    METRICS.pop("close", None)


@pytest.mark.parametrize("page", ["adding-a-task.md", "adding-a-metric.md"])
def test_pages_are_short(page: str) -> None:
    assert len((DOCS / page).read_text(encoding="utf-8").splitlines()) < 50


def test_both_are_keys_of_a_recipe_flags_and_python(folder: Path) -> None:
    result = ndonnx.compress(
        "teacher.onnx", data="data.npz", task="angles", metric="close", output="python.onnx", **SHORT
    )
    (told,) = result.report.metrics["student"].outputs.values()
    assert told.task == "angles" and told.interval is not None and told.loss == told.distances["angle"]
    low, high = told.interval
    assert 0 < low <= told.distances["angle"] <= high < np.pi
    metric = result.report.metrics["student"].metric
    assert metric is not None and 0 <= metric < 1 == result.report.metrics["teacher"].metric
    (folder / "recipe.toml").write_text('task = "angles"\nmetric = "close"\n', encoding="utf-8")
    assert main(["compress", "teacher.onnx", "--recipe", "recipe.toml", *FLAGS, "-o", "recipe.onnx"]) == 0
    flags = ["--task", "angles=angles", "--metric", "close"]
    assert main(["compress", "teacher.onnx", *flags, *FLAGS, "-o", "flags.onnx"]) == 0
    python = (folder / "python.onnx").read_bytes()
    assert (folder / "recipe.onnx").read_bytes() == python == (folder / "flags.onnx").read_bytes()


def test_the_loss_of_a_task_is_what_is_trained(folder: Path) -> None:
    """Whole turns in what is learnt leave its loss alone, and not the one of numbers."""
    told = {
        task: ndonnx.compress("teacher.onnx", data="data.npz", task=task, run_dir=f"{task}.run", **SHORT).report
        for task in ("angles", "regression")
    }
    losses = {task: report.finetune.loss_start for task, report in told.items() if report.finetune is not None}
    assert losses["angles"] is not None and losses["angles"] != losses["regression"]
    assert {task: report.task["angles"] for task, report in told.items()} == {
        "angles": "angles", "regression": "regression"
    }  # fmt: skip


def test_a_report_tells_both(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "teacher.onnx", "--metric", "close", *FLAGS, "-o", "s.onnx", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    found = document["metrics"]["student"]["outputs"]["angles"]
    assert found["task"] == "angles", "its name says what it is, so nobody had to"
    assert main(["report", "s.run", "-q"]) == 0
    for name in ("report.html", "report.md"):
        page = next((folder / "s.run").rglob(name)).read_text(encoding="utf-8")
        assert "angle" in page and "own metric" in page
    assert main(["report", "s.run", "-q"]) == 0


def test_both_are_asked_of_any_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate = ["evaluate", "teacher.onnx", "--data", "data.npz", "--teacher", "teacher.onnx", "-q"]
    assert main([*evaluate, "--metric", "close", "--require", "angle<=0", "--require", "metric>=1"]) == 0
    assert "'angles': angle" in capsys.readouterr().out
    assert main([*evaluate, "--require", "turn<=0"]) == 2
    assert "unknown metric 'turn'" in capsys.readouterr().err


def test_a_search_goes_on_whatever_its_outputs_mean(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = '[search]\nsteps = 2\nsamples = 10\ncandidates = ["width 0.5"]\n'
    (folder / "recipe.toml").write_text('task = "angles"\n' + table, encoding="utf-8")
    asked = ["--recipe", "recipe.toml", "--target", "params=0.8", "--json", "-o", "s.onnx"]
    assert main(["compress", "teacher.onnx", *asked, *FLAGS]) in (0, 3)
    document = json.loads(capsys.readouterr().out)
    assert document["target"]["reached"] and document["task"] == {"angles": "angles"}


def test_what_is_not_known_is_told_with_what_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, known in ((["--task", "boxes"], "angles, classification"), (["--metric", "f1"], "close, top5")):
        assert main(["compress", "teacher.onnx", *flags, *FLAGS, "-o", "s.onnx"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert known in line and "module:function" in line
    assert not (folder / "s.run").exists()


def test_files_among_those_that_ship_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, name, page in ((kinds, "angles", "adding-a-task.md"), (named, "close", "adding-a-metric.md")):
        place = tmp_path / name
        place.mkdir()
        (place / f"{name}.py").write_text(code_of(page), encoding="utf-8")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(place)])
    try:
        assert "angles" in task_registry.kind_names() and "close" in metric_registry.metric_names()
        values = np.zeros((9, 3), np.float32)
        assert str(tasks_of({"angle": values}, 9)["angle"]) == "angles"
        assert metric_registry.metric_of("close")({"y": values}, {"y": values}, None) == 1
    finally:
        TASKS.pop("angles", None)
        METRICS.pop("close", None)
        for package, name in ((kinds, "angles"), (named, "close")):
            sys.modules.pop(f"{package.__name__}.{name}", None)


def test_top5_counts_the_class_among_five(tmp_path: Path) -> None:
    scores = np.eye(7, dtype=np.float32)[:1].repeat(7, axis=0) + np.linspace(0, 0.7, 7, dtype=np.float32)
    wanted = np.arange(7)
    found = metric_registry.metric_of("top5")({"logits": scores}, {"logits": scores}, wanted)
    assert found == pytest.approx(5 / 7)
    assert metric_registry.metric_of("top5")({"logits": scores}, {"logits": scores}, None) == 1
