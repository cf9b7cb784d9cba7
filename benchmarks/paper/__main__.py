"""The paper's tables and figures on a teacher of yours, its numbers beside ours.

    python -m benchmarks.paper TABLE|all --scale small|full --model M --data TRAIN --eval TEST [--out DIR]
    python -m benchmarks.paper figures --model M --data TRAIN --eval TEST --out DIR [--figure N,N]
    python -m benchmarks.paper all --demo

TABLE is
  1  width: k, with cross-entropy (CE) and KD of the same student from scratch, KD from the pruned teacher's weights,
     ND on the teacher's activations, in order on those of the students before, and the first with fine-tuning (the
     default of `compress`)
  3  sparsity, layer by layer, from the teacher's weights as in the paper, and from refitted ones, apart and in order
  4  without data: Gaussian noise at every neighbourhood as in the paper, and made-up inputs with the refit walk
  5  hardening of the teacher, and ND of it
  6  look-ahead, for as many steps and for as much time, of neighbourhoods apart and in order
  7  ND's time by stage

and `figures` draws figures 1 to 7 into a folder, the numbers beside them (see `figures.py` for what each is).

Every ND cell is one call of `ndonnx.compress`; its seconds are the whole of it less the judging, and students that an
earlier cell has trained are paid for in every cell that uses them. Baselines train the whole student in torch, set-up
and the teacher's answers included in their time, for longer than ND and its fine-tuning took (by the last of the
scale's factors); their learning rate is chosen by short trainings judged on held-out training images, which is not
charged. "From scratch" means random weights in the student slices: what the partition keeps (a stem, a head) stays the
teacher's. KD from scratch is judged on its way, in runs of several lengths; a checkpoint before the end of a run has
not annealed its learning rate, so `benchmarks.time_to_quality`, with more budgets, is the better judge of speed.

Quality is top-1 accuracy, or agreement with the teacher where there are no labels; differences are from the teacher,
in points. The paper's numbers are its own teachers' and schedules'; "–" where one is not known. A cell that fails
says why, and the others go on. --out writes table1.csv, ..., and tables.json with all of them and the settings.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.paper.figures import FIGURES, Artist
from benchmarks.paper.lab import Lab
from benchmarks.paper.scales import SCALES, Scale
from benchmarks.paper.tables import TABLES, Table
from ndonnx.errors import UsageError

UNKNOWN = "–"
PICTURES = "figures"
"""In the place of a table's number."""
_POINTS = {"difference", "paper", "gain"}
_PARTS = {"accuracy", "agreement", "share"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print and write each table as soon as it is there."""
    options = _parser().parse_args(arguments)
    if options.table == PICTURES and options.out is None:
        raise UsageError("missing: --out, the folder that the figures go into")
    subject = common.subject_of(options, judged=True)
    scale = _scale(options)
    machine = common.machine(subject.recipe)
    print(common.machine_line(machine), flush=True)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    done: list[Table] = []
    with tempfile.TemporaryDirectory(prefix="ndonnx-", dir=options.work) as folder:
        lab = Lab(subject, scale, Path(folder))
        print(f"teacher: {common.percent(lab.teacher)}, scale {options.scale}\n", flush=True)
        if options.table == PICTURES:
            Artist(lab, options.out).draw(options.figures)
            return
        for number in TABLES if options.table == "all" else [options.table]:
            table = TABLES[number](lab)
            done.append(table)
            print_table(table)
            if options.out is None:
                continue
            columns = [*table.columns, "note"]
            rows = [[row[column] for column in columns] for row in table.rows]
            common.write_csv(options.out / f"table{number}.csv", columns, rows)
            common.write_json(
                options.out / "tables.json",
                {
                    "machine": machine,
                    "model": subject.model.name,
                    "recipe": subject.recipe.model_dump(mode="json"),
                    "scale": asdict(lab.scale),
                    "teacher": lab.teacher,
                    "learning_rates": lab.rates,
                    "tables": [asdict(table) for table in done],
                },
            )


def print_table(table: Table) -> None:
    """The table on stdout; notes stand below it, by number."""
    notes: list[str] = []
    rows = []
    for row in table.rows:
        cells = [_text(column, row[column]) for column in table.columns]
        if note := row["note"]:
            if note not in notes:
                notes.append(note)
            mark = f"({notes.index(note) + 1})"
            measured = next(i for i, c in enumerate(table.columns) if c in _PARTS)
            cells[measured] = f"{'failed' if cells[measured] == UNKNOWN else cells[measured]} {mark}"
        rows.append(cells)
    common.print_table(f"Table {table.number}. {table.title}", table.columns, rows)
    for number, note in enumerate(notes, start=1):
        print(f"({number}) {note}")
    if table.remark:
        print(table.remark)
    print(flush=True)


def _text(column: str, value: object) -> str:
    match value:
        case None:
            return UNKNOWN
        case int() | float() if column in _PARTS:
            return common.percent(float(value))
        case int() | float() if column in _POINTS:
            return f"{value:+.1f}"
        case int() | float() if column == "seconds":
            return f"{value:.1f}"
        case float():
            return f"{value:g}"
    return str(value)


def _scale(options: argparse.Namespace) -> Scale:
    """The named scale with what the flags put in place of its settings."""
    names = {setting.name for setting in fields(Scale)}
    given = {name: value for name, value in vars(options).items() if name in names and value is not None}
    if "steps" in given:
        given |= dict.fromkeys(("layer_steps", "look_ahead_steps", "harden_steps"), given["steps"])
    if "keeps" in given:
        given |= dict.fromkeys(("free_keeps", "hardened_keeps"), given["keeps"]) | {"middle": given["keeps"][-1]}
    return replace(SCALES[options.scale], **given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    choices = [*TABLES, "all", PICTURES]
    add("table", choices=choices, metavar="TABLE", help=f"one of {', '.join(TABLES)}, or all; or {PICTURES}")
    add("--figure", dest="figures", type=_figures, default=list(FIGURES), metavar="N,N", help="figures to draw")
    add("--scale", choices=SCALES, default="small", help="small: under an hour on two cores for a ResNet-20")
    add("--model", type=Path, metavar="FILE", help="the teacher, an ONNX file with class scores as its output")
    add("--data", metavar="SRC", help="inputs to train on; labels are for the cross-entropy baseline")
    add("--eval", metavar="SRC", help="data to judge by, with labels where accuracy is wanted")
    add("--recipe", type=Path, metavar="FILE", help="recipe in TOML, for `[data]` and the training")
    add("--demo", action="store_true", help="use the teacher and the data that ship with ndonnx")
    add("--seed", type=int, help="seed of everything drawn at random (default: the recipe's, 0)")
    add("--out", type=Path, metavar="DIR", help="where the tables go as CSV and JSON")
    add("--work", type=Path, metavar="DIR", help="where scratch files go (default: the system's temporary folder)")
    scale = parser.add_argument_group("instead of the scale's settings").add_argument
    scale("--keep", dest="keeps", type=_parts, metavar="K,K", help="multipliers; the last one is that of 6 and 7")
    scale("--sparsity", dest="sparsities", type=_parts, metavar="S,S")
    scale("--look-ahead", dest="look_aheads", type=_counts, metavar="N,N")
    scale("--equal-time", dest="equal_times", type=_counts, metavar="N,N", help="look-aheads whose time none gets too")
    scale("--samples", type=common.positive, metavar="N")
    scale("--steps", type=common.positive, metavar="N", help="of every neighbourhood, and of the hardening")
    scale("--finetune-steps", type=common.positive, metavar="N")
    scale("--noise", type=float, metavar="PART", help="of the hardening")
    scale("--sweep-seconds", type=float, metavar="S", help="of every learning rate that a baseline tries")
    scale("--baseline-seconds", type=float, metavar="S", help="baselines' time, before the factors, instead of ND's")
    scale("--study-samples", type=common.positive, metavar="N", help="by which noise and searches are judged")
    scale("--study-repeats", type=common.positive, metavar="N", help="draws of the noise")
    scale("--search-steps", type=common.positive, metavar="N", help="of a candidate in figure 7")
    scale("--checkpoints", type=common.positive, metavar="N", help="times that KD from scratch is judged")
    return parser


def _parts(text: str) -> tuple[float, ...]:
    return _numbers(text, float)


def _figures(text: str) -> list[int]:
    numbers = list(_counts(text))
    if unknown := [number for number in numbers if number not in FIGURES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]}: no such figure; there are 1 to {max(FIGURES)}")
    return numbers


def _counts(text: str) -> tuple[int, ...]:
    return _numbers(text, int)


def _numbers(text: str, kind: Any) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: expected numbers with commas between them") from None


if __name__ == "__main__":
    common.run(main)
