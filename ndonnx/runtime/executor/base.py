"""What an executor is: jobs in, outcomes out as they complete."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias

from ndonnx.runtime.faults import Fault, fault_of

OnStep: TypeAlias = Callable[[int, int, float], None]
"""Told by a job: step, steps, held-out NMSE."""

OnStepNamed: TypeAlias = Callable[[str, int, int, float], None]
"""Told by an executor: the job's name, then as `OnStep`."""

STEP_INTERVAL = 0.2
"""Seconds between two progress events of a job: five a second are as many as an eye can use."""


class Job(Protocol):
    """Independent work on one neighbourhood; picklable, and so is what it returns."""

    @property
    def name(self) -> str:
        """Names the job in progress events and in its outcome."""

    def __call__(self, on_step: OnStep) -> Any:
        """Do the work; whatever is raised is the reason why there is no result (see `ndonnx.runtime.faults`)."""


@dataclass(frozen=True)
class Demands:
    """What a job takes of the machine that it runs on."""

    threads: int = 1
    """Threads that it computes with."""
    cuda: bool = False
    """Whether it computes on a CUDA device."""


class MovableJob(ABC):
    """A job that can run where the run directory is not, because it names all files that it needs.

    Whatever it holds of files is a `Path`, or an `Entry` with one: those are what an executor changes when it moves the
    job. Executors of this machine take no notice.
    """

    @property
    @abstractmethod
    def reads(self) -> Sequence[Path]:
        """Files that have to be there when it starts; no folders."""

    @property
    @abstractmethod
    def writes(self) -> Path:
        """The folder that it fills, and that is whole when the job ends well: an entry of the run directory."""

    @property
    @abstractmethod
    def demands(self) -> Demands:
        """What it takes of a machine."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended: with a result, or with the fault that says why there is none."""

    name: str
    result: Any | None
    fault: Fault | None = None


class Executor(ABC):
    """Runs jobs. One bad job never stops the others, whatever it raises."""

    @abstractmethod
    def run(self, jobs: Iterable[Job], on_step: OnStepNamed) -> Iterator[Outcome]:
        """Run `jobs`, started in the given order, and yield each outcome as it completes.

        A job is taken from `jobs` when it can start, or one ahead of that. `on_step` is called in the caller's
        thread while the caller waits for an outcome, at most five times a second for each job
        and once more for its last step. Closing the iterator stops whatever still runs.

        Raises:
            RunDirError: the disk is full, or the run directory cannot be used; workers are stopped first.
        """

    def __enter__(self) -> Self:
        """Keep what jobs run in from one `run` to the next, until the block is left."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let it go; by default there is nothing."""
        del kind, error, traceback

    @property
    @abstractmethod
    def peak_rss_bytes(self) -> int:
        """Most memory that workers living at the same time have held together, in bytes, as far as is known."""


def attempt(job: Job, on_step: OnStep) -> Outcome:
    """Run one job here.

    Raises:
        RunDirError, KeyboardInterrupt: what ends the whole run.
    """
    try:
        return Outcome(job.name, job(throttled(on_step)))
    except BaseException as error:  # sorted by `fault_of`, which raises again what is not the job's alone
        return Outcome(job.name, None, fault_of(error))


def throttled(on_step: OnStep, clock: Callable[[], float] = time.monotonic) -> OnStep:
    """`on_step` with the events left out that come within `STEP_INTERVAL` of the one before; the last step never is."""
    due = clock()

    def maybe(step: int, steps: int, nmse: float) -> None:
        nonlocal due
        now = clock()
        if now >= due or step >= steps:
            due = now + STEP_INTERVAL
            on_step(int(step), int(steps), float(nmse))

    return maybe
