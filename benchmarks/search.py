"""What a search promises, measured: the quality at a size, drops that are not exceeded, latencies that are there.

    python -m benchmarks.search budgets MODEL --data SRC --eval SRC [--recipe FILE] [--budgets B,B] [--cost params]
    python -m benchmarks.search promises MODEL --data SRC --eval SRC [--recipe FILE] [--seeds N] [--max-drop 1%]
    python -m benchmarks.search latency MODEL --data SRC [--recipe FILE] [--target PART]
    each with --demo instead of a model and its data, [--run DIR] [--out FILE]

budgets. For each budget (a part of the teacher's parameters or MACs) the student of `ndonnx.compress --target`, against
the student with one multiplier for all neighbourhoods: the largest in thousandths that costs no more than the budget.
Its widths are rounded as the searched ones; where even its smallest student is too large then, to multiples of 1, and
the table says so. Both have the same training and held-out rows, the same steps (the recipe's; a search otherwise
trains candidates for a fifth of them), and are composed alike, without fine-tuning unless --finetune-steps says
otherwise. Neither has exactly the budget's cost: the table has what each has. All searches share one run directory,
so that only the first one trains; what each of them trained was counted, and its seconds are those of the whole call.

promises. `ndonnx.compress --max-drop` with one seed after the other, each in a run directory of its own: the seed
decides which rows are trained on, chosen by, and tested on. The promise is that the drop is at most so large, with 95%
confidence, by a test on rows that nothing else saw; whether it is true is judged on --eval, which the run never sees,
in the measure that was promised (accuracy where --data has labels, else agreement). --eval is a sample too: a drop
just below the limit may be measured above it. A run whose test fails says so and promises nothing; it is counted apart.

latency. `ndonnx.compress --target latency=PART`, then the ratio of student and teacher measured afresh, twice, by
`ndonnx.benchmark`: on one sample, in new processes.

--run DIR keeps the work: an interrupted measurement goes on there, and what was measured is not measured again. The
seconds of a search that was interrupted are those since, marked by `>`. --out writes what is printed as JSON.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ndonnx
from benchmarks import common
from benchmarks.common import Notes
from benchmarks.search_bench import Bench, Row, UniformCosts, quality_in, seconds_text, training_text
from ndonnx.config.recipe import Recipe
from ndonnx.flow.block_table import Tabulated
from ndonnx.flow.prepare import Request, prepare
from ndonnx.flow.search_session import SearchSession
from ndonnx.runtime.fingerprints import fingerprint
from ndonnx.runtime.machine import usable_cores
from ndonnx.runtime.run_directory import RunDir
from ndonnx.select import parse_drop

BUDGETS = (0.35, 0.5, 0.65, 0.8, 0.9)
FRESH = 2
"""Times that a latency is measured afresh."""
_NOISE = 1e-9
"""Rounding of a difference of two shares."""


# Budgets


def budgets(bench: Bench) -> Row:
    """Searched and uniform students of the same size."""
    options, cost = bench.options, bench.options.cost
    base = bench.subject.recipe
    search = base.search.model_copy(update={"steps": base.steps})
    base = base.model_copy(update={"search": search, "max_drop": None, "target": ()})
    teacher = quality_in(bench.measure, bench.teacher)  # what --eval does not tell is said before hours of work
    searched = [_searched(bench, base, budget) for budget in options.budgets]
    costs = UniformCosts(bench.subject.partition(), cost)
    rows = []
    for budget, found in zip(options.budgets, searched, strict=True):
        other = _uniform(bench, base, costs, budget)
        gain = None if other is None else 100 * (found["quality"] - other["quality"])
        rows.append({"budget": budget, "searched": found, "uniform": other, "gain": gain})
    _print_budgets(bench, rows, teacher)
    return {"cost": cost, "measure": bench.measure, "teacher": teacher, "rows": rows}


def _searched(bench: Bench, base: Recipe, budget: float) -> Row:
    cost = bench.options.cost
    recipe = base.model_copy(update={"target": (f"{cost}={budget}",)})
    output = bench.folder / "students" / f"{cost}-{budget}.onnx"

    def measure() -> Row:
        found = bench.compress(recipe, bench.folder / "search", output)
        return found | {"share": found["shares"][cost], "quality": bench.quality(output)}

    return bench.once("searched", recipe, measure)


def _uniform(bench: Bench, base: Recipe, costs: UniformCosts, budget: float) -> Row | None:
    """The best of one multiplier; None where not even the smallest is within the budget."""
    roundings = dict.fromkeys((base.round_to, 1))
    fitting = ((keep, to) for to in roundings if (keep := costs.largest(budget, to)) is not None)
    keep, round_to = next(fitting, (None, None))
    if keep is None:
        return None
    search = base.search.model_copy(update={"candidates": (f"width {keep}",)})
    recipe = base.model_copy(update={"round_to": round_to, "search": search})

    def measure() -> Row:
        subject = bench.subject
        request = Request(subject.model, subject.data, run_dir=bench.folder / "search")
        with prepare(request, recipe, Notes(), searched=True) as run, SearchSession(run) as work:
            work.train()
            (candidate,) = work.candidates
            choice = Tabulated(work.library).table(latency=False).uniform(candidate.spec)
            whole = work.finish(choice.candidates, in_full=False)
            share, quality = whole.shares[bench.options.cost], bench.quality(whole.path)
        rounded = round_to != base.round_to
        return {"keep": keep, "round_to": round_to, "other_rounding": rounded, "share": share, "quality": quality}

    return bench.once(f"uniform-{bench.options.cost}", recipe, measure)


def _print_budgets(bench: Bench, rows: Sequence[Row], teacher: float) -> None:
    measure = bench.measure
    columns = ("budget", "searched", measure, "k", "uniform", measure, "gain, points", "seconds", "trained")
    print(f"teacher: {common.percent(teacher)}\n")
    cells = []
    for row in rows:
        found, other = row["searched"], row["uniform"]
        k = "-" if other is None else f"{other['keep']:g}{'*' if other['other_rounding'] else ''}"
        uniform = [None, None] if other is None else [other["share"], other["quality"]]
        cells.append(
            [
                f"{row['budget']:g}",
                common.percent(found["share"]) + ("!" if found["missed"] else ""),
                common.percent(found["quality"]),
                k,
                *map(common.percent, uniform),
                "-" if row["gain"] is None else f"{row['gain']:+.2f}",
                seconds_text(found),
                str(found["trained"]),
            ]
        )
    common.print_table(f"Searched against uniform: parts of the teacher's {bench.options.cost}", columns, cells)
    for number, row in enumerate(rows, start=1):
        print(f"search {number} ({row['budget']:g}): {training_text(row['searched'])}")
    if any(row["searched"]["missed"] for row in rows):
        print("! the budget was not reached; this is the nearest student")
    if over := [
        f"{row['budget']:g}" for row in rows if row["uniform"] and row["uniform"]["share"] > row["budget"] + _NOISE
    ]:
        print(f"uniform students over the budget, since some neighbourhoods could not be shrunk: {', '.join(over)}")
    if any(row["uniform"] is not None and row["uniform"]["other_rounding"] for row in rows):
        print("* rounded to multiples of 1: no student within the budget otherwise")


# Promises


def promises(bench: Bench) -> Row:
    """Whether the drops that runs promise are those on data that none of them saw."""
    max_drop = parse_drop(bench.options.max_drop)
    subject, first = bench.subject, bench.subject.recipe.seed
    if subject.open(subject.data).has_labels and bench.teacher.agreement is not None:
        quality_in("accuracy", bench.teacher)  # it will be promised
    rows = []
    for seed in range(first, first + bench.options.seeds):
        found = _promised(bench, seed)
        rows.append(found | {"seed": seed, "outcome": outcome(found, max_drop)})
        Notes().note(f"seed {seed}: {rows[-1]['outcome']}")
    _print_promises(rows, max_drop)
    return {"max_drop": max_drop, "rows": rows, "counted": counted(rows)}


def _promised(bench: Bench, seed: int) -> Row:
    asked = {"seed": seed, "max_drop": bench.options.max_drop, "target": ()}
    recipe = bench.subject.recipe.model_copy(update=asked)
    folder = bench.folder / f"seed-{seed}"

    def measure() -> Row:
        found = bench.compress(recipe, folder / "run", folder / "student.onnx")
        student = bench.evaluate(folder / "student.onnx")
        kind = found["measure"]
        lost = (1.0 if kind != "accuracy" else quality_in(kind, bench.teacher)) - quality_in(kind, student)
        return found | {"eval_drop": lost if math.isfinite(lost) else None, "eval_samples": student.samples}

    return bench.once("promised", recipe, measure)


def outcome(found: Mapping[str, Any], max_drop: float) -> str:
    """`held` or `broken`; `not promised` where the run itself says that it did not get there."""
    if found["missed"] is not None:
        return "not promised"
    lost = found["eval_drop"]
    return "held" if lost is not None and lost <= max_drop + _NOISE else "broken"


def counted(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many runs ended in which way."""
    return {kind: sum(row["outcome"] == kind for row in rows) for kind in ("held", "broken", "not promised")}


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many promises hold, and which do not."""
    counts = counted(rows)
    made = counts["held"] + counts["broken"]
    lines = [f"{counts['held']} of {made} promises hold"]
    broken = [f"seed {row['seed']} ({_points(row['eval_drop'])})" for row in rows if row["outcome"] == "broken"]
    if broken:
        lines.append(f"broken on --eval: {', '.join(broken)}")
    if counts["not promised"]:
        lines.append(f"{counts['not promised']} of {len(rows)} runs promised nothing")
    return "\n".join(lines)


def _print_promises(rows: Sequence[Row], max_drop: float) -> None:
    columns = ("seed", "parameters", "drop in its test", "bound", "rows", "drop on --eval", "seconds", "outcome")
    cells = [
        [
            str(row["seed"]),
            common.percent(row["shares"]["params"]),
            _points(row["drop"]),
            _points(row["bound"]),
            str(row["held_out"]),
            _points(row["eval_drop"]),
            seconds_text(row),
            row["outcome"],
        ]
        for row in rows
    ]
    measures = ", ".join(dict.fromkeys(row["measure"] for row in rows))
    common.print_table(f"Promised: a drop of at most {max_drop:.2%} ({measures})", columns, cells)
    print(summary(rows))


def _points(drop: float | None) -> str:
    return "not finite" if drop is None else f"{drop:.2%}"


# Latency


def latency(bench: Bench) -> Row:
    """What a search says of its student's latency, against new measurements."""
    target = bench.options.target
    recipe = bench.subject.recipe.model_copy(update={"target": (f"latency={target}",), "max_drop": None})
    # Its own file for every recipe: what is measured afresh later must be what the search spoke of.
    output = bench.folder / "students" / f"latency-{target}-{fingerprint(recipe.model_dump(mode='json'))[:8]}.onnx"
    found = bench.once("said", recipe, lambda: bench.compress(recipe, bench.folder / "search", output))
    said = found["shares"]["latency"]
    times = [bench.once(f"fresh-{number}", recipe, lambda: _fresh(bench, output)) for number in range(1, FRESH + 1)]
    fresh = [time | {"off_said": time["ratio"] / said - 1, "off_target": time["ratio"] / target - 1} for time in times]
    rows = [
        ("target", f"{target:.3f}", "", "", ""),
        ("the search says", f"{said:.3f}", "", _off(said / target - 1), ""),
    ]
    for number, time in enumerate(fresh, start=1):
        interval = f"{time['low']:.3f} to {time['high']:.3f}"
        cells = f"{time['ratio']:.3f}", interval, _off(time["off_target"]), _off(time["off_said"])
        rows.append((f"measured afresh, {number}", *cells))
    columns = ("latency, part of the teacher's", "ratio", "95% interval", "off the target", "off what was said")
    common.print_table(f"Latency on one sample, {usable_cores()} threads", columns, rows)
    print(f"the search: {training_text(found)}" + (f"; {found['missed']}" if found["missed"] else ""))
    return {"target": target, "said": found, "off_target": said / target - 1, "fresh": fresh}


