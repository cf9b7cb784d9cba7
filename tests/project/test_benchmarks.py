"""The measurements in `benchmarks/`: what they print and how they reckon; never how fast anything was."""

from __future__ import annotations

import csv
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import common, overhead, time_to_quality
from benchmarks.common import Stopwatch
from benchmarks.end_to_end import softened_kl
from benchmarks.time_to_quality import Reach, envelope, speed_up, time_to
from benchmarks.time_to_quality_plot import Point
from ndonnx.errors import UsageError

SAMPLES = 96

qualities = st.lists(st.tuples(st.floats(0.1, 1e3), st.floats(0, 1)), min_size=1, max_size=20)


def curve(method: str, *points: tuple[float, float]) -> list[Point]:
    return [Point(method, "", seconds, 0, quality, 0.0) for seconds, quality in points]


def recipe(folder: Path) -> Path:
    path = folder / "recipe.toml"
    path.write_text('executor = "serial"\nbatch_size = 16\nprecision = "fp32"\n', encoding="utf-8")
    return path


@given(qualities)
def test_the_envelope_rises_and_keeps_the_best(points: list[tuple[float, float]]) -> None:
    rising = envelope(curve("ND", *points), "ND")
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(rising)) or len({s for s, _ in points}) < len(points)
    assert rising[-1][1] == max(quality for _, quality in points)
    assert set(rising) <= set(points)


@given(qualities, st.floats(0, 1))
def test_a_quality_is_reached_between_its_neighbours_or_not_at_all(
    points: list[tuple[float, float]], level: float
) -> None:
    found = time_to(level, [*curve("ND", *points), *curve("KD", (1e-3, 1.0))], "ND")
    enough = [seconds for seconds, quality in points if quality >= level]
    assert found.reached == bool(enough)
    if enough:
        assert min(seconds for seconds, _ in points) <= found.seconds <= min(enough) * (1 + 1e-12)
    else:
        assert found.seconds == max(seconds for seconds, _ in points)


def test_times_are_interpolated_and_bounds_are_marked() -> None:
    points = [*curve("ND", (10, 0.5), (20, 0.9)), *curve("KD", (5, 0.1), (105, 0.6), (205, 0.6))]
    assert time_to(0.7, points, "ND").seconds == pytest.approx(15)
    assert time_to(0.3, points, "ND") == Reach(10, True)
    assert str(time_to(0.7, points, "KD")) == "> 205.0 s"
    assert speed_up(Reach(10, True), Reach(40, True)) == "4.00x"
    assert speed_up(Reach(10, True), Reach(40, False)) == "> 4.00x"
    assert speed_up(Reach(10, False), Reach(40, True)) == "< 4.00x"
    assert speed_up(Reach(10, False), Reach(40, False)) == "-"


def test_a_paused_stopwatch_stands_still() -> None:
    clock = Stopwatch(100.0)
    with clock.paused():
        inside = clock.seconds
        assert clock.seconds == inside >= 100
    assert clock.seconds >= inside


def test_the_loss_of_kd_is_that_of_softened_logits() -> None:
    teacher, student = torch.randn(5, 7), torch.randn(5, 7)
    p, q = torch.softmax(teacher / 4, 1), torch.softmax(student / 4, 1)
    expected = 16 * (p * (p / q).log()).sum(1).mean()
    assert float(softened_kl(student, teacher)) == pytest.approx(float(expected), rel=1e-4)
    assert float(softened_kl(teacher + 3, teacher)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "missing: model, data, eval"),
        (["m.onnx", "--data", "d.npz"], "missing: eval"),
        (["m.onnx", "--demo"], "leave out model"),
    ],
)
def test_what_is_measured_must_be_named(arguments: list[str], message: str) -> None:
    options = common.make_parser("").parse_args(arguments)
    with pytest.raises(UsageError, match=message):
        common.subject_of(options, judged=True)


