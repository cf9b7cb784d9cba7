"""How a command ends: its exit code, an interruption, and a standard output that is kept for results."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ndonnx import CompressReport
    from ndonnx.runtime.progress import Progress

DONE = 0
BUG = 1
BAD_INPUT = 2
TARGET_MISSED = 3
"""Finished, and what was made is saved, but it is not what was asked for."""
INTERRUPTED = 130
"""As a shell reports a program that SIGINT ended."""


class Interrupted(Exception):
    """Ctrl-C, with one line that says what it means for the work done so far."""


@contextmanager
def job(quiet: bool, verbose: bool, run_dir: Path | None = None) -> Iterator[Progress]:
    """A command's work: told on stderr as the flags say, with stdout kept for results.

    Args:
        quiet: tell nothing.
        verbose: tell more.
        run_dir: where the work done so far is kept when Ctrl-C ends it.
    """
    from .progress import telling  # noqa: PLC0415 - rich's bars are not for `--help`

    with _interruptible(run_dir), results_only(), telling(quiet, verbose) as progress:
        progress.stage("start")  # what is imported now takes seconds
        yield progress


@contextmanager
def _interruptible(run_dir: Path | None) -> Iterator[None]:
    """Turn Ctrl-C into `Interrupted`; `run_dir` is where the work done so far is kept."""
    try:
        yield
    except KeyboardInterrupt as error:
        if run_dir is None or not run_dir.is_dir():
            raise Interrupted("interrupted") from error
        raise Interrupted(
            f"interrupted; the same command continues where it stopped (run directory {run_dir})"
        ) from error


@contextmanager
def results_only() -> Iterator[None]:
    """Send to stderr whatever a data source or a library prints, so that stdout holds the results alone."""
    with redirect_stdout(sys.stderr):
        yield


def verdict(report: CompressReport) -> int:
    """The exit code of a finished run: a student that is all teacher is not what was asked for, nor is one in float
    where 8 bits were."""
    if report.target is not None:
        return reached(report.target.missed)
    if report.quantised is not None:
        return reached(report.quantised.reason)
    made = report.unchanged or any(neighbourhood.status != "kept" for neighbourhood in report.neighbourhoods)
    return DONE if made else TARGET_MISSED


def reached(missed: str | None) -> int:
    """The exit code where something was to be reached; what was missed is told in one line."""
    if missed is None:
        return DONE
    print(f"target missed: {missed}", file=sys.stderr)
    return TARGET_MISSED