def _fresh(bench: Bench, student: Path) -> Row:
    subject, processes = bench.subject, bench.options.processes
    speed = ndonnx.benchmark(
        student,
        against=subject.model,
        data=subject.data,
        recipe=subject.recipe,
        batch_sizes=(1,),
        samples=1,
        memory=False,
        **({} if processes is None else {"processes": processes}),
    )
    (timing,) = speed.providers[0].batches
    assert timing.ratio is not None and timing.against is not None
    ratio = {"ratio": timing.ratio.median, "low": timing.ratio.low, "high": timing.ratio.high}
    return ratio | {"model_ms": timing.model.p50_ms, "against_ms": timing.against.p50_ms, "notes": speed.notes}


def _off(part: float) -> str:
    return f"{part:+.1%}"


# The command line

_COMMANDS: dict[str, Callable[[Bench], Row]] = {"budgets": budgets, "promises": promises, "latency": latency}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write the JSON."""
    options = _parser().parse_args(arguments)
    subject = common.subject_of(
        options,
        judged=options.command != "latency",
        samples=options.samples,
        steps=options.steps,
        finetune_steps=options.finetune_steps,
        search={"candidates": options.candidates, "samples": options.held_out},
    )
    machine = common.machine(subject.recipe)
    print(common.machine_line(machine), flush=True)
    with _folder(options.run) as folder, RunDir(folder) as run:
        document = _COMMANDS[options.command](Bench(subject, run, options))
    if options.out is not None:
        settings = {"recipe": subject.recipe.model_dump(mode="json")}
        common.write_json(options.out, {"machine": machine, "model": subject.model.name} | settings | document)


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="ndonnx-") as folder:
        yield Path(folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="budgets|promises|latency")
    for name, command in _COMMANDS.items():
        _add_arguments(commands.add_parser(name, description=command.__doc__), name)
    return parser


def _add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    common.add_subject(parser)
    add = parser.add_argument
    match command:
        case "budgets":
            add(
                "--budgets",
                type=_parts,
                default=list(BUDGETS),
                metavar="B,B",
                help=f"parts of the cost (default: {_listed(BUDGETS)})",
            )
            add("--cost", choices=("params", "macs"), default="params", help="what budgets are of (default: params)")
        case "promises":
            add("--seeds", type=common.positive, default=10, help="runs, from --seed on (default: %(default)s)")
            add("--max-drop", default="1%", help="the drop to promise, as 1%% or 0.01 (default: 1%%)")
        case "latency":
            add("--target", type=_part, default=0.6, metavar="PART", help="of the teacher's latency (default: 0.6)")
            add(
                "--processes",
                type=common.positive,
                help="of each fresh measurement, at least 2 (default: as `ndonnx benchmark`)",
            )
    tuned = 0 if command == "budgets" else None
    told = "0" if command == "budgets" else "the recipe's"
    add("--candidates", help="what is tried, as 'width 0.25,0.5' (default: the recipe's)")
    add("--steps", type=common.positive, help="optimiser steps of a neighbourhood (default: the recipe's)")
    add("--samples", type=common.positive, help="samples to distil on (default: the recipe's)")
    add("--held-out", type=common.positive, help="samples that candidates are measured on (default: the recipe's)")
    add("--finetune-steps", type=int, default=tuned, help=f"steps of the whole student (default: {told})")
    add("--run", type=Path, metavar="DIR", help="where the work is kept and goes on (default: nowhere)")
    add("--out", type=Path, metavar="FILE", help="where the JSON goes")


def _listed(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


def _part(text: str) -> float:
    if not 0 < (number := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a part, above 0 and below 1")
    return number


def _parts(text: str) -> list[float]:
    return [_part(part) for part in text.split(",")]


if __name__ == "__main__":
    common.run(main)
