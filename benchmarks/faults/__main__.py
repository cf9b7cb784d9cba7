"""What becomes of hostile input, of kills, of a full disk, and of two runs on one directory.

    python -m benchmarks.faults --fuzz 5000 --kills 100 --full-disk 60 --pairs 20 [--seed 1] [--jobs 1] [--only NUMBER]

Hostile input: models with damaged bytes and with lies that only somebody who knows the format would tell, data,
recipes and flags. Each is met by `inspect`, `inspect --check`, `compress` or `evaluate` in a process of its own, and
must end with exit code 0, 2 or 3 and without a traceback, within 60 s of one core and 6 GB, and without opening or
writing anything outside its folder. The same seed gives the same cases; `--only` runs one and prints what it said.
Prints tables in Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.faults.fuzz import COLUMNS, Outcome, fuzz, import_everything, meet
from benchmarks.faults.runs import full_disk, killed, pairs
from benchmarks.faults.sandbox import Sandbox


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fuzz", type=int, default=0, metavar="N", help="number of hostile inputs")
    parser.add_argument("--start", type=int, default=0, metavar="NUMBER", help="number of the first of them")
    parser.add_argument(
        "--kills", type=int, default=0, metavar="N", help="number of runs that are killed and continued"
    )
    parser.add_argument(
        "--full-disk", type=int, default=0, metavar="N", help="number of sizes of a disk that fills up during a run"
    )
    parser.add_argument(
        "--pairs", type=int, default=0, metavar="N", help="number of times that two runs share a directory"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="hostile inputs at a time")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="run one hostile input and print what it said")
    return parser


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for row in (columns, ["---"] * len(columns), *rows):
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def _fuzz(seed: int, numbers: range, jobs: int) -> int:
    began = time.perf_counter()

    done = itertools.count(1)

    def tell(outcome: Outcome) -> None:
        if (number := next(done)) % 100 == 0:
            print(f"{number} of {len(numbers)}", file=sys.stderr, flush=True)
        if outcome.fault is not None:
            print(
                f"{outcome.number}: {outcome.about} {outcome.command}, {outcome.done}: {outcome.fault}", file=sys.stderr
            )

    tally = fuzz(seed, numbers, jobs, tell)
    _table(COLUMNS, list(tally.rows()))
    clean = len(tally.outcomes) - len(tally.findings)
    print(
        f"{clean} of {len(tally.outcomes)} clean, {time.perf_counter() - began:.0f} s, {jobs} at a time\n", flush=True
    )
    return len(tally.findings)


def _show(seed: int, number: int) -> int:
    with tempfile.TemporaryDirectory() as root:
        case, ended = meet(seed, number, Sandbox(Path(root) / "case"))
    print(case, ended.out, ended.err, ended.outside, f"{ended.seconds:.1f} s", f"{ended.memory / 1e9:.1f} GB", sep="\n")
    print(ended.fault() or "clean")
    return ended.fault() is not None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 1 where anything was found."""
    options = _parser().parse_args(arguments)
    import_everything()
    if options.only is not None:
        return _show(options.seed, options.only)
    found = 0
    if options.fuzz:
        found += _fuzz(options.seed, range(options.start, options.start + options.fuzz), options.jobs)
    found += _disturb(options)
    return int(found > 0)


def _disturb(options: argparse.Namespace) -> int:
    """Kills, a full disk and two runs at once; how many went wrong."""

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    rows = []
    with tempfile.TemporaryDirectory(prefix="ndonnx-faults-") as root:
        sandbox = Sandbox(Path(root) / "case")
        if options.kills:
            rows.append(("kills", killed(sandbox, options.seed, options.kills, tell)))
        if options.pairs:
            rows.append(("two runs on one directory", pairs(sandbox, options.seed, options.pairs, tell)))
        if options.full_disk:  # last: from then on this process has mounts of its own
            rows.append(("full disks", full_disk(sandbox, options.full_disk, tell)))
    if rows:
        _table(("disturbance", "attempts", "same bytes in the end"), [found.row(name) for name, found in rows])
    return sum(len(found.wrong) for _, found in rows)


if __name__ == "__main__":
    sys.exit(main())
