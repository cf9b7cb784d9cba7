"""Many models, each exported and measured in processes of their own, a few side by side, each on one core."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from benchmarks.coverage.findings import Coverage
from ndonnx.errors import UsageError

ONE = "--one"
"""Hidden flag: measure one file in this process and print JSON."""
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Subject:
    """A file to measure, and how it is made where it is not there."""

    path: Path
    export: tuple[str, str] | None = None
    """Name in the corpus and exporter."""

    @property
    def name(self) -> str:
        """As the table calls it."""
        return self.path.stem


@dataclass(frozen=True)
class Result:
    """What became of a subject: measured, or not even exported."""

    subject: Subject
    found: Coverage | None
    reason: str | None


def corpus(only: Sequence[str], cache: Path) -> list[Subject]:
    """The models of the corpus, both ways, whose names match one of these patterns (all if there are none).

    Raises:
        UsageError: no name matches, or the optional dependencies are missing.
    """
    try:
        from benchmarks.corpus import CORPUS, exporters  # noqa: PLC0415
    except ImportError as error:
        raise UsageError(f"the corpus needs {error.name}: pip install 'ndonnx-compress[coverage]'") from error
    names = [name for name in CORPUS if not only or any(re.fullmatch(pattern, name) for pattern in only)]
    if not names:
        raise UsageError(f"--only {' '.join(only)}: no such model; known: {', '.join(CORPUS)}")
    return [Subject(cache / f"{name}.{way}.onnx", (name, way)) for name in names for way in exporters(name)]


def files_of(given: Iterable[Path]) -> list[Subject]:
    """The models named, and those in the folders named.

    Raises:
        UsageError: there is none.
    """
    found: list[Path] = []
    for path in given:
        inside = sorted(path.glob("*.onnx")) if path.is_dir() else [path]
        if not inside or not inside[0].is_file():
            raise UsageError(f"{path}: no such model, or a folder without one")
        found += inside
    return [Subject(path) for path in found]


def cover(
    subjects: Sequence[Subject], *, steps: int, limit: int, jobs: int, tell: Callable[[Result, float], None]
) -> list[Result]:
    """Measure all of them, `jobs` at a time; the results come in the subjects' order.

    Args:
        subjects: what to measure.
        steps: see `measure`.
        limit: seconds for each process, after which it is stopped and the model has failed.
        jobs: processes side by side, each with one thread on a core of its own where there are enough.
        tell: given each result and its seconds as it comes.
    """
    cores: SimpleQueue[int] = SimpleQueue()
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [-1]
    for i in range(jobs):
        cores.put(usable[i % len(usable)])

    def work(subject: Subject) -> Result:
        core, began = cores.get(), time.perf_counter()
        try:
            result = _one(subject, steps, limit, core)
        finally:
            cores.put(core)
        tell(result, time.perf_counter() - began)
        return result

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(work, subjects))


def _one(subject: Subject, steps: int, limit: int, core: int) -> Result:
    if subject.export is not None and not subject.path.is_file():
        command = ["benchmarks.corpus", *subject.export, str(subject.path.parent)]
        done = run_limited(command, limit)
        if done.reason is not None:
            return Result(subject, None, done.reason)
    done = run_limited(
        ["benchmarks.coverage", ONE, str(subject.path), "--steps", str(steps), "--core", str(core)], limit
    )
    if done.reason is not None:
        lost = Coverage(subject.name)
        lost.fail("process", "", done.reason)
        return Result(subject, lost, None)
    return Result(subject, Coverage.from_json(json.loads(done.stdout.splitlines()[-1])), None)


@dataclass(frozen=True)
class Ended:
    """A process that has ended: what it printed, or why there is nothing."""

    stdout: str
    reason: str | None


def run_limited(module: Sequence[str], limit: int) -> Ended:
    """`python -m MODULE ARGUMENTS` with one thread, for at most `limit` seconds."""
    environment = {**os.environ, **dict.fromkeys(_THREADS, "1")}
    try:
        done = subprocess.run(
            [sys.executable, "-m", *module], capture_output=True, text=True, timeout=limit, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        return Ended("", f"not done after {limit} s")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return Ended("", lines[-1])
    return Ended(done.stdout, None)
