"""The executors: every job ends in an outcome, every worker ends with its run."""

from __future__ import annotations

import errno
import multiprocessing
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import pytest

from ndonnx.errors import ModelError, RecipeError, RunDirError, TrainingError
from ndonnx.runtime.executor import Executor, Job, OnStep, Outcome, ProcessExecutor, SerialExecutor, make_executor
from ndonnx.runtime.executor.base import STEP_INTERVAL, throttled
from ndonnx.runtime.faults import Fault
from tests.helpers.jobs import Double, Fail, by_name, doubles, reason, silent


@dataclass(frozen=True)
class FailFull:
    """Raises what a full disk makes of another error: causes do not travel with a pickled exception."""

    name: str = "full"

    def __call__(self, on_step: OnStep) -> NoReturn:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/somewhere")
        except OSError as error:
            raise ModelError("cannot write the model") from error


@pytest.fixture(autouse=True)
def nobody_stays_behind() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


# Both executors


def test_every_job_has_its_outcome(executor: Executor) -> None:
    outcomes = list(executor.run(doubles(5), silent))
    assert sorted(outcomes, key=lambda outcome: outcome.name) == [
        Outcome(f"n{number}", 2 * number) for number in range(5)
    ]


def test_serial_keeps_the_order() -> None:
    assert [outcome.name for outcome in SerialExecutor().run(doubles(3), silent)] == ["n0", "n1", "n2"]


def test_a_bad_slice_does_not_stop_the_others(executor: Executor) -> None:
    jobs = [Fail("bad", TrainingError("loss became NaN at step 3")), Fail("big", MemoryError()), *doubles(2)]
    outcomes = by_name(executor.run(jobs, silent))
    assert outcomes["bad"] == Outcome("bad", None, Fault("loss became NaN at step 3"))
    assert reason(outcomes["big"]).startswith("out of memory; use fewer --workers")
    assert outcomes["n1"].result == 2


class Awkward(Exception):
    """Cannot be unpickled, as many library errors cannot."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"awkward {one} {two}")


@dataclass(frozen=True)
class FailAwkwardly:
    name: str = "awkward"

    def __call__(self, on_step: OnStep) -> NoReturn:
        raise Awkward(1, 2)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("shapes (1,) and (8,)\n  do not fit"), "ValueError: shapes (1,) and (8,) do not fit"),
        (AssertionError(), "AssertionError"),
        (IndexError("index 3 is out of bounds"), "IndexError: index 3 is out of bounds"),
        (RuntimeError("Pivots given to lu_solve"), "RuntimeError: Pivots given to lu_solve"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "out of memory ("),
        (RecursionError("maximum depth"), "RecursionError: maximum depth"),
        (SystemExit(3), "its work ended the process (exit code 3)"),
        (OSError(errno.EIO, "Input/output error"), "OSError: [Errno 5] Input/output error"),
    ],
)
def test_whatever_a_job_raises_costs_that_job_and_keeps_its_traceback(
    executor: Executor, error: BaseException, told: str
) -> None:
    outcomes = by_name(executor.run([Fail("bad", error), FailAwkwardly(), *doubles(2)], silent))
    fault = outcomes["bad"].fault
    assert fault is not None and fault.reason.startswith(told) and not fault.foreseen
    assert "raise self.error" in fault.traceback and type(error).__name__ in fault.traceback
    assert reason(outcomes["awkward"]) == "Awkward: awkward 1 2"
    assert outcomes["n1"].result == 2


@pytest.mark.parametrize(
    "job",
    [
        Fail("directory", RunDirError("the disk is full")),
        Fail("raw", OSError(errno.ENOSPC, "No space left on device", "/somewhere")),
        FailFull(),
    ],
)
def test_a_run_directory_that_cannot_be_used_and_a_full_disk_end_the_run(executor: Executor, job: Job) -> None:
    with pytest.raises(RunDirError, match=r"disk is full|/somewhere: cannot be written: .*No space left"):
        list(executor.run([job, *doubles(3)], silent))


def test_ctrl_c_in_a_job_ends_the_run() -> None:
    with pytest.raises(KeyboardInterrupt):
        list(SerialExecutor().run([Fail("bad", KeyboardInterrupt()), *doubles(1)], silent))


def test_progress_comes_in_the_callers_thread(executor: Executor) -> None:
    events = []

    def on_step(name: str, step: int, steps: int, nmse: float) -> None:
        assert threading.current_thread() is threading.main_thread()
        events.append((name, step, steps, nmse))

    list(executor.run(doubles(2), on_step))
    assert sorted(events) == [("n0", 1, 2, 0.5), ("n0", 2, 2, 0.25), ("n1", 1, 2, 0.5), ("n1", 2, 2, 0.25)]


def test_jobs_are_taken_only_when_they_can_start() -> None:
    for executor, ahead in ((SerialExecutor(), 0), (ProcessExecutor(1), 1)):
        taken: list[str] = []

        def jobs(taken: list[str] = taken) -> Iterator[Job]:
            for job in doubles(5):
                taken.append(job.name)
                yield job

        for done, _ in enumerate(executor.run(jobs(), silent), start=1):
            assert len(taken) <= done + ahead
        assert len(taken) == 5


def test_no_jobs(executor: Executor) -> None:
    assert list(executor.run([], silent)) == []
    assert executor.peak_rss_bytes == 0


def test_an_error_in_the_list_of_jobs_passes_through(executor: Executor) -> None:
    def jobs() -> Iterator[Job]:
        yield Double("n0", 0)
        raise KeyError("capture failed")

    with pytest.raises(KeyError, match="capture failed"):
        list(executor.run(jobs(), silent))


def test_an_executor_runs_more_than_once(executor: Executor) -> None:
    for _ in range(2):
        assert {outcome.result for outcome in executor.run(doubles(2), silent)} == {0, 2}


def test_throttling_keeps_the_first_the_last_and_five_a_second() -> None:
    now = 100.0
    seen = []
    on_step = throttled(lambda step, steps, nmse: seen.append(step), clock=lambda: now)
    for step in range(1, 1001):
        on_step(step, 1000, 0.0)
        now += STEP_INTERVAL / 50
    assert seen[0] == 1
    assert seen[-1] == 1000
    assert 18 <= len(seen) <= 22


@pytest.mark.parametrize(("kind", "workers"), [("serial", 0), ("process", 0), ("process", -1), ("cloud", 1)])
def test_a_wrong_executor_is_refused(kind: Any, workers: int) -> None:
    with pytest.raises(RecipeError, match=r"at least 1|expected process \(.*\) or serial \("):
        make_executor(kind, workers)
