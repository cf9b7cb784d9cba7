"""Students in 8 bits from end to end: smaller, near, the same again, and told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import ndonnx
from ndonnx.convert import Grid, write_back
from ndonnx.demo import teacher_path
from ndonnx.flow.finish import Finish
from ndonnx.flow.quantise_trials import Trials
from ndonnx.report import FinetuneReport
from ndonnx_cli.main import main
from tests.helpers.models import Net
from tests.helpers.runs import Bench, Recorder

pytestmark = pytest.mark.usefixtures("one_core")

ALONE: dict[str, Any] = {"keep": 1.0, "steps": 0, "bits": 8}


def demo() -> tuple[str, str, str]:
    folder = teacher_path().parent
    return str(folder / "teacher.onnx"), str(folder / "train.npz"), str(folder / "test.npz")


def wide(**options: int) -> onnx.ModelProto:
    """Two layers that are large enough for 8 bits to make them smaller."""
    net = Net()
    x = net.relu(net.conv(net.input("x", "N", 8, 12, 12), 8, 32))
    net.conv(x, 32, 32, out="y")
    return net.proto("y", **options)


def test_the_demo_in_8_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, train, test = demo()
    student = tmp_path / "student.onnx"
    words = ["--data", train, "--eval", test, "--steps", "4", "--finetune-steps", "0", "--bits", "8", "--json"]
    assert main(["compress", teacher, *words, "-o", str(student), "-q"]) == 0
    report = json.loads(capsys.readouterr().out)
    stages = {stage["stage"]: stage for stage in report["stages"]}
    assert stages["quantised"]["written"] and sum(stage["written"] for stage in stages.values()) == 1
    found = report["quantised"]
    assert found["bits"] == 8 and found["reason"] is None and found["quantised_nodes"] > found["float_nodes"]
    assert report["student"]["parameters"] > 0.4 * report["teacher"]["parameters"], "integers are weights too"
    assert found["size"] < 0.7 and report["student"]["bytes"] == student.stat().st_size
    model, before = onnx.load(student), onnx.load(teacher)
    assert [value.SerializeToString() for value in model.graph.input] == [
        value.SerializeToString() for value in before.graph.input
    ]
    assert [value.name for value in model.graph.output] == [value.name for value in before.graph.output]
    assert [entry.version for entry in model.opset_import] == [entry.version for entry in before.opset_import]

    assert main(["evaluate", str(student), "--data", test, "--teacher", teacher, "--json", "-q"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["metrics"]["agreement"] == pytest.approx(report["metrics"]["student"]["agreement"])
    assert main(["inspect", str(student), "--json", "-q"]) == 0
    capsys.readouterr()
    assert main(["benchmark", str(student), "--against", teacher, "--data", test, "--processes", "2", "-q"]) == 0


def test_the_teacher_itself_in_8_bits(tmp_path: Path) -> None:
    teacher, train, test = demo()
    student = tmp_path / "student.onnx"
    found = ndonnx.compress(teacher, data=train, eval_data=test, output=student, recipe=ndonnx.Recipe(**ALONE)).report
    assert not found.unchanged and [stage.stage for stage in found.stages] == ["teacher", "quantised"]
    assert found.metrics["student"].agreement is not None and found.metrics["student"].agreement > 0.97
    assert student.stat().st_size < 0.5 * Path(teacher).stat().st_size


def test_a_continued_run_takes_no_second_measurement(tmp_path: Path) -> None:
    bench = Bench(tmp_path).put(wide(), 64)
    first = bench.compress(**ALONE)
    bytes_ = bench.student.read_bytes()
    bench.student.unlink()
    recorder = Recorder()
    again = bench.compress(progress=recorder, **ALONE)
    assert bench.student.read_bytes() == bytes_ and again.report.quantised == first.report.quantised
    assert "calibrate" not in recorder.stages


def test_an_old_opset_is_raised_and_told(tmp_path: Path) -> None:
    bench, recorder = Bench(tmp_path).put(wide(opset=11, ir_version=6), 64), Recorder()
    report = bench.compress(progress=recorder, **ALONE).report
    assert report.quantised is not None and report.quantised.opset == 13
    assert any("opset 13" in note for note in recorder.notes)
    assert onnx.load(bench.student).opset_import[0].version == 13


def test_a_metric_of_ones_own_decides(tmp_path: Path) -> None:
    bench = Bench(tmp_path).put(wide(), 64)
    report = bench.compress(metric="tests.flow.test_quantised:nearness", **ALONE).report
    assert report.quantised is not None and report.quantised.loss is not None
    assert report.stages[-1].metric is not None and report.stages[0].metric == 0.0
    assert report.quantised.loss == pytest.approx(-report.stages[-1].metric, abs=1e-6)


def nearness(student: dict[str, np.ndarray], teacher: dict[str, np.ndarray], labels: object) -> float:
    return -float(sum(np.mean((student[name] - teacher[name]) ** 2) for name in teacher))


def test_nothing_to_quantise_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = Net()
    net.op("Softmax", net.relu(net.input("x", "N", 8)), axis=-1, out="y")
    bench = Bench(tmp_path).put(net.proto("y"), 48)
    assert main(["compress", str(bench.model), "--data", str(bench.data), "--bits", "8", "-o", str(bench.student)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "nothing to quantise" in error and "--bits" in error and not bench.student.exists()


def test_what_is_not_to_be_had_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", str(folder / "teacher.onnx"), "--data", str(folder / "data.npz"), "--bits", "16"]) == 2
    assert "bits" in capsys.readouterr().err.strip().splitlines()[-1]


def deep() -> onnx.ModelProto:
    """Enough layers that what rounding does to one is met by the next."""
    net = Net(3)
    x = net.relu(net.conv(net.input("x", "N", 8, 12, 12), 8, 16))
    for _ in range(5):
        x = net.relu(net.conv(x, 16, 16))
    net.conv(x, 16, 8, out="y")
    return net.proto("y")


IN_BITS: dict[str, Any] = {"keep": 1.0, "steps": 0, "bits": 8, "finetune_steps": 900, "simplify": False}


@pytest.fixture
def timed_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """All students take the same time: what is chosen by it is chosen alike in every run."""
    monkeypatch.setattr(Trials, "times", lambda self, models: dict.fromkeys(models, 0.5))


def lines_of(report: ndonnx.Report) -> dict[bool, list[float]]:
    """Losses of what was tried on the way, by whether they come of a training in 8 bits."""
    assert report.quantised is not None
    found: dict[bool, list[float]] = {True: [], False: []}
    for trial in report.quantised.trials:
        assert trial.loss is not None
        found["of training in 8 bits" in trial.scheme].append(trial.loss)
    return found


@pytest.mark.usefixtures("timed_alike")
def test_training_in_8_bits_wins_back_what_they_lose(tmp_path: Path) -> None:
    report = Bench(tmp_path).put(deep(), 640).compress(**IN_BITS).report
    assert report.quantised is not None and report.quantised.loss is not None
    lines = lines_of(report)
    assert len(lines[True]) == 1 and lines[True][0] < 0.95 * min(lines[False])
    assert report.quantised.loss == lines[True][0]
    assert "300 steps of training in 8 bits" in (report.quantised.scheme or "")
    # What is written is what was measured.
    assert report.stages[-1].written and report.stages[-1].loss == pytest.approx(lines[True][0], rel=1e-3)


@pytest.mark.usefixtures("timed_alike")
def test_a_training_in_8_bits_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path).put(deep(), 160)
    without = bench.compress("without", **{**IN_BITS, "finetune_steps": 0})
    before = bench.student.read_bytes()

    def ruined(self: Finish, student: ir.Model, grid: Grid, key: tuple[str, ...]) -> tuple[ir.Model, FinetuneReport]:
        del self, key
        weights = {n: -v.const_value.numpy() for n, v in student.graph.initializers.items() if n in grid.axes}
        return write_back(student, weights), FinetuneReport(steps=300, seconds=0.0)

    monkeypatch.setattr(Finish, "finetune_in_bits", ruined)
    report = bench.compress("ruined", **IN_BITS).report
    assert lines_of(report)[True][0] > max(lines_of(report)[False]), "told, too"
    assert report.quantised is not None and without.report.quantised is not None
    assert report.quantised.scheme == without.report.quantised.scheme
    assert bench.student.read_bytes() == before


@pytest.mark.usefixtures("timed_alike")
def test_a_run_that_dies_while_it_trains_in_8_bits_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path).put(deep(), 160)
    bench.compress("whole", **IN_BITS)
    whole = bench.student.read_bytes()
    trained = Trials.with_weights

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trials, "with_weights", dies)
    with pytest.raises(KeyboardInterrupt):
        bench.compress("stopped", **IN_BITS)
    assert not list(tmp_path.glob("**/answers")), "what was captured for it goes whatever happens"
    monkeypatch.setattr(Trials, "with_weights", trained)
    recorder = Recorder()
    bench.compress("stopped", progress=recorder, **IN_BITS)
    assert bench.student.read_bytes() == whole and "finetune" not in recorder.stages, "it had been trained by then"


@pytest.mark.usefixtures("timed_alike")
def test_what_a_training_in_8_bits_depends_on_trains_it_anew(tmp_path: Path) -> None:
    bench = Bench(tmp_path).put(deep(), 160)
    told = {"finetune_steps": 60, **{k: v for k, v in IN_BITS.items() if k != "finetune_steps"}}
    bench.compress(**told)
    for change, trains in (({}, False), ({"batch_size": 8}, True), ({"optimiser": "adam"}, True), ({"seed": 3}, True)):
        recorder = Recorder()
        bench.compress(progress=recorder, **{**told, **change})
        assert ("finetune" in recorder.stages) == trains, change
    report = bench.compress(**{**told, "finetune_steps": 0}).report
    assert not lines_of(report)[True] and report.quantised is not None


@pytest.mark.usefixtures("timed_alike")
def test_under_a_time_budget_too_no_fine_tuning_is_none_in_8_bits(tmp_path: Path) -> None:
    bench, told = Bench(tmp_path).put(deep(), 160), {"keep": 1.0, "steps": 0, "bits": 8, "time_budget": 4}
    assert len(lines_of(bench.compress(**told, finetune_steps=1).report)[True]) == 1
    assert not lines_of(bench.compress(**told, finetune_steps=0).report)[True]
