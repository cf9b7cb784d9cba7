"""What a run tells on stderr: bars on a terminal, plain lines in a log, nothing when asked to be quiet."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from ndonnx.errors import UsageError
from ndonnx.runtime.progress import Progress, Silent
from ndonnx.runtime.units import seconds_text

from .tables import make_console, nmse_text, plain

_TOLD_STEPS = 10
"""Lines for each neighbourhood in training, in a log with `-v`."""
_CHECKS = ("start", "load")
"""Stages in which bad input is refused."""
_SHOWN_RUNNING = 8
"""Most neighbourhoods that have a bar of their own at the same time."""


@contextmanager
def telling(quiet: bool, verbose: bool) -> Iterator[Progress]:
    """The progress that suits stderr and the flags; on leaving, the screen is as a log would be."""
    if quiet and verbose:
        raise UsageError("-q and -v exclude each other; give one of them")
    if quiet:
        yield Silent()
        return
    console = make_console(stderr=True)
    if console.is_terminal and os.environ.get("TERM") != "dumb":
        with BarTeller(console, verbose) as bars:
            yield bars
    else:
        lines = LineTeller(console, verbose)
        yield lines
        lines.close()


@dataclass
class Pace:
    """How far a stage is, and how long the rest of it takes at this pace.

    A stage that is entered again (capture and distil take turns) goes on with its old clock.
    """

    clock: Callable[[], float] = time.monotonic
    total: int | None = None
    done: int = 0
    running: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Step and steps of each neighbourhood in training."""
    _began: float | None = None

    def enter(self, total: int | None) -> None:
        """Count from the start; what was done before is told again by the run."""
        self.total, self.done = total, 0
        self.running.clear()
        if self._began is None:
            self._began = self.clock()

    @property
    def completed(self) -> float:
        """Units done, with the parts of those that are running."""
        return self.done + sum(step / steps for step, steps in self.running.values() if steps)

    @property
    def elapsed(self) -> float:
        """Seconds since the stage was entered first."""
        return 0.0 if self._began is None else self.clock() - self._began

    @property
    def left(self) -> float | None:
        """Seconds to go; None before there is a pace to judge by."""
        if not self.total or self.completed <= 0:
            return None
        return self.elapsed * max(0.0, self.total - self.completed) / self.completed


class Teller:
    """What both ways of telling share: the lines that stay, and the pace of every stage."""

    def __init__(self, console: Console, verbose: bool) -> None:
        self.console = console
        self.verbose = verbose
        self.name = ""
        self.pace = Pace()
        self._paces: dict[str, Pace] = {}

    def say(self, line: str) -> None:
        """Print one line that stays."""
        self.console.print(plain(line), soft_wrap=True)

    def enter(self, name: str, total: int | None) -> None:
        """Begin a stage, and with `-v` tell how long the one before it took."""
        self.leave()
        self.name = name
        self.pace = self._paces.setdefault(name, Pace())
        self.pace.enter(total)

    def leave(self) -> None:
        """End the stage."""
        if self.name and self.verbose:
            self.say(f"{self.name} ended after {seconds_text(self.pace.elapsed)}")
        self.name = ""

    def end_line(self, neighbourhood: str, status: str, nmse: float | None, reason: str | None) -> str:
        """How a neighbourhood ended."""
        self.pace.running.pop(neighbourhood, None)
        detail = f": {reason}" if reason else "" if nmse is None else f", NMSE {nmse_text(nmse)}"
        return f"{neighbourhood} {status}{detail}"

    def note(self, message: str) -> None:
        """As `Progress.note`."""
        self.say(message)


class LineTeller(Teller):
    """One line per stage and per finished neighbourhood, for logs and pipes."""

    def __init__(self, console: Console, verbose: bool) -> None:
        super().__init__(console, verbose)
        self._held: list[str] = []

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        """As `Progress.stage`."""
        self.enter(name, total)
        self._held.append(name if total is None else f"{name}: {total} {unit}".rstrip())
        if name not in _CHECKS:  # bad input ends in the checks, and is then told in one line
            while self._held:
                self.say(self._held.pop(0))

    def advance(self, amount: int = 1) -> None:
        """As `Progress.advance`."""
        self.pace.done += amount

    def step(self, neighbourhood: str, step: int, steps: int, nmse: float) -> None:
        """As `Progress.step`; with `-v` every tenth part of the steps is told."""
        before, _ = self.pace.running.get(neighbourhood, (0, steps))
        self.pace.running[neighbourhood] = (step, steps)
        if self.verbose and step * _TOLD_STEPS // steps > before * _TOLD_STEPS // steps:
            self.say(f"{neighbourhood} step {step} of {steps}, NMSE {nmse_text(nmse)}")

    def finished(self, neighbourhood: str, status: str, nmse: float | None, reason: str | None) -> None:
        """As `Progress.finished`."""
        self.pace.running[neighbourhood] = (1, 1)  # `advance` comes after this, but it counts now
        left = self.pace.left if status != "reused" else None
        line = self.end_line(neighbourhood, status, nmse, reason)
        self.say(line + (f" (about {seconds_text(left)} left)" if left else ""))

    def close(self) -> None:
        """End the last stage."""
        self.leave()


class BarTeller(Teller):
    """A bar for the stage and one line for each running neighbourhood; finished ones scroll away above."""

    def __init__(self, console: Console, verbose: bool) -> None:
        super().__init__(console, verbose)
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[detail]}", markup=False),
            console=console,
            transient=True,
        )
        self._stage: TaskID | None = None
        self._unit = ""
        self._running: dict[str, TaskID] = {}

    def __enter__(self) -> BarTeller:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()
        self.leave()

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        """As `Progress.stage`."""
        self.enter(name, total)
        for bar in (*self._running.values(), *([] if self._stage is None else [self._stage])):
            self._bars.remove_task(bar)
        self._running.clear()
        self._unit = unit
        self._stage = self._bars.add_task(name, total=total, detail="")
        self._show()

    def advance(self, amount: int = 1) -> None:
        """As `Progress.advance`."""
        self.pace.done += amount
        self._show()

    def step(self, neighbourhood: str, step: int, steps: int, nmse: float) -> None:
        """As `Progress.step`."""
        self.pace.running[neighbourhood] = (step, steps)
        if neighbourhood not in self._running and len(self._running) < _SHOWN_RUNNING:
            self._running[neighbourhood] = self._bars.add_task(f"  {plain(neighbourhood)}", total=steps, detail="")
        if neighbourhood in self._running:
            detail = f"{step}/{steps} steps, NMSE {nmse_text(nmse)}"
            self._bars.update(self._running[neighbourhood], completed=step, total=steps, detail=detail)
        self._show()

    def finished(self, neighbourhood: str, status: str, nmse: float | None, reason: str | None) -> None:
        """As `Progress.finished`."""
        if neighbourhood in self._running:
            self._bars.remove_task(self._running.pop(neighbourhood))
        self.say(self.end_line(neighbourhood, status, nmse, reason))
        self._show()

    def _show(self) -> None:
        if self._stage is None:
            return
        detail = f"{self.pace.done}/{self.pace.total} {self._unit}".rstrip() if self.pace.total else ""
        if (left := self.pace.left) is not None and left > 0:
            detail += f", about {seconds_text(left)} left"
        self._bars.update(self._stage, completed=self.pace.completed, detail=detail)
