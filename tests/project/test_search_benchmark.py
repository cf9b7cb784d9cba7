"""The measurements of a search: that they compare like with like, count honestly, and go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import ndonnx
from benchmarks import search
from benchmarks.search_bench import MULTIPLIERS, UniformCosts
from ndonnx import demo
from ndonnx.errors import UsageError
from ndonnx.graph import slice_cost
from ndonnx.partition import partition
from tests.helpers.models import inputs_of, residual_cnn, run

RECIPE = """
executor = "serial"
workers = 1
device = "cpu"
precision = "fp32"
batch_size = 16
steps = 2
samples = 64
[search]
candidates = "width 0.25,0.75"
samples = 64
"""


pytestmark = pytest.mark.usefixtures("one_core")


def undecided() -> onnx.ModelProto:
    """A teacher that gives every class to some inputs."""
    model = residual_cnn()
    mean = run(model, inputs_of(model, 500, seed=1))["logits"].mean(0)
    (bias,) = (tensor for tensor in model.graph.initializer if tensor.name == "logits.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) - mean, bias.name))
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(undecided(), tmp_path / "teacher.onnx")
    np.savez(tmp_path / "data.npz", **inputs_of(residual_cnn(), 160))  # type: ignore[arg-type]
    np.savez(tmp_path / "eval.npz", **inputs_of(residual_cnn(), 2000, seed=7))  # type: ignore[arg-type]
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


def measured(folder: Path, command: str, *options: str, judge: str | None = "eval.npz") -> dict[str, Any]:
    given = [str(folder / "teacher.onnx"), "--data", str(folder / "data.npz"), "--recipe", str(folder / "recipe.toml")]
    given += [] if judge is None else ["--eval", str(folder / judge)]
    search.main([command, *given, "--run", str(folder / "run"), "--out", str(folder / "out.json"), *options])
    document: dict[str, Any] = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    return document


def markers(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("students/*/done.json")}


# Budgets


def test_uniform_costs_are_those_of_what_is_really_built(folder: Path) -> None:
    recipe = ndonnx.load_recipe(folder / "recipe.toml", finetune_steps=0, steps=0, keep=0.4, round_to=3)
    result = ndonnx.compress(
        folder / "teacher.onnx", data=str(folder / "data.npz"), recipe=recipe, run_dir=folder / "run"
    )
    parts = ndonnx.partition_model(folder / "teacher.onnx")
    for cost, whole, built in (
        ("params", result.report.teacher.parameters, result.report.student.parameters),
        ("macs", result.report.teacher.macs, result.report.student.macs),
    ):
        assert UniformCosts(parts, cost).share(0.4, 3) == pytest.approx(built / whole, rel=1e-12)


def test_the_uniform_multiplier_is_the_largest_within_the_budget() -> None:
    costs = UniformCosts(partition(ndonnx.load(demo.teacher_path())), "params")
    shares = [costs.share(keep, None) for keep in MULTIPLIERS]
    assert shares == sorted(shares) and shares[-1] <= 1
    for budget in (0.3, 0.5, 0.77):
        found = costs.largest(budget, None)
        assert found == max(keep for keep, share in zip(MULTIPLIERS, shares, strict=True) if share <= budget)
    assert costs.largest(shares[0] / 2, None) is None


@pytest.mark.slow
def test_budgets_compare_like_with_like_and_go_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = inputs_of(residual_cnn(), 500, seed=7)
    labels = run(undecided(), inputs)["logits"].argmax(1)
    labels[:50] = (labels[:50] + 1) % 5
    np.savez(folder / "labelled.npz", label=labels, **inputs)  # type: ignore[arg-type]
    given = ("budgets", "--budgets", "0.5,0.8")
    document = measured(folder, *given, judge="labelled.npz")
    assert document["measure"] == "accuracy" and document["teacher"] == pytest.approx(0.9)
    assert document["recipe"]["finetune_steps"] == 0
    first, second = document["rows"]
    assert (first["searched"]["trained"], second["searched"]["trained"]) == (6, 0), "the library is trained once"
    whole = slice_cost(ndonnx.load(folder / "teacher.onnx")).parameters
    parts = ndonnx.partition_model(folder / "teacher.onnx")
    for row in (first, second):
        searched, uniform = row["searched"], row["uniform"]
        assert searched["missed"] is None and max(searched["share"], uniform["share"]) <= row["budget"]
        assert uniform["share"] == pytest.approx(UniformCosts(parts, "params").share(uniform["keep"], None), rel=1e-12)
        assert row["gain"] == pytest.approx(100 * (searched["quality"] - uniform["quality"]))
        student = folder / "run" / "students" / f"params-{row['budget']}.onnx"
        assert slice_cost(ndonnx.load(student)).parameters == pytest.approx(searched["share"] * whole)
        assert ndonnx.evaluate(student, str(folder / "labelled.npz")).accuracy == searched["quality"]
    printed = capsys.readouterr().out
    assert "search 1 (0.5): trains 6 students" in printed and "search 2 (0.8): trains nothing" in printed

    before = markers(folder)
    # As if it had been killed in the first search, after the last training.
    for path in (folder / "run" / "searched").glob("*/done.json"):
        if json.loads(path.read_text(encoding="utf-8"))["meta"]["trained"]:
            path.unlink()
    again = measured(folder, *given, judge="labelled.npz")["rows"]
    assert markers(folder) == before
    assert again[1] == second and again[0]["uniform"] == first["uniform"]
    continued = again[0]["searched"]
    assert continued["continued"] and continued["trained"] == 0 and continued["quality"] == first["searched"]["quality"]
    assert "search 1 (0.5): trains nothing, > " in capsys.readouterr().out


def test_a_budget_that_cannot_be_reached_is_marked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = measured(folder, "budgets", "--budgets", "0.1", "--candidates", "width 0.75")
    (row,) = document["rows"]
    assert row["uniform"] is None and row["gain"] is None and "params" in row["searched"]["missed"]
    assert row["searched"]["share"] > 0.1 and document["measure"] == "agreement"
    assert "the budget was not reached" in capsys.readouterr().out


# Promises


@pytest.mark.slow
def test_a_broken_promise_is_counted_as_broken(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    promised = ("promises", "--seeds", "2", "--max-drop", "20%", "--seed", "3")
    document = measured(folder, *promised)
    rows = document["rows"]
    assert [row["seed"] for row in rows] == [3, 4] and document["max_drop"] == 0.2
    assert all(row["drop"] <= row["bound"] <= 0.2 and row["missed"] is None for row in rows)
    assert all(row["eval_samples"] == 2000 and row["outcome"] == "held" for row in rows)
    assert document["counted"] == {"held": 2, "broken": 0, "not promised": 0}
    assert "2 of 2 promises hold" in capsys.readouterr().out
    students = [folder / "run" / f"seed-{seed}" / "student.onnx" for seed in (3, 4)]
    assert students[0].read_bytes() != students[1].read_bytes(), "the seed draws other rows"

    # Judged by just those rows on which the first student answers otherwise, its promise is broken, and is told so.
    before = markers(folder)
    inputs = inputs_of(residual_cnn(), 2000, seed=7)
    top = [run(onnx.load(path), inputs)["logits"].argmax(1) for path in (folder / "teacher.onnx", students[0])]
    assert (top[0] != top[1]).any()
    np.savez(folder / "hard.npz", **{name: rows[top[0] != top[1]] for name, rows in inputs.items()})
    document = measured(folder, *promised, judge="hard.npz")
    first = document["rows"][0]
    assert first["outcome"] == "broken" and first["eval_drop"] == 1 and first["missed"] is None
    assert document["counted"]["broken"] >= 1
    printed = capsys.readouterr().out
    assert "broken on --eval: seed 3 (100.00%)" in printed and "2 of 2" not in printed
    assert markers(folder) == before, "the runs are those that there were"


def test_what_was_not_promised_is_counted_apart(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = measured(folder, "promises", "--seeds", "1", "--max-drop", "0.1%")
    assert document["counted"] == {"held": 0, "broken": 0, "not promised": 1}
    printed = capsys.readouterr().out
    assert "0 of 0 promises hold" in printed and "1 of 1 runs promised nothing" in printed


def test_outcomes_at_the_limit() -> None:
    drop = 0.996 - 0.986
    assert drop > 0.01 and search.outcome({"missed": None, "eval_drop": drop}, 0.01) == "held", "no matter of rounding"
    assert search.outcome({"missed": None, "eval_drop": 0.0102}, 0.01) == "broken"
    assert search.outcome({"missed": None, "eval_drop": None}, 0.01) == "broken", "answers that are not finite"
    assert search.outcome({"missed": "not reached", "eval_drop": 0.0}, 0.01) == "not promised"


def test_a_promise_of_accuracy_wants_labels_to_judge_by(folder: Path) -> None:
    labels = np.zeros(160, dtype=np.int64)
    np.savez(folder / "data.npz", label=labels, **inputs_of(residual_cnn(), 160))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--eval has no labels"):
        measured(folder, "promises", "--seeds", "1")
    assert not markers(folder)


# Latency


@pytest.mark.slow
def test_a_latency_is_measured_afresh_twice(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("latency", "--target", "0.9", "--processes", "2", "--finetune-steps", "0")
    document = measured(folder, *given, judge=None)
    said = document["said"]["shares"]["latency"]
    assert document["off_target"] == pytest.approx(said / 0.9 - 1)
    assert len(document["fresh"]) == 2
    for fresh in document["fresh"]:
        assert fresh["low"] <= fresh["ratio"] <= fresh["high"] and fresh["against_ms"] > 0
        assert fresh["off_said"] == pytest.approx(fresh["ratio"] / said - 1)
    assert document["fresh"][0]["ratio"] != document["fresh"][1]["ratio"]
    assert measured(folder, *given, judge=None)["fresh"] == document["fresh"]
    assert "measured afresh, 2" in capsys.readouterr().out
