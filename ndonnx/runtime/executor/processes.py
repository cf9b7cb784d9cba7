"""Jobs side by side in worker processes of this machine, supervised from the main thread.

Every worker has a pipe of its own, so that one killed in the middle of a sentence leaves no lock
behind and spoils nobody else's. Workers are started as they are needed and dismissed when no job
is left, or inside `with executor:` when the block is left: importing torch takes seconds. A worker
that dies takes its job with it, and the next job gets a fresh one.
"""

from __future__ import annotations

import pickle
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from types import ModuleType, TracebackType
from typing import Self

from ndonnx.runtime.executor.base import Executor, Job, OnStepNamed, Outcome
from ndonnx.runtime.executor.registry import register_executor
from ndonnx.runtime.executor.worker import Done, Message, RunEnds, Step, serve
from ndonnx.runtime.faults import Fault, fault_of
from ndonnx.runtime.machine import usable_cores

if sys.platform != "win32":
    from multiprocessing.resource_tracker import ensure_running

_PATIENCE = 5.0
"""Seconds that a worker gets to leave by itself before it is killed."""


@register_executor("process", "in worker processes")
class ProcessExecutor(Executor):
    """Runs up to `workers` jobs at the same time, each process with its share of the cores as threads.

    A process that dies under its job (out of memory, a crash in native code) costs that job only.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._peak_rss = 0
        self._kept: _Crew | None = None

    @property
    def peak_rss_bytes(self) -> int:
        """The largest sum of the peaks of workers that lived at the same time, in bytes."""
        return self._peak_rss

    def __enter__(self) -> Self:
        self._kept = self._crew()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._kept is not None:
            self._kept.__exit__(kind, error, traceback)
        self._kept = None

    def _crew(self) -> _Crew:
        return _Crew(threads=max(1, usable_cores() // self._workers))

    def run(self, jobs: Iterable[Job], on_step: OnStepNamed) -> Iterator[Outcome]:
        waiting = iter(jobs)
        with self._crew() if self._kept is None else self._kept.shift() as crew:
            for _ in range(self._workers):
                yield from crew.take_next(waiting)
            while crew.busy:
                for worker, message in crew.listen():
                    self._peak_rss = max(self._peak_rss, crew.peak_rss)
                    match message:
                        case Step(step, steps, nmse):
                            on_step(worker.job, step, steps, nmse)
                        case RunEnds(error):
                            raise error
                        case Done(outcome):
                            ended = [replace(outcome, name=worker.job), *crew.take_next(waiting, worker)]
                            yield from ended
                        case None:
                            ended = [Outcome(worker.job, None, crew.bury(worker)), *crew.take_next(waiting)]
                            yield from ended


class _Worker:
    """A worker process seen from here: its pipe, and the name of the job that it was given last."""

    def __init__(self, threads: int) -> None:
        context = get_context("spawn")
        self.pipe, far_end = context.Pipe()
        self.process: SpawnProcess = context.Process(target=serve, args=(far_end, threads), daemon=True)
        self.job = ""
        self.peak_rss = 0
        try:
            with _sheltered_start():
                self.process.start()
        finally:
            far_end.close()  # or the pipe would not close with the worker

    def give(self, name: str, packed: bytes) -> None:
        self.job = name
        with suppress(BrokenPipeError, ConnectionResetError):  # it has died: `listen` will tell
            self.pipe.send_bytes(packed)

    def hear(self) -> Message | None:
        """The next message, or None if the worker has died (with or without a last word half said)."""
        try:
            packed = self.pipe.recv_bytes() if self.pipe.poll() else None
        except (EOFError, OSError):
            return None
        if packed is None:
            return None
        try:
            message: Message = pickle.loads(packed)
        except Exception as error:  # a result of a job's own making
            return Done(Outcome(self.job, None, fault_of(error)), self.peak_rss)
        self.peak_rss = message.peak_rss
        return message


class _Crew:
    """The workers of one run. Leaving the block leaves none of them behind."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._busy: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._keeps = False
        self._dismissed: list[_Worker] = []
        self._lived_together: list[list[_Worker]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for worker in self._busy:
            worker.process.terminate()
        for worker in self._idle:
            worker.pipe.close()
        for worker in [*self._busy, *self._idle, *self._dismissed]:
            worker.process.join(_PATIENCE)
            _bury(worker)
        self._busy, self._idle, self._dismissed = [], [], []

    @contextmanager
    def shift(self) -> Iterator[Self]:
        """One of several runs: workers that have nothing to do wait for the next one. All go if it ends early."""
        self._keeps = True
        try:
            yield self
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise

    @property
    def busy(self) -> bool:
        return bool(self._busy)

    @property
    def peak_rss(self) -> int:
        """The largest sum of peaks; a worker's own is known only after it has spoken, so all are summed anew."""
        return max(sum(worker.peak_rss for worker in together) for together in self._lived_together)

    def take_next(self, waiting: Iterator[Job], worker: _Worker | None = None) -> list[Outcome]:
        """Give the next job, if there is one, to this worker or a new one; else dismiss the worker.

        Returns the outcomes of jobs that cannot be sent.
        """
        unsent: list[Outcome] = []
        for job in waiting:
            try:
                packed = pickle.dumps(job)
            except Exception as error:  # as many as there are ways to write a job
                unsent.append(Outcome(job.name, None, fault_of(error)))
                continue
            if worker is None:
                worker = self._rested() or self._new()
                self._busy.append(worker)
            worker.give(job.name, packed)
            return unsent
        if worker is not None:
            self._busy.remove(worker)
            if self._keeps:
                self._idle.append(worker)
            else:
                self._dismissed.append(worker)
                worker.pipe.close()
        return unsent

    def _rested(self) -> _Worker | None:
        """A worker that waits for a job, if one is alive."""
        while self._idle:
            worker = self._idle.pop()
            if worker.process.is_alive():
                return worker
            _bury(worker)
        return None

    def _new(self) -> _Worker:
        worker = _Worker(self._threads)
        self._lived_together.append([*self._busy, *self._idle, worker])
        return worker

    def listen(self) -> list[tuple[_Worker, Message | None]]:
        """Wait until some worker speaks or dies; one message of each that did, None for the dead."""
        ready = set(wait([end for worker in self._busy for end in (worker.pipe, worker.process.sentinel)]))
        spoke = [worker for worker in self._busy if ready & {worker.pipe, worker.process.sentinel}]
        return [(worker, worker.hear()) for worker in spoke]

    def bury(self, worker: _Worker) -> Fault:
        """Clear away a dead worker; how it died."""
        worker.process.join(_PATIENCE)
        self._busy.remove(worker)
        return Fault(_cause_of_death(_bury(worker)), foreseen=False)


def _bury(worker: _Worker) -> int:
    """End a worker that should have ended by now, release what it held, and return its exit code."""
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()
    worker.pipe.close()
    code = worker.process.exitcode
    worker.process.close()
    return code if code is not None else 0


def _cause_of_death(exit_code: int) -> str:
    if exit_code == -9:
        return (
            "the worker process died (signal 9), perhaps out of memory; "
            "use fewer --workers, a smaller --batch-size, or more memory"
        )
    if exit_code < 0:
        return (
            f"the worker process died (signal {-exit_code}); run again, or leave this neighbourhood out with --freeze"
        )
    return f"the worker process ended by itself (exit code {exit_code}); --executor serial shows where"


@contextmanager
def _sheltered_start() -> Iterator[None]:
    """Start a process that neither sees Ctrl-C before it can ignore it, nor runs the user's script again.

    Multiprocessing has every new process import the main script. One without an
    `if __name__ == "__main__"` guard would start its own run in there, and one that imports the
    numerical libraries would do so before their number of threads is set. Jobs need none of it.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    if sys.platform != "win32":
        ensure_running()  # multiprocessing's own helper, whose start would lift the mask
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        if sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
