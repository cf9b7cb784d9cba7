"""The far end of the pipe: what runs inside a worker process.

Nothing heavy may be imported here: the number of threads has to stand in the environment before
the first job, once unpickled, brings in the numerical libraries.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import parent_process

from ndonnx.errors import RunDirError
from ndonnx.runtime.executor.base import Job, OnStep, Outcome, attempt
from ndonnx.runtime.faults import fault_of

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Step:
    """A progress event of the worker's current job."""

    step: int
    steps: int
    nmse: float
    peak_rss: int


@dataclass(frozen=True)
class Done:
    """The worker's job has ended; its name is known to who gave it."""

    outcome: Outcome
    peak_rss: int


@dataclass(frozen=True)
class RunEnds:
    """The worker's job has met what ends the whole run."""

    error: RunDirError
    peak_rss: int


Message = Step | Done | RunEnds


def serve(pipe: Connection, threads: int) -> None:
    """Run the jobs that come in on `pipe` until it closes.

    Plain pickle, not the pipe's own: torch teaches that one to pass tensors as shared memory,
    which is gone when this process dies.
    """
    _settle(threads)
    while True:
        try:
            packed = pipe.recv_bytes()
        except EOFError:
            return
        _tell(pipe, perform(partial(pickle.loads, packed), partial(_tell_step, pipe)))
        give_back()


def _settle(threads: int) -> None:
    """Make this process a good worker: quiet, short-lived, and no wider than its share of the cores."""
    # Ctrl-C reaches the whole process group; the supervisor decides what becomes of its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_die_with_parent, daemon=True).start()
    # What a library prints must not end up in the main process's results. Closed streams are no harm.
    with suppress(OSError):
        os.dup2(2, 1)
    os.environ.update(thread_variables(threads))


def thread_variables(threads: int) -> dict[str, str]:
    """What the environment of a worker has to say, before it imports the numerical libraries, of its threads."""

    def allowed(variable: str) -> str:
        asked = os.environ.get(variable, "")
        return asked if asked.isdecimal() and 0 < int(asked) < threads else str(threads)

    # Threads that spin while they wait starve each other as soon as anything else runs on the machine:
    # measured, a slice trained by two threads beside one busy process took thirty times as long.
    policy = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    return {variable: allowed(variable) for variable in _THREAD_VARIABLES} | policy


def give_back() -> None:
    """Return memory that a job has freed to the system; the C library would keep it for the next one."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc; musl keeps nothing
        if trim is not None:
            trim(0)


def _die_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def perform(unpack: Callable[[], Job], on_step: OnStep) -> bytes:
    """Run a job here; the pickled `Done` or `RunEnds` that tells how it ended."""
    try:
        try:
            return pickle.dumps(Done(attempt(unpack(), on_step), peak_rss()))
        except Exception as error:  # code of others, such as a student method's, may not survive the way here or back
            return pickle.dumps(Done(Outcome("", None, fault_of(error)), peak_rss()))
    except RunDirError as error:
        return pickle.dumps(RunEnds(error, peak_rss()))


def _tell_step(pipe: Connection, step: int, steps: int, nmse: float) -> None:
    _tell(pipe, pickle.dumps(Step(step, steps, nmse, peak_rss())))


def _tell(pipe: Connection, message: bytes) -> None:
    try:
        pipe.send_bytes(message)
    except OSError:
        os._exit(1)  # nobody listens any more


if sys.platform == "linux":

    def peak_rss() -> int:
        """Most memory this process has held, in bytes.

        Not `ru_maxrss`: a process started by another begins with that one's peak.
        """
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:")), 0)

elif sys.platform == "win32":

    def peak_rss() -> int:
        """Not known on this system: 0."""
        return 0

else:
    import resource

    _RSS_UNIT = 1 if sys.platform == "darwin" else 1024

    def peak_rss() -> int:
        """Most memory this process has held, in bytes."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
