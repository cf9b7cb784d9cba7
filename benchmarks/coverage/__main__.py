"""Which teachers the method reaches: a corpus, and any ONNX files, taken through `ndonnx compress`.

    python -m benchmarks.coverage [MODEL_OR_DIR ...] [--out coverage.json] [--only NAME] [--cache DIR] [--steps N]

For each model: does it open; how long does the partition take and what share of its weights can
be distilled (embedding tables and the last classifier aside); does every slice answer in torch as
in onnxruntime, whole and shrunk, and does it train; is the student of `--keep 1.0 --steps 0`, and
the teacher with its own slices spliced in, bit for bit the teacher; does the student of
`--keep 0.5 --steps 20` run, with other batch sizes too, with the teacher's inputs and outputs, and
with what share of the weights. Without MODEL_OR_DIR the corpus of `benchmarks.corpus` is exported,
both ways, into the cache. Each export and each model has a process of its own and a time limit:
a model that passes it counts as failed, and says so. Two run side by side, one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common import machine, machine_line, positive, run, write_json
from benchmarks.coverage.fleet import ONE, Result, Subject, corpus, cover, files_of
from benchmarks.coverage.measure import measure
from benchmarks.coverage.table import causes, kept_lines, markdown, summary, summary_line
from ndonnx.config.recipe import Recipe

_TIME_LIMIT = 300
_STEPS = 20
_JOBS = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the files named, or the corpus; a table on stdout, everything in `--out`."""
    options = _parser().parse_args(arguments)
    if options.one is not None:
        _measure_here(options.one, options.steps, options.core)
        return
    cache = options.cache or Path(tempfile.gettempdir()) / "ndonnx-coverage"
    subjects: list[Subject] = files_of(options.models)
    if options.only or not options.models:
        cache.mkdir(parents=True, exist_ok=True)
        subjects += corpus(options.only, cache)
    results = cover(subjects, steps=options.steps, limit=options.time_limit, jobs=options.jobs, tell=_tell)
    found = [result.found for result in results if result.found is not None]
    skipped = {result.subject.name: result.reason for result in results if result.reason is not None}
    on, totals = machine(Recipe()), summary(found)
    print(f"{machine_line(on)}\n\n{markdown(found)}\n")
    for cause in causes(found):
        print(f"{cause.count:4d} x {cause.stage} {cause.operator}: {cause.words}")
        print(f"       in {', '.join(cause.models)}; as {cause.example}")
    for line in kept_lines(found):
        print(line)
    for name, reason in skipped.items():
        print(f"not exported {name}: {reason}")
    print(f"\n{summary_line(totals)}")
    if options.out is not None:
        models = [c.to_json() for c in found]
        write_json(options.out, {"machine": on, "summary": totals, "models": models, "skipped": skipped})


def _measure_here(path: Path, steps: int, core: int) -> None:
    if core >= 0:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    print(json.dumps(measure(path, steps).to_json()))


def _tell(result: Result, seconds: float) -> None:
    c = result.found
    if c is None:
        told = f"not exported: {result.reason}"
    else:
        told = f"{c.parity}/{c.distillable} slices at parity, {len(c.failures)} failures"
    print(f"{result.subject.name}: {told} ({seconds:.0f} s)", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.coverage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL_OR_DIR", help="ONNX files or folders of them")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything found as JSON")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="models of the corpus (a pattern)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where exports are kept between runs")
    parser.add_argument(
        "--steps", type=int, default=_STEPS, metavar="N", help="of the student; 0 leaves `compress` out (default: 20)"
    )
    parser.add_argument(
        "--time-limit", type=positive, default=_TIME_LIMIT, metavar="S", help="seconds for each process (default: 300)"
    )
    parser.add_argument("--jobs", type=positive, default=_JOBS, metavar="N", help="processes side by side (default: 2)")
    parser.add_argument(ONE, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, default=-1, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    run(main)
