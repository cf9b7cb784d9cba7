"""The choice among trained students: exact against brute force, greedy by its definition, and what comes out of it."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ndonnx.config.recipe import Recipe
from ndonnx.errors import RecipeError, SearchError, UsageError
from ndonnx.report.search import OptionReport, SearchedStudent, SearchReport
from ndonnx.select import (
    DEFAULT_CANDIDATES,
    TEACHER,
    Choice,
    Option,
    Table,
    greedy,
    greedy_to,
    greedy_under,
    in_float,
    nearest,
    pareto,
    parse_candidates,
    parse_drop,
    parse_target,
    solve,
)
from ndonnx.select.table import undominated

# Tables


def table_of(rows: list[list[tuple[float, float, float]]], fixed: tuple[float, float] = (0, 0)) -> Table:
    """A table of `params`, `latency` and drop; the first of each row is the teacher's."""
    return Table(
        [
            Option(f"n{i}", TEACHER if j == 0 else f"c{j}", {"params": params, "latency": latency}, drop)
            for i, row in enumerate(rows)
            for j, (params, latency, drop) in enumerate(row)
        ],
        {"params": fixed[0], "latency": fixed[1]},
    )


def every_choice(table: Table) -> Iterator[Choice]:
    rows = [[option.candidate for option in table.options(name)] for name in table.neighbourhoods]
    return (table.choose(dict(zip(table.neighbourhoods, taken, strict=True))) for taken in itertools.product(*rows))


def is_within(choice: Choice, bounds: dict[str, float], max_drop: float = math.inf) -> bool:
    return choice.drop <= max_drop and all(choice.totals[cost] <= bound for cost, bound in bounds.items())


eighths = st.integers(0, 400).map(lambda n: n / 8)  # sums of these are exact, so that ties are ties
drops = st.one_of(
    st.integers(-20, 200).map(lambda n: n / 1024),
    st.sampled_from([2.0**-30, 2.0**-20, 1024.0]),  # what a search meets when a candidate breaks the model
)


@st.composite
def tables(draw: st.DrawFn, params: st.SearchStrategy[float] = eighths) -> Table:
    cells = st.tuples(params, eighths, drops)
    teachers = st.tuples(params, eighths, st.just(0.0))
    rows = st.tuples(teachers, st.lists(cells, max_size=3)).map(lambda row: [row[0], *row[1]])
    return table_of(draw(st.lists(rows, min_size=1, max_size=4)), draw(st.tuples(eighths, eighths)))


@st.composite
def tables_with_bounds(draw: st.DrawFn) -> tuple[Table, dict[str, float]]:
    """A table, and bounds at, just under or just over what some choice costs."""
    table = draw(tables(params=st.one_of(eighths, st.integers(0, 30_000_000).map(float))))
    places = list(every_choice(table))
    bounds = {
        cost: draw(st.sampled_from(places)).totals[cost] + draw(st.sampled_from([0.0, -1 / 8, 1.0]))
        for cost in draw(st.lists(st.sampled_from(table.costs), unique=True))
    }
    return table, bounds


# The exact programme


@settings(max_examples=60)
@given(tables_with_bounds())
def test_programme_finds_what_brute_force_finds(drawn: tuple[Table, dict[str, float]]) -> None:
    table, bounds = drawn
    within = [choice for choice in every_choice(table) if is_within(choice, bounds)]
    if not within:
        with pytest.raises(SearchError, match="is the least"):
            solve(table, bounds=bounds)
        return
    found = solve(table, bounds=bounds)
    assert is_within(found, bounds)
    assert found.drop == pytest.approx(min(choice.drop for choice in within), rel=1e-12, abs=1e-12)
    assert found == table.choose(found.candidates)


@settings(max_examples=40)
@given(tables_with_bounds(), drops.map(abs), st.sampled_from(["params", "latency"]))
def test_programme_finds_the_lowest_cost_under_a_drop(
    drawn: tuple[Table, dict[str, float]], max_drop: float, cost: str
) -> None:
    table, bounds = drawn
    within = [choice for choice in every_choice(table) if is_within(choice, bounds, max_drop)]
    if not within:
        with pytest.raises(SearchError, match="is the least"):
            solve(table, cost, bounds, max_drop)
        return
    found = solve(table, cost, bounds, max_drop)
    assert is_within(found, bounds, max_drop)
    lowest = min(choice.totals[cost] for choice in within)
    assert found.totals[cost] == lowest
    assert found.drop == pytest.approx(
        min(choice.drop for choice in within if choice.totals[cost] == lowest), rel=1e-9, abs=1e-9
    )


