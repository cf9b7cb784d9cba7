"""Worker processes: what becomes of a job whose process dies, and of a whole program around them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from ndonnx.errors import RunDirError
from ndonnx.runtime.executor import Job, OnStep, ProcessExecutor
from tests.helpers.jobs import Double, Fail, by_name, doubles, reason, silent

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@dataclass(frozen=True)
class Stay:
    """Tells its process id as its step, then works on; says so if nothing has stopped it."""

    name: str = "stay"

    def __call__(self, on_step: OnStep) -> None:
        on_step(os.getpid(), 10**9, 1.0)
        time.sleep(60)
        print("survived", file=sys.stderr)


@dataclass(frozen=True)
class Die:
    name: str
    signal: int

    def __call__(self, on_step: OnStep) -> None:
        os.kill(os.getpid(), self.signal)


@dataclass(frozen=True)
class Leave:
    name: str

    def __call__(self, on_step: OnStep) -> None:
        os._exit(3)


@dataclass(frozen=True)
class DieSpeaking:
    """Is killed while it sends a result larger than any pipe's buffer."""

    name: str

    def __call__(self, on_step: OnStep) -> bytes:
        on_step(os.getpid(), os.getpid(), 1.0)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return bytes(50_000_000)


@dataclass(frozen=True)
class Allocate:
    name: str
    size: int

    def __call__(self, on_step: OnStep) -> int:
        return len(bytearray(b"x") * self.size)


@dataclass(frozen=True)
class Surroundings:
    name: str = "surroundings"

    def __call__(self, on_step: OnStep) -> dict[str, Any]:
        return {
            "threads": [os.environ[f"{library}_NUM_THREADS"] for library in ("OMP", "MKL", "OPENBLAS")],
            "heavy": [name for name in ("torch", "onnxruntime", "numpy", "onnx") if name in sys.modules],
            "ignores_interrupt": signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
        }


@dataclass(frozen=True)
class Unpicklable:
    name: str = "unpicklable"

    def __call__(self, on_step: OnStep) -> object:
        return lambda: None


@pytest.fixture(autouse=True)
def nobody_stays_behind() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


@dataclass(frozen=True)
class Say:
    name: str = "say"

    def __call__(self, on_step: OnStep) -> str:
        print("noise", flush=True)
        return "said"


# Processes


@dataclass(frozen=True)
class Unreadable:
    """Is sent, but cannot be read where it arrives."""

    name: str = "unreadable"

    def __call__(self, on_step: OnStep) -> None:
        raise AssertionError("is never read")

    def __reduce__(self) -> tuple[object, ...]:
        return _unread, ()


@dataclass(frozen=True)
class ReturnUnreadable:
    """Comes back with what cannot be read here."""

    name: str

    def __call__(self, on_step: OnStep) -> object:
        return Unreadable()


def _unread() -> NoReturn:
    raise ImportError("no module named 'nowhere'")


@pytest.mark.parametrize(
    ("job", "told"),
    [
        (Fail("bad", pickle.PicklingError("x")), "PicklingError: x"),
        (Unpicklable("bad"), "lambda"),
        (Fail("bad", ValueError(lambda: None)), "lambda"),
        (ReturnUnreadable("bad"), "ImportError: no module named 'nowhere'"),
        (Unreadable("bad"), "ImportError: no module named 'nowhere'"),
    ],
)
def test_what_cannot_travel_costs_its_job(job: Job, told: str) -> None:
    outcomes = by_name(ProcessExecutor(2).run([job, *doubles(2), replace(job, name="last")], silent))  # type: ignore[type-var]
    assert told in reason(outcomes["bad"]) and told in reason(outcomes["last"])
    assert [outcomes[name].result for name in ("n0", "n1")] == [0, 2]


@posix
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_costs_only_its_job(workers: int) -> None:
    jobs = [Die("killed", signal.SIGKILL), *doubles(2), Die("ended", signal.SIGTERM), Double("last", 9)]
    outcomes = by_name(ProcessExecutor(workers).run(jobs, silent))
    assert len(outcomes) == 5
    assert "died (signal 9), perhaps out of memory; use fewer --workers" in reason(outcomes["killed"])
    assert "died (signal 15)" in reason(outcomes["ended"])
    assert [outcomes[name].result for name in ("n0", "n1", "last")] == [0, 2, 18]


@linux
def test_a_worker_killed_while_it_speaks_spoils_nothing() -> None:
    def wait_for_its_death(name: str, step: int, steps: int, nmse: float) -> None:
        if name == "speaking":
            os.waitid(os.P_PID, step, os.WEXITED | os.WNOWAIT)

    outcomes = by_name(ProcessExecutor(1).run([DieSpeaking("speaking"), Double("next", 4)], wait_for_its_death))
    assert "signal 9" in reason(outcomes["speaking"])
    assert outcomes["next"].result == 8


def test_a_job_that_leaves_the_process_costs_only_itself() -> None:
    outcomes = by_name(ProcessExecutor(1).run([Leave("leaver"), Double("next", 4)], silent))
    assert "ended by itself (exit code 3)" in reason(outcomes["leaver"])
    assert outcomes["next"].result == 8