@pytest.mark.slow
def test_time_to_quality_on_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--demo", "--recipe", str(recipe(tmp_path)), "--samples", str(SAMPLES), "--nd-steps", "0,2"]
    arguments += ["--kd-seconds", "0.2", "--sweep-seconds", "0.05", "--checkpoints", "2", "--kd-batch-size", "16"]
    time_to_quality.main([*arguments, "--out", str(tmp_path / "out")])
    with (tmp_path / "out" / "curve.csv").open(encoding="utf-8", newline="") as file:
        points = list(csv.DictReader(file))
    assert list(points[0]) == ["method", "budget", "seconds", "steps", "accuracy", "agreement"]
    assert [(p["budget"], p["steps"] != "0") for p in points if p["method"] == "ND"] == [
        ("steps 0", False),
        ("steps 2", True),
    ]
    table = json.loads((tmp_path / "out" / "table.json").read_text(encoding="utf-8"))
    for init in time_to_quality.BASELINES:
        own = [p for p in points if p["method"] == f"KD {init}"]
        baseline = table["baselines"][init]
        assert own[0]["steps"] == "0" and int(own[-1]["steps"]) > 0
        assert float(own[0]["seconds"]) >= baseline["setup_seconds"]
        assert float(own[-1]["seconds"]) >= baseline["setup_seconds"] + 0.2
        assert own == sorted(own, key=lambda p: (float(p["seconds"]), int(p["steps"])))
        assert baseline["sweep"][f"{baseline['lr']:g}"] == min(baseline["sweep"].values())
    assert all(0 <= float(p[key]) <= 1 for p in points for key in ("accuracy", "agreement"))
    # ND without a step is the least-squares start of KD.
    start = next(p for p in points if p["method"] == "KD least-squares")
    assert float(start["accuracy"]) == pytest.approx(float(points[0]["accuracy"]), abs=0.005)
    assert next(float(p["accuracy"]) for p in points if p["method"] == "KD random") < float(start["accuracy"])
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(f"KD {init}" in printed for init in time_to_quality.BASELINES)
    assert "time to" in printed


@pytest.mark.slow
def test_overhead_on_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--demo", "--recipe", str(recipe(tmp_path)), "--samples", str(SAMPLES), "--steps", "2"]
    overhead.main([*arguments, "--repeat", "2", "--only", "distil", "--only", "capture", "--out", str(tmp_path / "o")])
    document: dict[str, Any] = json.loads((tmp_path / "o").read_text(encoding="utf-8"))
    lines = document["measured"]
    assert [line["measurement"] for line in lines] == ["distil"] * 7 + ["capture"]
    total = next(line for line in lines if line["part"] == "all")
    for line in lines:
        assert len(line["ratios"]) == 2 and min(line["ratios"]) <= line["ratio"] <= max(line["ratios"])
        assert line["sdk_seconds"] > 0 and line["floor_seconds"] > 0
        bound = line["ratio"] <= 1.15 if line["measurement"] == "distil" else line["ratio"] >= 0.85
        assert line["met"] == bound
    assert total["sdk_seconds"] > max(line["sdk_seconds"] for line in lines[:6])
    assert document["samples"] == SAMPLES and document["recipe"]["steps"] == 2
    assert "/" not in json.dumps(document["model"])
    header = capsys.readouterr().out
    assert all(word in header for word in ("measurement", "SDK", "floor", "ratio", "target", "met"))


@pytest.mark.slow
def test_the_workers_of_overhead_on_the_demo(tmp_path: Path) -> None:
    arguments = ["--demo", "--recipe", str(recipe(tmp_path)), "--samples", str(SAMPLES), "--steps", "2"]
    overhead.main([*arguments, "--repeat", "1", "--only", "workers", "--out", str(tmp_path / "o")])
    lines = json.loads((tmp_path / "o").read_text(encoding="utf-8"))["measured"]
    if lines:  # a machine with one core measures nothing
        assert lines[0]["ratio"] == pytest.approx(2 * lines[0]["floor_seconds"] / lines[0]["sdk_seconds"])