@settings(max_examples=30)
@given(tables(), st.integers(0, 100))
def test_equally_good_choices_are_settled_by_cost(table: Table, percent: int) -> None:
    low, high = table.least("params"), table.teacher.totals["params"]
    bounds = {"params": low + max(high - low, 0) * percent / 100}
    found = solve(table, bounds=bounds)
    rivals = [choice for choice in every_choice(table) if is_within(choice, bounds, found.drop)]
    assert found.totals["params"] == min(choice.totals["params"] for choice in rivals)
    assert solve(table, bounds=bounds) == found


@pytest.mark.parametrize("short", [1, 2, 100])
def test_a_bound_holds_to_the_last_parameter(short: int) -> None:
    # A part in a hundred million is far under the solver's tolerance, and still over the bound.
    rows = [[(25_000_000, 1, 0), (12_500_000 + i, 1, 0.01 / (i + 1))] for i in range(6)]
    table = table_of([[(float(p), t, d) for p, t, d in row] for row in rows])
    bounds = {"params": 6 * 12_500_000.0 + 15 - short}
    with pytest.raises(SearchError):
        solve(table, bounds=bounds)
    with_room = {"params": bounds["params"] + 25_000_000 - 12_500_000}
    within = [choice for choice in every_choice(table) if is_within(choice, with_room)]
    found = solve(table, bounds=with_room)
    assert is_within(found, with_room)
    assert found.drop == pytest.approx(min(choice.drop for choice in within), rel=1e-12)


@settings(max_examples=30)
@given(tables(), st.data())
def test_dominated_options_change_no_optimum(table: Table, data: st.DataObject) -> None:
    needed = {
        name: {o.candidate for o in undominated(table.options(name), table.costs)} for name in table.neighbourhoods
    }
    bound = data.draw(st.sampled_from(list(every_choice(table)))).totals
    within = [choice for choice in every_choice(table) if is_within(choice, dict(bound))]
    without = [c for c in within if all(candidate in needed[name] for name, candidate in c.candidates.items())]
    assert min(choice.drop for choice in without) == min(choice.drop for choice in within)
    for cost in table.costs:
        assert min(choice.totals[cost] for choice in without) == min(choice.totals[cost] for choice in within)


def test_of_equal_options_the_first_stays() -> None:
    options = [Option("n0", name, {"params": 1.0}, 0.5) for name in ("a", "b")]
    assert [option.candidate for option in undominated(options, ["params"])] == ["a"]


def test_noise_below_zero_earns_nothing() -> None:
    # Three "better than the teacher" by luck must not pay for a student that is worse.
    table = table_of([[(10, 1, 0), (5, 1, -0.02)]] * 3 + [[(10, 1, 0), (1, 1, 0.01)]])
    assert solve(table, "params", max_drop=0.0).candidates == {"n0": "c1", "n1": "c1", "n2": "c1", "n3": TEACHER}
    assert solve(table, "params", max_drop=0.01).drop == 0.01


def test_what_cannot_be_had_is_said_with_what_can() -> None:
    table = table_of([[(60, 50, 0), (20, 40, 0.02)], [(40, 50, 0), (10, 45, 0.05)]])
    with pytest.raises(SearchError, match=r"params 20\.0% of the teacher's cannot be reached: params 30\.0%"):
        solve(table, bounds=table.bounds({"params": 0.2}))
    with pytest.raises(SearchError, match=r"params 50\.0%.* with a summed drop of at most 0\.03: params 60\.0%"):
        solve(table, bounds=table.bounds({"params": 0.5}), max_drop=0.03)
    with pytest.raises(SearchError, match=r"latency 80\.0%.* with params 30\.0%.*: latency 85\.0%"):
        solve(table, bounds=table.bounds({"params": 0.3, "latency": 0.8}))
    with pytest.raises(SearchError, match="summed drop of at most -1"):
        solve(table, max_drop=-1)