def test_closing_early_stops_the_workers() -> None:
    outcomes = ProcessExecutor(2).run([Double("n0", 0), Stay(), Stay("later")], silent)
    assert next(outcomes).name == "n0"
    assert len(multiprocessing.active_children()) == 2
    outcomes.close()  # type: ignore[attr-defined]
    assert multiprocessing.active_children() == []


def test_an_error_of_the_listener_stops_the_workers() -> None:
    def on_step(name: str, step: int, steps: int, nmse: float) -> NoReturn:
        raise BrokenPipeError("the terminal has gone")

    with pytest.raises(BrokenPipeError):
        list(ProcessExecutor(2).run([Stay(), Stay("too")], on_step))


def test_workers_are_light_quiet_and_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # fewer than its share: the user's wish holds
    monkeypatch.setenv("MKL_NUM_THREADS", "100000")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "many")
    for workers in (1, cores + 1):
        (outcome,) = ProcessExecutor(workers).run([Surroundings()], silent)
        share = str(max(1, cores // workers))
        assert outcome.result == {"threads": ["1", share, share], "heavy": [], "ignores_interrupt": True}


@linux
def test_peak_memory_is_the_workers_own() -> None:
    ours = bytearray(b"x") * 300_000_000
    executor = ProcessExecutor(1)
    list(executor.run([Double("small", 1)], silent))
    assert 5_000_000 < executor.peak_rss_bytes < 150_000_000
    list(executor.run([Allocate("large", 150_000_000)], silent))
    assert 150_000_000 < executor.peak_rss_bytes < 300_000_000
    executor = ProcessExecutor(2)
    list(executor.run([Allocate("one", 150_000_000), Allocate("two", 150_000_000)], silent))
    assert 300_000_000 < executor.peak_rss_bytes < 500_000_000
    assert len(ours) == 300_000_000


# A whole program around the executor


def start(tmp_path: Path, body: str) -> subprocess.Popen[str]:
    """A script without a main guard, in a process group of its own."""
    script = tmp_path / "script.py"
    # A job in the background ignores Ctrl-C, and so would its children.
    heeds = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script.write_text(f"from {__name__} import *\nimport os, sys\n{heeds}{body}", encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        start_new_session=True,
    )


BUSY = """
def on_step(name, step, steps, nmse):
    print(name, flush=True)

for outcome in ProcessExecutor(2).run([Stay("one"), Stay("two")], on_step):
    print(outcome)
"""


def test_a_script_without_a_main_guard_runs_once_and_owns_its_stdout(tmp_path: Path) -> None:
    body = 'print("begin", flush=True)\nprint([o.result for o in ProcessExecutor(2).run([Say()], silent)])'
    out, err = start(tmp_path, body).communicate()
    assert out == "begin\n['said']\n"
    assert err == "noise\n"


@posix
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_do_not_outlive_a_killed_main_process(tmp_path: Path, how: signal.Signals) -> None:
    process = start(tmp_path, BUSY)
    assert process.stdout is not None
    assert {process.stdout.readline(), process.stdout.readline()} == {"one\n", "two\n"}
    process.send_signal(how)
    out, err = process.communicate()  # returns when the last holder of its streams has ended
    assert process.returncode == -how
    assert out == ""
    assert "survived" not in err


@posix
def test_ctrl_c_ends_everything_with_one_traceback(tmp_path: Path) -> None:
    process = start(tmp_path, BUSY)
    assert process.stdout is not None
    assert {process.stdout.readline(), process.stdout.readline()} == {"one\n", "two\n"}
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == -signal.SIGINT
    assert out == ""
    assert err.count("Traceback") == 1
    assert err.endswith("KeyboardInterrupt\n")


@dataclass(frozen=True)
class Number:
    """The number of the process that it runs in."""

    name: str = "number"

    def __call__(self, on_step: OnStep) -> int:
        return os.getpid()


def test_kept_workers_serve_one_run_after_another_and_then_go() -> None:
    executor = ProcessExecutor(2)
    with executor:
        first = {outcome.result for _ in range(3) for outcome in executor.run([Number("a"), Number("b")], silent)}
        assert len(first) <= 2
        assert {outcome.result for outcome in executor.run([Number()], silent)} <= first
        assert {child.pid for child in multiprocessing.active_children()} == first
    assert not multiprocessing.active_children()
    (again,) = executor.run([Number()], silent)
    assert again.result not in first
    assert not multiprocessing.active_children()


@posix
def test_a_kept_worker_that_dies_between_two_runs_costs_nothing() -> None:
    with ProcessExecutor(1) as executor:
        (first,) = executor.run([Number()], silent)
        os.kill(first.result, signal.SIGKILL)
        for child in multiprocessing.active_children():
            child.join()
        (second,) = executor.run([Number()], silent)
        assert second.fault is None
        assert second.result != first.result


def test_a_run_that_ends_early_leaves_no_kept_worker_at_its_job() -> None:
    with ProcessExecutor(2) as executor:
        outcomes = executor.run([Double("n0", 0), Stay()], silent)
        next(outcomes)
        outcomes.close()  # type: ignore[attr-defined]
        assert not multiprocessing.active_children()
        assert by_name(executor.run([Double("n1", 1)], silent))["n1"].result == 2
    with pytest.raises(RunDirError), ProcessExecutor(2) as executor:
        list(executor.run([Stay(), Fail("bad", RunDirError("no such place"))], silent))
    assert not multiprocessing.active_children()
