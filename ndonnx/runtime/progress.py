"""What a run tells while it goes on: one small protocol, a callback with events, or the log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from ndonnx.errors import UsageError

LOGGER = logging.getLogger("ndonnx")
"""What a run tells where no progress is asked for: stages as INFO, remarks worth knowing as WARNING."""


class Estimate(str):
    """The message of a note that informs, and that nothing needs to be done about."""


@runtime_checkable
class Progress(Protocol):
    """Receives the events of a run, always from the main process's main thread."""

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        """A stage begins (and the one before it ends); `total` counts `unit`s where it is known."""

    def advance(self, amount: int = 1) -> None:
        """So many more units of the current stage are done."""

    def step(self, neighbourhood: str, step: int, steps: int, nmse: float) -> None:
        """A neighbourhood's training has reached `step` of `steps` with this held-out NMSE."""

    def finished(self, neighbourhood: str, status: str, nmse: float | None, reason: str | None) -> None:
        """A neighbourhood has ended: `status` is `distilled`, `reused` or `kept`, with a reason if kept."""

    def note(self, message: str) -> None:
        """One line worth knowing: an estimate (`Estimate`), a fallback, a warning."""


@dataclass(frozen=True)
class Event:
    """One thing that happened in a run, as a plain callable given as `progress` receives it."""

    kind: Literal["stage", "advance", "step", "finished", "note"]
    """A stage began or advanced, a training reached a step, a neighbourhood ended, or there is something to tell."""
    name: str = ""
    """Name of the stage, or of the neighbourhood for `step` and `finished`."""
    done: int = 0
    """Units of the stage, or optimiser steps, that are done."""
    total: int | None = None
    """Number of units of the stage, or of optimiser steps; None where it is not known."""
    nmse: float | None = None
    """Squared error on held-out samples over the variance of the teacher's values, for `step` and `finished`."""
    message: str | None = None
    """Text of a note, unit of a stage, or how a neighbourhood ended and why."""


Listener: TypeAlias = Progress | Callable[[Event], None]
"""What the verbs take as progress."""


class Silent:
    """Tells nothing."""

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None: ...

    def advance(self, amount: int = 1) -> None: ...

    def step(self, neighbourhood: str, step: int, steps: int, nmse: float) -> None: ...

    def finished(self, neighbourhood: str, status: str, nmse: float | None, reason: str | None) -> None: ...

    def note(self, message: str) -> None: ...


class Logged(Silent):
    """Tells it to the logger `ndonnx`; the default of the Python API."""

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        LOGGER.info("%s", name if total is None else f"{name}: {total} {unit}".rstrip())

    def finished(self, neighbourhood: str, status: str, nmse: float | None, reason: str | None) -> None:
        LOGGER.info("%s %s", neighbourhood, _ended(status, reason))

    def note(self, message: str) -> None:
        LOGGER.log(logging.INFO if isinstance(message, Estimate) else logging.WARNING, "%s", message)


class Remembering:
    """Passes everything on, and keeps the remarks that are no estimates."""

    def __init__(self, told: Progress) -> None:
        self._told = told
        self.notes: list[str] = []
        """Each remark once, in order."""

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        self._told.stage(name, total, unit)

    def advance(self, amount: int = 1) -> None:
        self._told.advance(amount)

    def step(self, neighbourhood: str, step: int, steps: int, nmse: float) -> None:
        self._told.step(neighbourhood, step, steps, nmse)

    def finished(self, neighbourhood: str, status: str, nmse: float | None, reason: str | None) -> None:
        self._told.finished(neighbourhood, status, nmse, reason)

    def note(self, message: str) -> None:
        if not isinstance(message, Estimate) and message not in self.notes:
            self.notes.append(message)
        self._told.note(message)


class Called:
    """Passes everything on to a callable, as events."""

    def __init__(self, listener: Callable[[Event], None]) -> None:
        self._tell = listener
        self._stage = Event("stage")

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        self._stage = Event("stage", name, 0, total, message=unit or None)
        self._tell(self._stage)

    def advance(self, amount: int = 1) -> None:
        before = self._stage
        self._stage = Event("advance", before.name, before.done + amount, before.total, message=before.message)
        self._tell(self._stage)

    def step(self, neighbourhood: str, step: int, steps: int, nmse: float) -> None:
        self._tell(Event("step", neighbourhood, step, steps, nmse))

    def finished(self, neighbourhood: str, status: str, nmse: float | None, reason: str | None) -> None:
        self._tell(Event("finished", neighbourhood, nmse=nmse, message=_ended(status, reason)))

    def note(self, message: str) -> None:
        self._tell(Event("note", message=message))


def listening(progress: Listener | None) -> Progress:
    """Who is told what goes on: a `Progress` as it is, a callable through events, and the log where there is none.

    Raises:
        UsageError: it is none of these.
    """
    if progress is None:
        return Logged()
    if isinstance(progress, Progress):
        return progress
    if not callable(progress):
        raise UsageError(f"progress: expected a callable or a Progress, found {type(progress).__name__}")
    return Called(progress)


def _ended(status: str, reason: str | None) -> str:
    return status if reason is None else f"{status}: {reason}"