@settings(max_examples=40)
@given(tables(), st.floats(0.05, 1.0), st.floats(0.05, 1.0), drops.map(abs))
def test_nearest_misses_by_the_least_factor(table: Table, params: float, latency: float, max_drop: float) -> None:
    bounds = table.bounds({"params": params, "latency": latency})

    def factor(choice: Choice) -> float:
        return max([1.0, *(choice.totals[cost] / bound for cost, bound in bounds.items() if bound > 0)])

    found = nearest(table, bounds, max_drop)
    assert found.drop <= max_drop
    within = [choice for choice in every_choice(table) if choice.drop <= max_drop]
    assert factor(found) == pytest.approx(min(map(factor, within)), rel=1e-6)


def test_a_model_without_neighbourhoods_is_its_teacher() -> None:
    table = Table([], {"params": 8.0})
    assert solve(table, bounds={"params": 8.0}) == table.teacher == greedy(table, 1.0, "params")
    assert pareto(table, "params", 3) == []
    with pytest.raises(SearchError, match=r"params 100\.0%"):
        solve(table, bounds={"params": 4.0})


# Greedy


@settings(max_examples=40)
@given(tables(), drops.map(abs))
def test_greedy_takes_the_cheapest_that_loses_little(table: Table, x: float) -> None:
    found = greedy(table, x, "params")
    for name, candidate in found.candidates.items():
        row = {option.candidate: option for option in table.options(name)}
        assert row[candidate].loss <= x
        assert row[candidate].costs["params"] == min(o.costs["params"] for o in row.values() if o.loss <= x)


@settings(max_examples=40)
@given(tables_with_bounds())
def test_greedy_to_takes_the_smallest_threshold(drawn: tuple[Table, dict[str, float]]) -> None:
    table, bounds = drawn
    bounds = bounds or {"params": table.teacher.totals["params"]}
    cost = next(iter(bounds))
    thresholds = sorted({option.loss for option in table})
    reaching = [x for x in thresholds if is_within(greedy(table, x, cost), bounds)]
    if not reaching:
        with pytest.raises(SearchError, match="everywhere"):
            greedy_to(table, bounds)
        return
    assert greedy_to(table, bounds) == greedy(table, reaching[0], cost)
    assert solve(table, bounds=bounds).drop <= greedy_to(table, bounds).drop + 1e-12


@settings(max_examples=40)
@given(tables(), drops.map(abs))
def test_programme_is_never_worse_than_greedy_under_a_drop(table: Table, max_drop: float) -> None:
    rough = greedy_under(table, max_drop, "params")
    assert rough.drop <= max_drop
    assert solve(table, "params", max_drop=max_drop).totals["params"] <= rough.totals["params"]


def test_greedy_under_says_what_it_cannot_keep() -> None:
    table = table_of([[(60, 50, 0), (20, 40, 0.02)]])
    assert greedy_under(table, 0.02, "params", {"params": 20}).candidates == {"n0": "c1"}
    with pytest.raises(SearchError, match=r"summed drop of at most 0\.01"):
        greedy_under(table, 0.01, "params", {"params": 20})


# The trade-off curve


@pytest.mark.slow
@settings(max_examples=30)
@given(tables(), st.integers(1, 6))
def test_curve_holds_the_best_only(table: Table, count: int) -> None:
    curve = pareto(table, "params", count)
    whole = table.teacher.totals["params"]
    assert len(curve) <= count
    for choice in curve:
        assert choice.totals["params"] < whole
        better = [other for other in every_choice(table) if other.totals["params"] <= choice.totals["params"]]
        assert choice.drop == pytest.approx(min(other.drop for other in better), rel=1e-12, abs=1e-12)
    for cheap, dear in itertools.pairwise(curve):
        assert cheap.totals["params"] < dear.totals["params"]
        assert cheap.drop > dear.drop
    assert pareto(table, "params", count) == curve


def test_curve_fills_its_gaps_and_stays_within_what_is_asked() -> None:
    steps = [(100, 1, 0.0), *((p, 1, (100 - p) / 1000) for p in (98, 96, 94, 92, 10))]
    table = table_of([steps])
    # Evenly spread bounds alone would give 10 again and again.
    assert {choice.totals["params"] for choice in pareto(table, "params", 9)} == {10, 92, 94, 96, 98}
    assert len(pareto(table, "params", 3)) == 3
    assert [choice.totals["params"] for choice in pareto(table, "params", 2, least=50, most=97)] == [10, 96]
    assert {choice.totals["params"] for choice in pareto(table, "params", 9, most=95)} == {10, 92, 94}
    with pytest.raises(SearchError, match="is the least"):
        pareto(table, "params", 3, most=5)


# The table


