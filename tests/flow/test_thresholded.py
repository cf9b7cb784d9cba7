"""Runs that go by a threshold study: training ends where it is enough, time goes where it matters, and warnings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ndonnx.api.compress import CompressResult, compress
from ndonnx.config.recipe import Recipe
from ndonnx.convert import TorchSlice, to_torch
from ndonnx.distill.losses import NeighbourhoodLoss
from ndonnx.distill.plan import Plan
from ndonnx.distill.trainer import Training, train
from ndonnx.errors import RecipeError, UsageError
from ndonnx.flow.error_budgets import ErrorBudgets, allowed_divergence, measured_need, shared
from ndonnx.flow.measure import Loss
from ndonnx.metrics.sensitivity import ErrorBudget, StudyPlan, read_study, study
from ndonnx.runtime.fingerprints import fingerprint
from ndonnx.students import Constraint
from ndonnx_cli.main import main
from tests.helpers.models import Net, parted, residual_cnn
from tests.helpers.runs import LEARNING, Recorder
from tests.helpers.studies import opened
from tests.helpers.training import PLAN, linear, regression

SETTINGS = LEARNING | {"samples": 96}
KEY = "6865c4964632b2bb99145f706504ba51"
"""Of the plan below, by the version before."""
UNITS = ("n02", "n03", "n04")
"""Neighbourhoods of `residual_cnn` that can be shrunk."""


pytestmark = pytest.mark.usefixtures("one_core")


def document(budgets: dict[str, float | None], **more: Any) -> dict[str, Any]:
    """As `ndonnx threshold` writes it, cut down to what is read."""
    entries = [{"name": name, "nmse": nmse, "largest": 2.0} for name, nmse in budgets.items()]
    return {"max_drop": 0.01, "metric": "agreement", "tolerances": entries, "student_tolerances": []} | more


def written(folder: Path, what: object, name: str = "tolerates.json") -> Path:
    path = folder / name
    path.write_text(what if isinstance(what, str) else json.dumps(what), encoding="utf-8")
    return path


def go(folder: Path, run_dir: str, progress: Recorder | None = None, **options: Any) -> CompressResult:
    return compress(
        folder / "teacher.onnx",
        data=str(folder / "data.npz"),
        recipe=Recipe(**(SETTINGS | options)),
        output=folder / f"{run_dir}.onnx",
        run_dir=folder / run_dir,
        progress=progress,
    )


def units(result: CompressResult) -> dict[str, Any]:
    return {n.name: n for n in result.report.neighbourhoods if n.name in UNITS}


# The training


class FirstIsOut(Constraint):
    """No weights of the first feature, from half of the training on."""

    settled = 0.5

    def held(self) -> tuple[str, ...]:
        return ("w",)

    def impose(self, weights: Mapping[str, Tensor], done: float) -> None:
        if done >= self.settled:
            weights["w"][0] = 0


class Scaled(NeighbourhoodLoss):
    """The same with another unit."""

    def __init__(self, target: str, unit: float) -> None:
        super().__init__(target)
        self.unit = unit

    def __call__(self, answer: Tensor, captured: Mapping[str, Tensor]) -> Tensor:
        return self.unit * super().__call__(answer, captured)


def trained(
    folder: Path, enough: float | None, constraint: Constraint | None = None, unit: float = 1.0
) -> tuple[Training, list[float], TorchSlice]:
    """A linear slice from one start, in a hundred steps, and the errors at each of the twenty measurements."""
    errors: list[float] = []
    module, plan = to_torch(linear(Net(0))), replace(PLAN, steps=100, enough=enough)
    samples = regression(folder / f"{len(list(folder.iterdir()))}")
    found = train(module, samples, Scaled("y", unit), plan, lambda step, steps, e: errors.append(e), constraint)
    return found, errors, module


def test_a_training_ends_at_the_first_measurement_that_is_enough(tmp_path: Path) -> None:
    whole, errors, _ = trained(tmp_path, None)
    assert whole.steps == 100 and len(errors) == 20
    for enough in (errors[3], 0.99 * errors[3], errors[10]):
        found, seen, _ = trained(tmp_path, enough)
        first = next(i for i, error in enumerate(errors) if error <= enough)
        assert seen == errors[: first + 1]
        assert found.steps == 5 * (first + 1) and found.nmse == errors[first] <= enough
        assert whole.nmse < found.nmse, "the rest of the steps would have gone on"


def test_a_start_that_is_enough_takes_no_step(tmp_path: Path) -> None:
    start = trained(tmp_path, None)[0].nmse_start
    found, seen, module = trained(tmp_path, start)
    assert (found.steps, found.best_step, seen) == (0, 0, []) and found.nmse == found.nmse_start == start
    fresh = to_torch(linear(Net(0))).trained_weights()
    assert all(np.array_equal(weights, fresh[name]) for name, weights in module.trained_weights().items())


@pytest.mark.parametrize("unit", [1e-4, 1e4])
def test_enough_is_of_the_nmse_whatever_the_unit_of_the_loss(tmp_path: Path, unit: float) -> None:
    found, *_ = trained(tmp_path, 0.05, unit=unit)
    assert 0 < found.steps < 100 and 0.001 < found.nmse <= 0.05


def test_with_a_constraint_nothing_is_enough_before_it_is_settled(tmp_path: Path) -> None:
    free, *_ = trained(tmp_path, 0.6)
    found, seen, module = trained(tmp_path, 0.6, FirstIsOut())
    assert 0 < free.steps < 50
    assert found.steps == 50 and seen[:-1] == [found.nmse_start] * 9 and found.nmse == seen[-1] <= 0.6
    assert not module.trained_weights()["w"][0].any() and module.trained_weights()["w"][1:].all()
    at_once, _, module = trained(tmp_path, 1e3, FirstIsOut())
    assert at_once.steps == 0 and not module.trained_weights()["w"][0].any()


def test_keys_are_what_they_were_before_there_was_an_enough() -> None:
    plan = Plan(steps=40, batch_size=16, lr=0.1, warmup=0.05, seed=0)
    before: dict[str, Any] = {"steps": 40, "batch_size": 16, "lr": 0.1, "warmup": 0.05, "seed": 0}
    before |= {"device": "cpu", "bf16": False, "seconds": None}
    assert plan.key() == before
    assert fingerprint(plan.key()) == KEY
    assert replace(plan, enough=0.1).key() == before | {"enough": 0.1}
    assert replace(plan, optimiser="muon").key() == before | {"optimiser": "muon"}


# The file


def test_what_a_study_writes_is_read_again(tmp_path: Path) -> None:
    model = residual_cnn(2)
    with opened(model, tmp_path / "captured", samples=64) as partials:
        report = study(partials, StudyPlan((0.05, 0.5), repeats=1, keep=(0.25, 0.75), max_drop=0.05))
    found = read_study(written(tmp_path, report.to_json()))
    assert (found.max_drop, found.metric) == (0.05, report.metric)
    by_students = {one.name: one for one in report.student_tolerances}
    exits = dict(report.exits)
    assert exits.keys() == by_students.keys() and len(exits) == 2
    for name, budgets in found.budgets_of(exits).items():
        one = by_students[name]
        assert budgets.nmse == (one.largest if one.nmse is None else one.nmse)
    (tmp_path / "tolerates.json").rename(tmp_path / "threshold.json")
    assert read_study(tmp_path).noise == found.noise, "its folder will do"
    first = next(iter(exits))
    with pytest.raises(UsageError, match=f"{first} ends at .* there and at 'elsewhere' here: a study of another"):
        found.budgets_of(exits | {first: "elsewhere"})
    with pytest.raises(UsageError, match="no tolerance of n77, n78: a study of another model or partition; run"):
        found.budgets_of(exits | {"n77": "a", "n78": "b"})


def test_students_say_more_than_noise_and_what_was_not_reached_has_no_limit(tmp_path: Path) -> None:
    def entry(name: str, nmse: float | None, largest: float) -> dict[str, Any]:
        return {"name": name, "nmse": nmse, "largest": largest}

    names = dict.fromkeys(["both", "noise", "small", "free", "mixed", "constant", "kept"], "value")
    noise = [entry("both", 0.5, 2), entry("noise", 0.4, 2), entry("small", 0.3, 2), entry("free", None, 2)]
    students = [entry("both", 0.1, 1), entry("small", None, 0.2), entry("free", None, 1), entry("mixed", None, 0.7)]
    noise += [entry("mixed", 0.6, 2), entry("constant", None, 0.0)]
    path = written(tmp_path, document({}, tolerances=noise, student_tolerances=students, kept={"kept": "NaN"}))
    assert read_study(path).budgets_of(names) == {
        "both": ErrorBudget(0.1, 0.1),
        "noise": ErrorBudget(0.4, 0.4),
        "small": ErrorBudget(0.2, 0.3),
        "free": ErrorBudget(1.0, None),
        "mixed": ErrorBudget(0.7, 0.7),
    }


GOOD = {"name": "n02", "nmse": 0.1, "largest": 2.0}


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("{", "found no JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[1]", "found a list"),
        ({"teacher": {}}, "found one without 'max_drop'"),
        (document({}, metric=["accuracy"]), "metric: expected accuracy, agreement or nmse, found a list"),
        (document({}, max_drop="1%"), "max_drop: expected a number from 0 up, found '1%'"),
        (document({}, max_drop=True), "max_drop: expected a number from 0 up, found True"),
        (document({}, tolerances={"n02": 1}), "tolerances: expected a list, found a table"),
        (document({}, tolerances=[3]), r"tolerances\[0\]: expected a table with name, nmse and largest, found 3"),
        (document({}, tolerances=[GOOD, GOOD]), r"tolerances\[1\].name: expected a neighbourhood that is not"),
        (document({}, tolerances=[GOOD | {"nmse": -1}]), r"nmse: expected a number from 0 up, found -1"),
        (document({}, tolerances=[GOOD | {"nmse": math.nan}]), "nmse: expected a number from 0 up, found nan"),
        (document({}, student_tolerances=[GOOD | {"largest": None}]), "largest: expected a number .* found nothing"),
        (document({}, exits={"n02": 3}), "exits: expected names and texts"),
        (document({}, kept=["n02"]), "kept: expected names and texts, found a list"),
        ('{"max_drop": ' + "9" * 5000 + ', "metric": "nmse", "tolerances": [], "student_tolerances": []}', "found inf"),
    ],
)
def test_another_file_is_one_line(tmp_path: Path, what: object, told: str) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        read_study(written(tmp_path, what))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path))


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none.json: cannot read the tolerances: No such file.*`ndonnx threshold`"):
        read_study(tmp_path / "none.json")
    with pytest.raises(UsageError, match=r"threshold.json: cannot read the tolerances"):
        read_study(tmp_path)
    (tmp_path / "binary").write_bytes(b"\x80\x81")
    with pytest.raises(UsageError, match="found no JSON"):
        read_study(tmp_path / "binary")


@pytest.mark.parametrize("command", ["compress", "search"])
def test_the_study_of_another_model_is_bad_input(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(folder)
    written(folder, document({"n02": 0.1, "n04": 0.1}))
    assert main([command, "teacher.onnx", "--data", "data.npz", "--threshold", "tolerates.json", "-q"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "tolerates.json: has no tolerance of n03: a study of another model" in line
    assert not list(folder.glob("**/students/*"))


def test_noise_has_no_tolerances(folder: Path) -> None:
    budgets = written(folder, document(dict.fromkeys(UNITS, 0.1)))
    with pytest.raises(RecipeError, match=r"threshold: .*inputs = 'noise'"):
        go(folder, "run", inputs="noise", threshold=str(budgets))


# A run


def test_a_run_trains_no_further_than_needed_and_tells_what_is_beyond(folder: Path) -> None:
    before = units(go(folder, "run"))
    assert all((n.tolerance, n.steps_saved, n.warning) == (None, None, None) for n in before.values())
    enough = math.sqrt(before["n02"].nmse * before["n02"].nmse_start)
    limit = before["n03"].nmse / 2
    entries = [("n02", 3 * enough, 2.0), ("n03", limit, 2.0), ("n04", None, 0.0)]
    budgets = document({}, tolerances=[{"name": name, "nmse": nmse, "largest": most} for name, nmse, most in entries])
    path, recorder = str(written(folder, budgets)), Recorder()
    after = units(go(folder, "run", recorder, threshold=path))

    lax = after["n02"]
    assert lax.status == "distilled" and lax.tolerance == 3 * enough and lax.warning is None
    assert before["n02"].nmse < lax.nmse <= enough < lax.nmse_start == before["n02"].nmse_start
    assert 0 < lax.steps < 40 and lax.steps_saved == 40 - lax.steps

    strict = after["n03"]
    assert (strict.status, strict.steps, strict.steps_saved) == ("distilled", 40, 0)
    assert strict.nmse == before["n03"].nmse and strict.tolerance == limit
    (note,) = [note for note in recorder.notes if note.startswith("n03")]
    assert note == f"n03: {strict.warning}"
    assert f"NMSE of {strict.nmse:.3g} at width k=0.5, where {limit:.3g} alone costs 1%" in note
    assert "--max-drop 1%" in note and "--freeze" in note
    assert not any(note.startswith(("n02", "n04")) for note in recorder.notes)

    assert after["n04"].status == "reused" and after["n04"].tolerance is None, "nothing is known of it"

    again = units(go(folder, "run", threshold=path))
    assert {n.status for n in again.values()} == {"reused"}
    assert {replace(n, status="") for n in again.values()} == {replace(n, status="") for n in after.values()}


def test_the_tables_tell_of_it(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(folder)
    written(folder, document({"n02": 30.0, "n03": 1e-9, "n04": 30.0}))
    options = ["--steps", "4", "--samples", "64", "--finetune-steps", "0", "--inputs", "teacher"]
    flags = ["--executor", "serial", "--threshold", "tolerates.json", "-q"]
    assert main(["compress", "teacher.onnx", "--data", "data.npz", *options, *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    (head,) = [line for line in lines if line.startswith("neighbourhood")]
    assert "tolerates" in head and "saved" in head
    rows = {line.split()[0]: line for line in lines if line.startswith("n0")}
    assert " 30 " in rows["n02"] and rows["n02"].split().count("4") == 1, "no step, four saved"
    assert "1e-09 alone costs 1%" in rows["n03"]


# Time


def tolerances_of(folder: Path, budgets: dict[str, float | None]) -> ErrorBudgets:
    _, parts = parted(residual_cnn())
    return ErrorBudgets(read_study(written(folder, document(budgets))), parts)


def test_a_time_budget_goes_where_errors_cost_most(tmp_path: Path) -> None:
    found = tolerances_of(tmp_path, {"n02": 0.01, "n03": 0.02, "n04": None})
    even = replace(PLAN, seconds=10.0)
    plans = {name: found.plan(name, even, 1) for name in UNITS}
    assert [plans[name].enough for name in UNITS] == pytest.approx([0.01 / 3, 0.02 / 3, 2.0 / 3])
    # 1/0.01 to 1/0.02, and a third of the even part for what tolerates 2.
    assert [plans[name].seconds for name in UNITS] == pytest.approx([2 / 3 * 80 / 3, 80 / 9, 10 / 3])
    at_once = [found.plan(name, even, 3).seconds for name in UNITS]
    assert at_once == pytest.approx([10, 10, 10]), "three at a time: none can have more than all of the time"
    assert found.plan("n02", PLAN, 1).seconds is None


@given(
    st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=30), st.floats(0.01, 1e4), st.floats(0.01, 1), st.floats(1, 30)
)
def test_shares_keep_the_sum_the_bounds_and_the_order(
    weights: list[float], mean: float, low: float, high: float
) -> None:
    least, most = low * mean, high * mean
    found = shared(weights, mean, least, most)
    assert math.fsum(found) == pytest.approx(mean * len(weights), rel=1e-6)
    assert all(least * (1 - 1e-9) <= share <= most * (1 + 1e-9) for share in found)
    ordered = [share for _, share in sorted(zip(weights, found, strict=True))]
    assert ordered == sorted(ordered)


# A search


def test_the_need_of_a_chosen_student_by_hand() -> None:
    # Twice the drop goes with three times the divergence; what is far from 1% says nothing of it.
    losses = [Loss(0.01, 0.02), Loss(0.02, 0.06), Loss(0.5, 9.0), Loss(0.0, 0.001), Loss(math.inf, math.inf)]
    assert allowed_divergence(losses, 0.01) == pytest.approx(0.01 * 2.5)
    assert allowed_divergence([Loss(0.0, 0.001), Loss(0.0, 0.004)], 0.01) == 0.004, "none of them loses anything"
    need = measured_need(0.025, 0.5, 5)
    assert need is not None and need.tolerance == pytest.approx(0.05) and need.enough == pytest.approx(0.0025)
    free = measured_need(0.025, 0.0, 5)
    assert free is not None and free.enough == free.tolerance == 1.0
    assert measured_need(0.0, 0.5, 5) is None and measured_need(0.025, math.inf, 5) is None


SEARCH: dict[str, Any] = {"candidates": ("width 0.25,0.5",), "steps": 2, "samples": 64}


def library_of(folder: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in (folder / "run").glob("students/*/done.json")}


def test_a_search_trains_chosen_students_in_full_only_where_they_need_it(folder: Path) -> None:
    options: dict[str, Any] = {"steps": 12, "samples": 64, "search": SEARCH, "target": ("params=0.7",)}
    budgets = document({"n02": None, "n03": 1e-7, "n04": 1e-7}, student_tolerances=[GOOD | {"nmse": 30.0}])
    recorder = Recorder()
    found = units(go(folder, "run", recorder, threshold=str(written(folder, budgets)), **options))
    made = {name: n for name, n in found.items() if n.candidate is not None}
    assert len(made) > 1
    for name, n in made.items():
        assert (n.steps, n.steps_saved) == ((2, 10) if name == "n02" else (12, 0))
        assert (n.warning is not None) == (name != "n02") == any(note.startswith(name) for note in recorder.notes)
    there = library_of(folder)
    assert len(there) == 6 + len(made) - ("n02" in made), "candidates are trained whatever their tolerance"

    free = units(go(folder, "run", **options))
    assert {n.steps for n in free.values() if n.candidate is not None} == {12}
    assert there.items() <= library_of(folder).items()


@pytest.mark.parametrize(("seed", "steps"), [(0, 12), (1, 2)], ids=["in full", "as the search has it"])
def test_a_drop_says_what_is_enough(folder: Path, seed: int, steps: int) -> None:
    options: dict[str, Any] = {"steps": 12, "samples": 64, "search": SEARCH, "target": ("params=0.75",)}
    options |= {"optimiser": "adam", "seed": seed}
    found = {name: n for name, n in units(go(folder, "run", max_drop="60%", **options)).items() if n.candidate}
    for n in found.values():
        enough = float(f"{0.25 * n.tolerance / 3:.1e}")
        assert n.steps_saved == 12 - n.steps and n.warning is None
        assert n.nmse <= enough if n.steps < 12 else n.nmse_start > enough
    assert {n.steps for n in found.values()} == {steps}
    there = library_of(folder)
    again = go(folder, "run", max_drop="60%", **options)
    assert library_of(folder) == there
    assert [n.nmse for n in units(again).values() if n.candidate] == [n.nmse for n in found.values()]
