"""Searching for students: the library is shared, targets are met or missed in the open, and all of it goes on."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from ndonnx import demo
from ndonnx.api.compress import compress
from ndonnx.api.search import search
from ndonnx.config.recipe import load_recipe
from ndonnx.errors import DataError, RecipeError
from ndonnx.flow.measure import WholeLoss
from ndonnx_cli.main import main
from tests.helpers.models import inputs_of, residual_cnn, run
from tests.helpers.runs import UNITS, Recorder, done_markers
from tests.helpers.searches import compressed, made, markers, searched

pytestmark = pytest.mark.usefixtures("one_core")


# Rows that no training sees


def test_too_few_rows_are_one_line(folder: Path) -> None:
    np.savez(folder / "data.npz", **inputs_of(residual_cnn(), 3))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"holds 3 samples; at least 4 are needed: .* one to test the promised drop on"):
        searched(folder, max_drop="1%")
    np.savez(folder / "data.npz", **inputs_of(residual_cnn(), 2))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="holds 2 samples; at least 3 are needed"):
        searched(folder)


def test_what_few_rows_cannot_tell_is_told(folder: Path) -> None:
    np.savez(folder / "data.npz", **inputs_of(residual_cnn(), 60))  # type: ignore[arg-type]
    recorder = Recorder()
    searched(folder, recorder, dry_run=True)
    assert [note.partition("leave ")[2][:11] for note in recorder.notes] == ["6 to compare"[:11], "8 to choose"]


# The library


def test_a_search_trains_once_for_all_targets(folder: Path) -> None:
    first = searched(folder, output="out")
    report = first.report
    assert {o.neighbourhood for o in report.options} == UNITS and {o.status for o in report.options} == {"trained"}
    assert len(report.options) == 9 and all(o.drop is not None and o.costs["params"] > 0 for o in report.options)
    before = markers(folder)
    assert len(before) == 9
    recorder = Recorder()
    again = searched(folder, recorder, target=("macs=0.7",))
    assert markers(folder) == before
    assert {o.status for o in again.report.options} == {"reused"}
    assert not {"capture", "distil", "held-out", "measure"} & set(recorder.stages)
    assert again.missed is None
    (reached,) = [student for student in again.report.students if student.name == "target"]
    assert reached.shares["macs"] <= 0.7


def test_what_a_search_writes(folder: Path) -> None:
    report = searched(folder, output="out").report
    out = folder / "out"
    document = json.loads((out / "search.json").read_text())
    assert document == json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert (out / "search.csv").read_text().count("\n") == 1 + len(report.students)
    with Image.open(out / "search.png") as picture:
        picture.verify()
    students = [s for s in report.students if s.source == "searched"]
    assert students and {s.source for s in report.students} == {"searched", "uniform", "teacher"}
    feed = inputs_of(residual_cnn(), 4)
    for student in students:
        assert student.path is not None
        model = onnx.load(student.path)
        assert np.isfinite(run(model, feed)["logits"]).all()
        assert student.bytes == Path(student.path).stat().st_size
        assert sum(int(np.prod(t.dims)) for t in model.graph.initializer) == student.params


def test_a_dry_run_tells_and_trains_nothing(folder: Path) -> None:
    planned = searched(folder, dry_run=True).report.options
    assert len(planned) == 9 and {o.status for o in planned} == {"missing"}
    assert not markers(folder)
    searched(folder, pareto=0, search={"candidates": ("width 0.5",)})
    assert [o.status for o in searched(folder, dry_run=True).report.options].count("reused") == 3


def test_compress_finds_what_a_search_has_trained_and_the_other_way_round(folder: Path) -> None:
    searched(folder, pareto=0, search={"candidates": ("width 0.5",)})
    result = compressed(folder, keep=0.5, inputs="teacher")
    assert {n.name for n in result.report.neighbourhoods if n.status == "reused"} == UNITS
    compressed(folder, keep=0.25, inputs="teacher")
    options = searched(folder, pareto=0).report.options
    assert {o.candidate for o in options if o.status == "reused"} == {"width 0.25", "width 0.5"}


def test_a_candidate_that_fails_is_no_option_and_is_not_tried_again(folder: Path) -> None:
    names = ("width 0.5", "activation Relu=Sigmoid", "lowrank 0.5")
    report = searched(folder, pareto=1, search={"candidates": (*names, "activation Gelu=Relu")}).report
    failed = [o for o in report.options if o.status == "failed"]
    nowhere = [o.neighbourhood for o in failed if o.candidate == "activation Gelu=Relu"]
    assert len(nowhere) == len({o.neighbourhood for o in report.options})
    # What is a region for its rank alone, as the classifier is, may have no activation at all.
    assert {o.candidate for o in failed} <= {"activation Gelu=Relu", "activation Relu=Sigmoid"}
    assert all(o.reason and o.drop is None for o in failed)
    recorder = Recorder()
    searched(folder, recorder, pareto=1, search={"candidates": (*names, "activation Gelu=Relu")})
    assert not {"capture", "distil"} & set(recorder.stages)


def test_the_same_search_gives_the_same_bytes(folder: Path) -> None:
    students = []
    for name in ("one", "two"):
        compressed(folder, run_dir=name, target=("params=0.8",))
        students.append((folder / "student.onnx").read_bytes())
    assert students[0] == students[1]


# Targets


def test_a_target_is_met_by_what_is_measured(folder: Path) -> None:
    result = compressed(folder, target=("params=0.6",), steps=8)
    target = result.report.target
    assert target is not None and target.missed is None
    assert result.report.student.parameters <= 0.6 * result.report.teacher.parameters
    assert target.reached["params"] == result.report.student.parameters / result.report.teacher.parameters
    assert {n.steps for n in result.report.neighbourhoods if n.status != "kept"} <= {8}, "the chosen ones in full"
    assert result.report.to_json()["target"]["target"] == {"params": 0.6}


def test_an_impossible_target_saves_the_best(folder: Path) -> None:
    result = compressed(folder, target=("params=0.05",))
    target = result.report.target
    assert target is not None and target.missed is not None and "params" in target.missed
    assert (folder / "student.onnx").exists()
    least = compressed(folder, keep=0.25).report.student.parameters
    assert result.report.student.parameters == least, "as small as it can be"


@pytest.mark.parametrize("solver", ["milp", "greedy"])
def test_the_promise_of_a_drop_is_kept_on_held_out_rows(folder: Path, solver: str) -> None:
    result = compressed(folder, max_drop="20%", search={"solver": solver})
    target = result.report.target
    assert target is not None and target.missed is None and target.quality == "agreement"
    assert target.drop <= target.bound <= 0.2 and target.samples == 55


def test_a_drop_that_cannot_be_shown_is_missed_in_the_open(folder: Path) -> None:
    recorder = Recorder()
    result = compressed(folder, recorder, max_drop="0.1%")
    target = result.report.target
    assert target is not None and target.missed is not None and "on 55 samples that nothing else saw" in target.missed
    assert any("cannot show" in note for note in recorder.notes)
    assert (folder / "student.onnx").exists()


def test_target_and_drop_together_are_kept_or_told_apart(folder: Path) -> None:
    both = compressed(folder, target=("params=0.99",), max_drop="30%").report.target
    assert both is not None and both.missed is None and both.reached["params"] <= 0.99 and both.bound <= 0.3
    apart = compressed(folder, target=("params=0.2",), max_drop="6%").report.target
    assert apart is not None and apart.missed is not None
    assert apart.reached["params"] > 0.2 or apart.bound is None or apart.bound > 0.06
    assert "params=0.2" in apart.missed or "6.00%" in apart.missed


@pytest.mark.slow
def test_far_beyond_the_tolerance_nothing_smaller_is_trained(tmp_path: Path) -> None:
    table = {"candidates": ("width 0.1,0.2,0.3",), "steps": 0, "samples": 100}
    found = {}
    for stop in (True, False):
        recipe = made({"max_drop": "0.1%", "init": "teacher", "search": table | {"early_stop": stop, "attempts": 0}})
        data = str(demo.data_path("test"))
        run_dir = tmp_path / str(stop)
        found[stop] = search(demo.teacher_path(), data=data, recipe=recipe, pareto=0, run_dir=run_dir).report.options
    skipped = [o for o in found[True] if o.status == "skipped"]
    assert skipped and all(o.candidate != "width 0.3" and "alone loses" in (o.reason or "") for o in skipped)
    assert {o.status for o in found[False]} == {"trained"}
    everything = {(o.neighbourhood, o.candidate): o.drop for o in found[False]}
    assert {o.drop == everything[o.neighbourhood, o.candidate] for o in found[True] if o.status == "trained"} == {True}


@pytest.mark.parametrize("quality", ["metric", "nmse"])
def test_other_measures_of_quality(folder: Path, quality: str) -> None:
    candidates = {"candidates": ("width 0.25,0.5",)}
    report = searched(folder, pareto=0, search=candidates | {"quality": quality}).report
    assert len(report.options) == 6 and all(o.drop is not None for o in report.options)
    if quality == "nmse":
        for name in UNITS:
            per_nmse = [o.drop / o.nmse for o in report.options if o.neighbourhood == name and o.drop and o.nmse]
            assert per_nmse[0] == pytest.approx(per_nmse[1]) and per_nmse[0] > 0


def test_latency_is_measured_slice_by_slice(folder: Path) -> None:
    result = searched(folder, pareto=1, target=("latency=0.99",), search={"candidates": ("width 0.5",)})
    (teacher,) = (s for s in result.report.students if s.source == "teacher")
    slices = [o.costs["latency"] for o in result.report.options if o.candidate == "teacher"]
    assert teacher.latency is not None and teacher.shares["latency"] == 1 and all(time > 0 for time in slices)
    for student in result.report.students:
        assert student.latency is not None
        assert student.latency / teacher.latency == pytest.approx(student.shares["latency"])


def test_what_a_search_cannot_do_is_one_line(folder: Path) -> None:
    for options in ({"inputs": "student"}, {"inputs": "noise"}, {"time_budget": 5}, {"target": ("speed=2",)}):
        with pytest.raises(RecipeError):
            searched(folder, **options)
    with pytest.raises(RecipeError, match=r"unknown key 'search\.size'"):
        load_recipe(search={"size": 3})


def test_flags_go_before_the_table_of_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('max_drop = 0.01\ntarget = "params=0.5"\n[search]\nsteps = 7\nsamples = 30\n')
    recipe = load_recipe(path, search={"steps": 9, "solver": None})
    assert (recipe.search.steps, recipe.search.samples, recipe.search.solver) == (9, 30, "milp")
    assert recipe.target == ("params=0.5",) and recipe.max_drop == "0.01"


# The command line


FLAGS = ("--executor", "serial", "--samples", "64", "-q")


def test_search_prints_one_document_and_a_dry_run_trains_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    given = ("search", "teacher.onnx", "--data", "data.npz", "--candidates", "0.5", "--steps", "2", *FLAGS)
    assert main([*given, "--pareto", "1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {option["status"] for option in document["options"]} == {"trained"}
    assert (folder / "teacher-search" / "search.csv").exists() and (folder / "teacher-search.run").is_dir()
    assert main([*given, "--dry-run", "--candidates", "0.25"]) == 0
    printed = capsys.readouterr().out
    assert "reused" in printed and "missing" in printed and "nothing was trained" in printed


def test_a_missed_target_is_exit_code_3_and_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    (folder / "r.toml").write_text('[search]\ncandidates = "width 0.5"\n')
    given = ("compress", "teacher.onnx", "--data", "data.npz", "--recipe", "r.toml", "--steps", "2", *FLAGS)
    assert main([*given, "--finetune-steps", "0", "--target", "params=0.1"]) == 3
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and told.err.startswith("target missed: ")
    assert "params" in told.out and (folder / "teacher-student.onnx").exists()


# Interrupted


CODE = """
import sys
from pathlib import Path
from tests.conftest import COUNTING
from tests.helpers.searches import compressed
for module in COUNTING:
    module.usable_cores = lambda: 1