def test_totals_shares_and_baseline() -> None:
    table = table_of([[(60, 4, 0), (20, 3, 0.02)], [(30, 4, 0)]], fixed=(10, 2))
    uniform = table.uniform("c1")
    assert uniform.candidates == {"n0": "c1", "n1": TEACHER}
    assert (table.total(uniform, "params"), table.share(uniform, "params")) == (60, 0.6)
    assert table.share(uniform, "latency") == 0.9
    assert table.bounds({"params": 0.5}) == {"params": 50}
    assert table.least("latency") == 9
    assert table.teacher.drop == 0


def test_a_measured_whole_corrects_what_candidates_save() -> None:
    table = table_of([[(60, 4, 0), (20, 3, 0.02), (10, 0.5, 0.1)]], fixed=(0, 2))
    corrected = table.corrected("latency", 2.0)
    assert [option.costs["latency"] for option in corrected.options("n0")] == [4, 2, 0]
    assert [option.costs["params"] for option in corrected.options("n0")] == [60, 20, 10]
    assert corrected.teacher == table.teacher


@pytest.mark.parametrize(
    ("options", "fixed", "message"),
    [
        ([Option("n0", "c1", {"params": 1}, 0.0)], {}, "expected an option 'teacher'"),
        ([Option("n0", TEACHER, {"params": 1}, 0.1)], {}, "with drop 0"),
        ([Option("n0", TEACHER, {"params": 1}, 0.0)] * 2, {}, "twice"),
        ([Option("n0", TEACHER, {"params": -1}, 0.0)], {}, "at least 0"),
        ([Option("n0", TEACHER, {"params": 1}, 0.0), Option("n0", "c", {"macs": 1}, 0.0)], {}, r"\['macs'\]"),
        ([Option("n0", TEACHER, {"params": 1}, 0.0), Option("n0", "c", {"params": 1}, math.nan)], {}, "finite"),
        ([Option("n0", TEACHER, {"params": 1}, 0.0)], {"macs": 1}, "fixed costs"),
    ],
)
def test_a_wrong_table_is_refused(options: list[Option], fixed: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Table(options, fixed)


def test_a_strange_choice_is_refused() -> None:
    table = table_of([[(1, 1, 0)]])
    with pytest.raises(KeyError, match="n7"):
        table.choose({"n7": TEACHER})
    with pytest.raises(KeyError, match="c9"):
        table.choose({"n0": "c9"})


# Candidates and targets


def test_candidates_are_read_cheapest_first() -> None:
    found = parse_candidates(["width 0.50, 0.25", "sparsity 2:4,0.90", "lowrank .5", "activation Silu=Relu", "removal"])
    assert [candidate.spec for candidate in found] == [
        "removal",
        "sparsity 0.9",
        "width 0.25",
        "width 0.5",
        "sparsity 2:4",
        "lowrank 0.5",
        "activation Silu=Relu",
    ]
    assert parse_candidates("0.25, 0.5, sparsity 2:4") == parse_candidates(("width 0.25,0.5", "sparsity 2:4"))
    for candidate in found:
        assert parse_candidates(candidate.spec) == (candidate,)


def test_candidates_in_8_bits_are_made_of_those_in_float() -> None:
    found = {c.spec: c for c in parse_candidates("width 0.25, 0.50+int8, int8, lowrank .5 + int8, width 1 + int8")}
    assert list(found) == ["width 0.5 + int8", "lowrank 0.5 + int8", "width 0.25", "int8"], "cheapest first, each once"
    assert {spec: c.bits for spec, c in found.items()} == {spec: 8 if "int8" in spec else 32 for spec in found}
    trained = [c.in_float for c in found.values()]
    assert [None if c is None else c.spec for c in trained] == ["width 0.5", "lowrank 0.5", "width 0.25", None]
    assert trained[0] is not None and trained[0].size == 0.5
    twins = [c.spec for c in parse_candidates("width 0.5, sparsity 2:4", bits=8)]
    assert twins == ["width 0.5 + int8", "sparsity 2:4 + int8", "int8", "width 0.5", "sparsity 2:4"]
    for spec in twins:
        assert [c.spec for c in parse_candidates(spec)] == [spec]
    assert [in_float(spec) for spec in ("width 0.5 + int8", "int8", "width 0.5")] == ["width 0.5", TEACHER, "width 0.5"]


@pytest.mark.parametrize(
    "entry",
    [
        "int8 + int8",
        "width 0.5 + int8 + int8",
        "int8 + width 0.5",
        "width 0.5 + int4",
        "width 0.5 +",
        "+ int8",
        "int8 8",
    ],
)
def test_nonsense_about_bits_is_named(entry: str) -> None:
    with pytest.raises(RecipeError, match="int8") as caught:
        parse_candidates(["width 0.5", entry])
    assert repr(entry) in str(caught.value) and "\n" not in str(caught.value)


def test_what_8_bits_lose_and_save_can_be_corrected() -> None:
    def options(name: str) -> list[Option]:
        return [
            Option(name, TEACHER, {"latency": 10.0}, 0.0),
            Option(name, "width 0.5", {"latency": 6.0}, 0.3),
            Option(name, "int8", {"latency": 9.0}, 0.1, 0.1),
            Option(name, "width 0.5 + int8", {"latency": 5.5}, 0.36, 0.06),
        ]

    table = Table([*options("n1"), *options("n2")])
    rounded = {o.candidate: o.drop for o in table.rounded(0.5) if o.neighbourhood == "n1"}
    assert rounded == pytest.approx({TEACHER: 0.0, "width 0.5": 0.3, "int8": 0.05, "width 0.5 + int8": 0.33})
    # All in 8 bits was predicted to save 2 of 20, and saves half.
    sped_up = {o.candidate: o.costs["latency"] for o in table.sped_up(0.5) if o.neighbourhood == "n2"}
    assert sped_up == pytest.approx({TEACHER: 10.0, "width 0.5": 6.0, "int8": 5.0, "width 0.5 + int8": 3.5})
    assert {o.candidate for o in table.of_bits(32)} == {TEACHER, "width 0.5"}


def test_candidates_become_recipes() -> None:
    base = Recipe(steps=7)
    by_spec = {
        candidate.spec: candidate for candidate in parse_candidates("width 0.3, sparsity 2:4, activation Silu=Relu")
    }
    assert by_spec["width 0.3"].recipe(base) == Recipe(steps=7, method="width", keep=0.3)
    assert by_spec["sparsity 2:4"].recipe(base) == Recipe(steps=7, method="sparsity", sparsity="2:4")
    assert by_spec["activation Silu=Relu"].recipe(base) == Recipe(steps=7, method="activation", swap=("Silu=Relu",))
    assert parse_candidates("custom leaves:build")[0].recipe(base).student == "leaves:build"


def test_the_paper_s_multipliers_are_among_the_default() -> None:
    found = parse_candidates(DEFAULT_CANDIDATES)
    widths = [candidate.overrides["keep"] for candidate in found if candidate.method == "width"]
    assert widths == [k / 10 for k in range(1, 10)]
    assert {candidate.method for candidate in found} == {"width", "lowrank"}


def test_the_teacher_needs_no_training() -> None:
    assert [candidate.spec for candidate in parse_candidates("0.5, 1.0, sparsity 0, lowrank 1")] == ["width 0.5"]
    with pytest.raises(RecipeError, match="nothing but the teacher"):
        parse_candidates("width 1")


@pytest.mark.parametrize(
    "entry",
    ["", "width", "width 0", "width 1.5", "width nan", "width 0.5 0.6", "sparsity 4:2", "sparsity 1", "prune 0.5",
     "removal 1", "activation Silu", "activation =Relu", "custom leaves", "lowrank x", "teacher"],
)  # fmt: skip
def test_a_wrong_candidate_is_named(entry: str) -> None:
    with pytest.raises(RecipeError, match=r"not one of .*width K") as caught:
        parse_candidates(["sparsity 0.5", entry])
    assert repr(entry) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_targets_are_parts_of_the_teacher() -> None:
    assert parse_target("params=0.5, latency=60%") == {"params": 0.5, "latency": 0.6}
    assert parse_target(["size=.25", "macs=1"]) == {"size": 0.25, "macs": 1.0}
    assert parse_target(()) == {}


@pytest.mark.parametrize(
    "target", ["0.5", "params", "params=", "params=0", "params=1.1", "speed=0.5", "params=nan", ""]
)
def test_a_wrong_target_is_named(target: str) -> None:
    with pytest.raises(RecipeError, match="expected COST=PART"):
        parse_target(target)


def test_a_target_is_named_once() -> None:
    with pytest.raises(RecipeError, match=r"params has the target 0\.5 already"):
        parse_target(["params=0.5", "params=0.6"])


@pytest.mark.parametrize(
    ("text", "value"), [("1%", 0.01), ("0.01", 0.01), ("0.5 %", 0.005), (0.02, 0.02), ("0", 0.0), ("1e-3", 0.001)]
)
def test_drops_are_read(text: str | float, value: float) -> None:
    assert parse_drop(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["1", "100%", "-1%", "one", "", "nan", "1%%"])
def test_a_wrong_drop_is_named(text: str) -> None:
    with pytest.raises(RecipeError, match=f"max-drop '{text}': expected"):
        parse_drop(text)


# The report


def student(name: str, source: str, share: float, metric: float | None, candidate: str) -> SearchedStudent:
    return SearchedStudent(
        name=name,
        source=source,  # type: ignore[arg-type]
        params=int(1000 * share),
        macs=int(2000 * share),
        bytes=4000,
        latency=None,
        shares={"params": share, "macs": share},
        predicted_drop=0.01,
        measured_drop=None if metric is None else 0.9 - metric,
        metric=metric,
        candidates={"n0": candidate, "n1": "sparsity 2:4" if source == "searched" else candidate},
    )


def report(**changes: object) -> SearchReport:
    values = {
        "model": "net $1$.onnx",
        "cost": "params",
        "quality": "accuracy",
        "samples": 500,
        "target": {"params": 0.5},
        "max_drop": 0.01,
        "students": [
            student("teacher", "teacher", 1.0, 0.9, TEACHER),
            student("pareto-1", "searched", 0.6, 0.89, "width 0.7"),
            student("pareto-0", "searched", 0.4, 0.85, "removal"),
            student("uniform-0.5", "uniform", 0.5, 0.8, "width 0.5"),
        ],
        "options": [OptionReport("n0", "width 0.7", "trained", {"params": 300.0}, -0.001, 0.02)],
        "seconds": {"total": 1.5},
        "run_dir": "net.run",
    }
    return SearchReport(**(values | changes))  # type: ignore[arg-type]


def test_document_is_json_whatever_was_measured(tmp_path: Path) -> None:
    broken = student("pareto-2", "searched", 0.1, math.nan, "width 0.1")
    report(students=[broken]).write(tmp_path / "search.json")
    document = json.loads((tmp_path / "search.json").read_text())
    assert document["students"][0]["metric"] is None
    assert document["students"][0]["candidates"] == {"n0": "width 0.1", "n1": "sparsity 2:4"}
    assert document["options"][0]["drop"] == -0.001


def test_csv_has_a_row_a_student(tmp_path: Path) -> None:
    report().write_csv(tmp_path / "students.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "students.csv").read_text())))
    assert [row["name"] for row in rows] == ["teacher", "pareto-1", "pareto-0", "uniform-0.5"]
    assert rows[1]["n0"] == "width 0.7" and rows[1]["n1"] == "sparsity 2:4"
    assert float(rows[1]["params_share"]) == 0.6
    assert rows[1]["latency"] == rows[1]["latency_share"] == ""


def test_students_are_in_the_order_of_their_cost() -> None:
    assert [each.name for each in report().of("searched")] == ["pareto-0", "pareto-1"]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_picture_is_drawn(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"curve{suffix}"
    report().draw(path)
    content = path.read_bytes()
    if suffix == ".svg":
        text = content.decode()
        for word in ("net $1$.onnx", "sp 2:4", "rm", "uniform multiplier", "pareto-0"):
            assert word in text
    elif suffix == ".png":
        with Image.open(path) as image:
            assert image.width > 500 and len(image.convert("RGB").getcolors(2**24)) > 20
    else:
        assert content.startswith(b"%PDF")
    assert list(tmp_path.iterdir()) == [path]


def test_picture_copes_with_what_is_not_there(tmp_path: Path) -> None:
    # No labels, nothing measured, no searched student, and a network of many neighbourhoods.
    report(quality="nmse", students=[student("teacher", "teacher", 1.0, None, TEACHER)]).draw(tmp_path / "a.png")
    report(students=[]).draw(tmp_path / "b.png")
    wide = student("pareto-0", "searched", 0.5, math.nan, "width 0.5")
    wide.candidates.update({f"n{i}": "width 0.5" for i in range(100)})
    report(students=[wide]).draw(tmp_path / "c.png")
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "b.png", "c.png"}


def test_a_picture_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ends in \.png, \.svg, \.pdf"):
        report().draw(tmp_path / "curve.bmp")
    assert not list(tmp_path.iterdir())
