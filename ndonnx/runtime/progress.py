"""What a run tells while it goes on: one small protocol, implemented by the command line."""

from __future__ import annotations

from typing import Protocol


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
        """One line worth knowing: an estimate, a fallback, a warning."""


class Silent:
    """Tells nothing; the default of the Python API."""

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None: ...

    def advance(self, amount: int = 1) -> None: ...

    def step(self, neighbourhood: str, step: int, steps: int, nmse: float) -> None: ...

    def finished(self, neighbourhood: str, status: str, nmse: float | None, reason: str | None) -> None: ...

    def note(self, message: str) -> None: ...