compressed(Path(sys.argv[1]), target=("params=0.7",))
"""


@pytest.mark.slow
def test_a_killed_search_goes_on_to_the_same_student(folder: Path) -> None:
    compressed(folder, run_dir="whole", target=("params=0.7",))
    expected = (folder / "student.onnx").read_bytes()
    (folder / "student.onnx").unlink()
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    for wanted in (2, 5):
        running = subprocess.Popen([sys.executable, "-c", CODE, str(folder)], env=env)
        while running.poll() is None and len(markers(folder)) < wanted:
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        running.wait()
    before = markers(folder)
    assert len(before) >= 5
    compressed(folder, target=("params=0.7",))
    assert (folder / "student.onnx").read_bytes() == expected
    assert before.items() <= markers(folder).items(), "nothing that was there is trained again"
    assert len(done_markers(folder / "run")) == 3


@pytest.mark.slow
def test_searching_the_demo_keeps_its_promise(tmp_path: Path) -> None:
    result = compress(
        demo.teacher_path(),
        data=str(demo.data_path("train")),
        eval_data=str(demo.data_path("test")),
        output=tmp_path / "student.onnx",
        recipe=made({"max_drop": "5%", "steps": 60, "samples": 2000, "search": {"steps": 30, "samples": 300}}),
    )
    target = result.report.target
    assert target is not None and target.missed is None and target.quality == "accuracy"
    assert target.reached["params"] < 0.9 and target.bound <= 0.05


def test_a_loss_that_is_not_finite_is_kept_as_null() -> None:
    loss = WholeLoss(0.25, math.inf, math.inf, math.nan)
    written = json.loads(json.dumps(loss.to_json(), allow_nan=False))
    assert written == {"drop": 0.25, "divergence": None, "bound": None, "metric": None}
    assert WholeLoss.of_json(written) == WholeLoss(0.25, math.inf, math.inf, math.inf)
