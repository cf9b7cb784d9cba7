"""The paper's tables and figures: what they ask for, how they are told, and that a cell that fails is one of them."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import common
from benchmarks.end_to_end import EndToEnd, Images
from benchmarks.paper import published, scales
from benchmarks.paper.__main__ import _parser, _scale, _text, main, print_table
from benchmarks.paper.lab import Cell, Lab
from benchmarks.paper.tables import KD_SCRATCH, TABLES, Table, _as_long, _over_kd, table6
from benchmarks.time_to_quality_plot import Point
from ndonnx import demo
from ndonnx.config.recipe import Recipe
from ndonnx.distill.losses import LABEL
from ndonnx.errors import UsageError
from ndonnx.graph import load

RECIPE = Recipe(executor="serial", batch_size=16, precision="fp32", init="teacher")
TINY = ["--samples", "48", "--steps", "2", "--finetune-steps", "2", "--checkpoints", "2"]
TINY += ["--baseline-seconds", "0.2", "--sweep-seconds", "0.02"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def recipe(folder: Path) -> list[str]:
    path = folder / "recipe.toml"
    path.write_text('executor = "serial"\nbatch_size = 16\nprecision = "fp32"\ninit = "teacher"\n', encoding="utf-8")
    return ["--recipe", str(path)]


def subject() -> common.Subject:
    return common.Subject(demo.teacher_path(), str(demo.data_path("train")), str(demo.data_path("test")), RECIPE)


def lab_of(folder: Path, **settings: Any) -> Lab:
    return Lab(subject(), replace(scales.SMALL, samples=48, steps=2, finetune_steps=2, **settings), folder)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_first_table_on_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["--demo", *recipe(tmp_path), *TINY, "--out", str(out), "--work", str(tmp_path)]
    main(["1", *arguments, "--keep", "1.5,0.5"])
    rows = rows_of(out / "table1.csv")
    assert [row["k"] for row in rows] == ["1.5"] * 6 + ["0.5"] * 6
    # A multiplier that no recipe takes: every cell of it says so, and the others are made.
    for row in rows[:6]:
        assert row["accuracy"] == row["seconds"] == "" and "'keep' = 1.5" in row["note"]
    ours = {row["method"]: row for row in rows[6:]}
    assert all(0 <= float(row["accuracy"]) <= 1 and float(row["seconds"]) > 0 for row in ours.values())
    assert not any(row["note"] for row in ours.values())
    for row in ours.values():
        assert float(row["difference"]) == pytest.approx(100 * (float(row["accuracy"]) - 0.996))
    assert float(ours["ND"]["paper"]) == -3.4 and float(ours["ND + fine-tune"]["paper"]) == -0.6
    assert ours["CE from scratch"]["paper"] == ours["KD from scratch"]["speed-up"] == ""
    # The students are trained once, and paid for in both.
    assert float(ours["ND + fine-tune"]["seconds"]) > 0.5 * float(ours["ND"]["seconds"])
    ways = ("ND", "ND in order", "ND + fine-tune")
    assert all(re.fullmatch(r"([<>] )?\d+\.\d\dx", ours[method]["speed-up"]) for method in ways)
    document = json.loads((out / "tables.json").read_text(encoding="utf-8"))
    assert document["teacher"] == 0.996 and document["scale"]["samples"] == 48
    assert set(document["learning_rates"]) == {"CE from scratch", "KD from scratch", "KD from the pruned teacher"}
    printed = capsys.readouterr()
    assert printed.out.count("failed (1)") == 6 and "(1) table: 'keep' = 1.5" in printed.out
    assert "–" in printed.out and "-3.4" in printed.out and "2.3" in printed.out
    assert not list(tmp_path.glob("ndonnx-*"))


@pytest.mark.slow
def test_cells_are_made_once_and_stages_add_up(tmp_path: Path) -> None:
    lab = lab_of(tmp_path, keeps=(0.5,))
    apart = lab.nd(keep=0.5, inputs="teacher")
    tuned = lab.nd(keep=0.5, inputs="teacher", finetune_steps=2)
    assert lab.nd(keep=0.5, inputs="teacher") is apart
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 1
    assert tuned.stages["distil"] == apart.stages["distil"] and apart.stages["finetune"] == 0 < tuned.stages["finetune"]
    table = TABLES["7"](lab)
    *stages, whole = table.rows
    assert whole["stage"] == "all" and whole["seconds"] == pytest.approx(sum(row["seconds"] for row in stages))
    assert sum(row["share"] for row in stages) == pytest.approx(1)
    assert {"capture", "distil", "finetune"} <= {row["stage"] for row in stages}


def test_a_student_that_is_all_teacher_is_no_result(tmp_path: Path) -> None:
    lab = lab_of(tmp_path)
    values = [n.exit.name for n in lab.subject.partition().distillable if n.exit is not None]
    cell = lab.nd(keep=0.5, freeze=tuple(values))
    assert cell.quality is None and cell.note.startswith("nothing was distilled: ")


def test_the_cross_entropy_baseline_follows_the_labels_and_needs_them(tmp_path: Path) -> None:
    data = dict(np.load(demo.data_path("train")))
    shifted = {"image": data["image"][:100], "label": (data["label"][:100] + 1) % 10}
    np.savez(tmp_path / "shifted.npz", **shifted)
    np.savez(tmp_path / "unlabelled.npz", image=shifted["image"])
    images = Images(subject(), str(tmp_path / "shifted.npz"), tmp_path / "images", 100)
    samples = images.training(0.5)
    model = load(demo.teacher_path())
    ours, theirs = (EndToEnd(model, samples, images.logits, RECIPE, 16, loss) for loss in ("ce", "kd"))
    held_out = samples.arrays(0, samples.blocks.holdout)
    logits = held_out[images.logits].astype(np.float64)
    log_p = (
        logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1)[:, None]
    )
    expected = -log_p[np.arange(len(log_p)), held_out[LABEL]].mean()
    assert ours._held_out_loss() == pytest.approx(expected, rel=1e-4) and expected > 5
    assert theirs._held_out_loss() < 1e-4
    bare = Images(subject(), str(tmp_path / "unlabelled.npz"), tmp_path / "bare", 64)
    with pytest.raises(UsageError, match="cross-entropy needs labels"):
        EndToEnd(model, bare.training(0.2), bare.logits, RECIPE, 16, "ce")


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        ("accuracy", 0.987, "98.70%"),
        ("accuracy", 1, "100.00%"),
        ("difference", -3.44, "-3.4"),
        ("paper", 0.1, "+0.1"),
        ("gain", None, "–"),
        ("seconds", 12.34, "12.3"),
        ("k", 0.75, "0.75"),
        ("steps", 300, "300"),
        ("method", "ND", "ND"),
    ],
)
def test_cells_are_told_as_a_reader_expects(column: str, value: object, text: str) -> None:
    assert _text(column, value) == text


def test_notes_stand_below_by_number(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"k": 1.0, "accuracy": None, "note": "it broke"},
        {"k": 0.5, "accuracy": 0.5, "note": "not fine-tuned"},
        {"k": 0.4, "accuracy": None, "note": "it broke"},
    ]
    print_table(Table(9, "Three cells", ("k", "accuracy"), rows, "and a remark"))
    printed = capsys.readouterr().out
    assert printed.count("failed (1)") == 2 and "50.00% (2)" in printed
    assert printed.rstrip().endswith("(1) it broke\n(2) not fine-tuned\nand a remark")


def curve(*points: tuple[float, float]) -> tuple[Point, ...]:
    return tuple(Point(KD_SCRATCH, "", seconds, 0, quality, 0.0) for seconds, quality in points)


def test_the_speed_up_is_at_equal_accuracy() -> None:
    kd = Cell(0.9, 200.0, curve=curve((50, 0.5), (100, 0.7), (200, 0.9)))
    assert _over_kd(Cell(0.8, 50.0), kd) == "3.00x"
    assert _over_kd(Cell(0.95, 50.0), kd) == "> 4.00x"
    assert _over_kd(Cell(note="failed"), kd) is None
    assert _over_kd(Cell(0.8, 50.0), Cell(note="failed")) is None


def test_equal_time_is_counted_in_steps() -> None:
    none, two = Cell(0.9, 30.0, {"distil": 20.0}), Cell(0.9, 90.0, {"distil": 70.0})
    assert _as_long(two, none, 300) == 1050
    assert _as_long(Cell(note="failed"), none, 300) is None


def test_flags_go_before_the_scale() -> None:
    options = _parser().parse_args(["all", "--scale", "full", "--keep", "0.9,0.6", "--steps", "7", "--noise", "0.2"])
    scale = _scale(options)
    assert scale.keeps == scale.free_keeps == (0.9, 0.6) and scale.middle == 0.6
    assert scale.steps == scale.layer_steps == scale.look_ahead_steps == scale.harden_steps == 7
    assert scale.noise == 0.2 and scale.finetune_steps == scales.FULL.finetune_steps
    assert _scale(_parser().parse_args(["1"])) == scales.SMALL


def test_every_known_number_of_the_paper_is_measured_at_full_scale() -> None:
    full = scales.FULL
    assert set(published.ND) | set(published.ND_TUNED) <= set(full.keeps)
    assert set(published.SPARSE) <= set(full.sparsities)
    assert set(published.DATA_FREE) <= set(full.free_keeps) & set(scales.SMALL.free_keeps)
    assert set(published.LOOK_AHEAD_GAIN) <= set(full.look_aheads) & set(scales.SMALL.look_aheads)
    for numbers in (
        published.ND_TUNED,
        published.DATA_FREE,
        {1 - part: drop for part, drop in published.SPARSE.items()},
    ):
        assert [numbers[keep] for keep in sorted(numbers)] == sorted(numbers.values()), "what cuts more loses more"


@pytest.mark.slow
def test_look_ahead_on_the_demo(tmp_path: Path) -> None:
    settings = {"look_aheads": (0, 1), "equal_times": (1,), "ordered_look_aheads": (0, 9)}
    table = table6(lab_of(tmp_path, **settings, look_ahead_steps=2))
    apart = [(name, tuned) for name in ("0", "1", "0, as long as 1") for tuned in ("no", "yes")]
    ordered = [(name, "no") for name in ("0", "9", "0, as long as 9")]
    assert [(row["look-ahead"], row["fine-tune"]) for row in table.rows] == apart + ordered
    assert [row["neighbourhoods"] for row in table.rows] == ["apart"] * 6 + ["in order"] * 3
    assert table.rows[0]["gain"] == table.rows[1]["gain"] == table.rows[6]["gain"] == 0
    assert all(row["accuracy"] is not None for row in table.rows)


@pytest.mark.slow
def test_all_figures_of_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    small = [
        "--study-samples",
        "24",
        "--study-repeats",
        "1",
        "--search-steps",
        "2",
        "--keep",
        "0.5",
        "--look-ahead",
        "0,1",
    ]
    arguments = ["--demo", *recipe(tmp_path), *TINY, *small, "--out", str(out), "--work", str(tmp_path)]
    main(["figures", *arguments])
    printed = capsys.readouterr().out
    told = json.loads((out / "figures.json").read_text(encoding="utf-8"))["figures"]
    assert [figure["number"] for figure in told] == [1, 2, 3, 4, 5, 6, 7]
    for figure in told:
        assert 1000 < (out / figure["file"]).stat().st_size < 150_000, figure["file"]
        assert figure["caption"] in printed
        assert ("is not known here" in figure["caption"]) == (figure["number"] in (3, 5, 7))
    methods = {point["method"] for point in told[2]["numbers"]["points"]}
    assert methods == {"ND + fine-tune", KD_SCRATCH, "KD from the pruned teacher"}
    assert {order: list(found) for order, found in told[4]["numbers"]["quality"].items()} == {
        "apart": ["0", "1"],
        "in order": ["0", "10"],
    }
    assert (out / "study" / "noise.csv").exists() and (out / "search" / "search.csv").exists()


def test_figures_want_a_folder_and_are_numbered(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="--out"):
        main(["figures", "--demo"])
    with pytest.raises(SystemExit):
        _parser().parse_args(["figures", "--figure", "3,8"])
    assert "8: no such figure; there are 1 to 7" in capsys.readouterr().err


def test_a_partition_is_drawn_as_it_is(tmp_path: Path) -> None:
    main(["figures", "--demo", "--figure", "2", "--out", str(tmp_path)])
    parts = subject().partition()
    drawn = (tmp_path / "figure2.svg").read_text(encoding="utf-8")
    assert all(f">{n.name}  " in drawn for n in parts.neighbourhoods)
