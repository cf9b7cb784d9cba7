"""Candidates that round to the same widths: one student, trained once, known by all of its names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ndonnx.api.compress import compress
from ndonnx.api.search import SearchResult, search
from ndonnx.config.recipe import Recipe
from ndonnx.partition import ChannelGroup, ChannelGroups
from ndonnx.partition.removable import kept_width
from ndonnx.select import TEACHER, Option, Table
from ndonnx.students import WHOLE
from ndonnx.students.methods.lowrank import LowRank
from ndonnx.students.methods.sparsity import Sparsity
from ndonnx.students.methods.width import Width
from ndonnx_cli.main import main
from tests.helpers.runs import UNITS, Recorder
from tests.helpers.searches import SETTINGS, markers

# Of 8 channels with multiples of 4, 0.4 and 0.5 keep four and 0.9 all eight.
CANDIDATES = ("width 0.4,0.5,0.9",)
SAME = {"width 0.5": "same as width 0.4", "width 0.9": "same as teacher"}

widths = st.lists(st.integers(1, 300), min_size=1, max_size=4)
roundings = st.none() | st.integers(1, 32)
parts = st.floats(0.01, 0.99)


pytestmark = pytest.mark.usefixtures("one_core")


def made(**options: Any) -> Recipe:
    table = {"candidates": CANDIDATES, "steps": 4, "samples": 64}
    return Recipe(**(SETTINGS | {"round_to": 4} | options), search=table)


def searched(folder: Path, progress: Recorder | None = None, *, dry_run: bool = False, pareto: int = 0) -> SearchResult:
    return search(
        folder / "teacher.onnx",
        data=str(folder / "data.npz"),
        recipe=made(),
        pareto=pareto,
        run_dir=folder / "run",
        dry_run=dry_run,
        progress=progress,
    )


def compressed(folder: Path, keep: float) -> None:
    recipe = made(keep=keep, inputs="teacher")
    compress(folder / "teacher.onnx", data=str(folder / "data.npz"), recipe=recipe, run_dir=folder / "run")


def groups_of(sizes: list[int]) -> ChannelGroups:
    stops = np.cumsum(sizes).tolist()
    found = (ChannelGroup(f"g{i}", stop - size, stop) for i, (size, stop) in enumerate(zip(sizes, stops, strict=True)))
    return ChannelGroups(tuple(found), (), ())


@given(widths, parts, parts, roundings)
def test_keys_are_equal_where_the_kept_widths_are(sizes: list[int], a: float, b: float, round_to: int | None) -> None:
    kept = [[kept_width(size, keep, round_to) for size in sizes] for keep in (a, b)]
    keys = [Width(keep, round_to).shape_key(groups_of(sizes)) for keep in (a, b)]
    assert (keys[0] == keys[1]) == (kept[0] == kept[1])
    assert [key == WHOLE for key in keys] == [each == sizes for each in kept]
    assert Width(a, round_to, "random").shape_key(groups_of(sizes)) != keys[0] or keys[0] == WHOLE


def test_what_only_the_samples_tell_has_no_key() -> None:
    groups = groups_of([8, 16])
    assert LowRank(0.5).shape_key(groups) is None and Sparsity("0.5").shape_key(groups) is None
    assert Width(0.5).shape_key(groups_of([])) is None, "a slice that cannot be shrunk says so for each candidate"


def test_students_with_equal_keys_are_equal_byte_for_byte(folder: Path) -> None:
    for keep in (0.4, 0.5):
        compressed(folder, keep)
    assert len(markers(folder)) == 6
    for name in UNITS:
        one, two = (path.read_bytes() for path in folder.glob(f"run/students/{name}-*/student.onnx"))
        assert one == two


def test_each_student_is_trained_once_and_has_all_its_names(folder: Path) -> None:
    report = searched(folder, pareto=1).report
    assert len(markers(folder)) == 3
    options = {(o.neighbourhood, o.candidate): o for o in report.options}
    assert len(options) == 9
    for name in UNITS:
        trained = options[name, "width 0.4"]
        assert trained.status == "trained"
        for spec, reason in SAME.items():
            assert (options[name, spec].status, options[name, spec].reason) == ("alias", reason)
        same, whole = options[name, "width 0.5"], options[name, "width 0.9"]
        assert (same.costs, same.drop, same.nmse) == (trained.costs, trained.drop, trained.nmse)
        assert whole.costs["params"] > trained.costs["params"] and whole.drop == 0
    uniform = {s.name: s for s in report.students if s.source == "uniform"}
    assert list(uniform) == ["width 0.4", "width 0.5", "width 0.9"]
    assert uniform["width 0.4"].candidates == uniform["width 0.5"].candidates
    assert uniform["width 0.4"].metric == uniform["width 0.5"].metric
    (teacher,) = (s for s in report.students if s.source == "teacher")
    assert uniform["width 0.5"].params < uniform["width 0.9"].params == teacher.params


def test_what_is_trained_already_stands_for_the_others(folder: Path) -> None:
    compressed(folder, 0.5)
    before = markers(folder)
    for recorder in (Recorder(), Recorder()):
        report = searched(folder, recorder).report
        assert markers(folder) == before and not {"capture", "distil"} & set(recorder.stages)
        told = {(o.candidate, o.status, o.reason) for o in report.options}
        assert told == {
            ("width 0.4", "alias", "same as width 0.5"),
            ("width 0.5", "reused", None),
            ("width 0.9", "alias", "same as teacher"),
        }


def test_a_dry_run_tells_of_aliases(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = searched(folder, dry_run=True).report.options
    assert {(o.candidate, o.status, o.reason) for o in planned} == {
        ("width 0.4", "missing", None),
        *((spec, "alias", reason) for spec, reason in SAME.items()),
    }
    monkeypatch.chdir(folder)
    given = ("search", "teacher.onnx", "--data", "data.npz", "--candidates", *CANDIDATES, "--round-to", "4", "-q")
    assert main([*given, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert all(reason in printed for reason in SAME.values())


def test_a_table_finds_options_by_their_other_names() -> None:
    options = [
        Option(n, c, {"params": cost}, loss) for n in "ab" for c, cost, loss in ((TEACHER, 4.0, 0.0), ("x", 2, 1))
    ]
    table = Table([*options, Option("b", "y", {"params": 3.0}, 0.5)], aliases={("a", "y"): "x", ("a", "w"): "gone"})
    assert table.uniform("y").candidates == {"a": "x", "b": "y"} == dict(table.choose({"a": "y", "b": "y"}).candidates)
    assert table.corrected("params", 0.5).uniform("y").totals == {"params": 3 + 3.5}
    assert table.knows("y") and not table.knows("w")
    assert [option.candidate for option in table.options("a")] == [TEACHER, "x"], "one option, whatever its names"
    with pytest.raises(KeyError):
        table.choose({"a": "w"})
