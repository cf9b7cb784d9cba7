"""One small compression, undisturbed, killed at any moment, on a disk that fills up, and beside another of its kind."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.faults.cases import picture_model
from benchmarks.faults.data import INPUT, samples
from benchmarks.faults.sandbox import Sandbox

_STUDENT = "student.onnx"
_RUN = ("compress", "model.onnx", "--data", "data.npz", "--steps", "8", "--finetune-steps", "8", "--batch-size", "8")
_HOW = ("--device", "cpu", "--precision", "fp32", "-q", "--json", "-o", _STUDENT, "--run-dir", "run")
SERIAL = (*_RUN, "--executor", "serial", "--workers", "1", *_HOW)
WORKERS = (*_RUN, "--executor", "process", "--workers", "2", *_HOW)
_PAGE = 4096
_NEW_MOUNTS, _PRIVATE, _REMOUNT = 0x20000, 0x40000 | 0x4000, 0x20


@dataclass
class Count:
    """How many of some attempts ended as they should, and what was wrong with the others."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, fault: str | None) -> None:
        """Count one attempt."""
        if fault is None:
            self.right += 1
        else:
            self.wrong.append(fault)

    def row(self, name: str) -> tuple[str, str, str]:
        """As the table has it."""
        return name, str(self.right + len(self.wrong)), str(self.right)


def lay_out(folder: Path) -> None:
    """The teacher and its data, the same each time."""
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(picture_model())
    np.savez(folder / "data.npz", **{INPUT: samples(random.Random(3), 64)})


def _command(arguments: Sequence[str]) -> Callable[[], int]:
    def run() -> int:
        from ndonnx_cli.main import main  # noqa: PLC0415, TID251 - after `import_everything`

        return main(arguments)

    return run


def undisturbed(sandbox: Sandbox, arguments: Sequence[str]) -> tuple[bytes, float]:
    """The student's bytes, and the seconds that the run takes."""
    with sandbox.fresh() as folder:
        lay_out(folder)
        began = time.perf_counter()
        ended = sandbox.run(_command(arguments), seconds=600)
        if ended.code != 0:
            raise RuntimeError(f"the undisturbed run ended with exit code {ended.code}: {ended.err}")
        return (folder / _STUDENT).read_bytes(), time.perf_counter() - began


# Kills


def killed(sandbox: Sandbox, seed: int, count: int, tell: Callable[[str], None]) -> Count:
    """Kill runs at random moments, each twenty-fifth with worker processes, and let the same command continue them."""
    rng, found = random.Random(seed), Count()
    known = {
        arguments: undisturbed(sandbox, arguments) for arguments in ((SERIAL, WORKERS) if count >= 25 else (SERIAL,))
    }
    done = 0
    while done < count:
        arguments = WORKERS if done % 25 == 24 else SERIAL
        expected, seconds = known[arguments]
        moment = rng.uniform(0, seconds)
        fault = _killed_once(sandbox, arguments, moment, expected)
        if fault == _TOO_LATE:
            continue
        done += 1
        found.add(fault)
        tell(f"kill {done} after {moment:.2f} s: {fault or 'same bytes'}")
    return found


_TOO_LATE = "it had ended"


def _killed_once(sandbox: Sandbox, arguments: Sequence[str], moment: float, expected: bytes) -> str | None:
    with sandbox.fresh() as folder:
        lay_out(folder)
        first = sandbox.run(_command(arguments), seconds=600, kill_after=moment)
        if first.code == 0:
            return _TOO_LATE
        if first.code != -signal.SIGKILL:
            return f"ended with exit code {first.code} before it was killed: {first.err[-200:]}"
        student = folder / _STUDENT
        if student.exists() and student.read_bytes() != expected:
            return "a student that is not whole lay under its final name"
        return _continued(sandbox, arguments, expected)


def _continued(sandbox: Sandbox, arguments: Sequence[str], expected: bytes) -> str | None:
    again = sandbox.run(_command(arguments), seconds=600)
    if again.code != 0:
        return f"continued to exit code {again.code}: {again.err[-300:]}"
    if (sandbox.folder / _STUDENT).read_bytes() != expected:
        return "continued to other bytes"
    outside = [each for each in again.outside if arguments is not WORKERS or not each.startswith(_OWN_JOBS)]
    return f"reached outside: {outside[0]}" if outside else None


_OWN_JOBS = "pickle.find_class ndonnx."
"""What a run with worker processes says of the jobs that it sends them itself; no input is ever read so."""


# A full disk


def full_disk(sandbox: Sandbox, count: int, tell: Callable[[str], None]) -> Count:
    """Let the disk fill up at evenly spread moments of a run: on a file system in memory, of so many pages."""
    expected, _ = undisturbed(sandbox, SERIAL)
    used, most = _needed(sandbox)
    found = Count()
    for size in sorted({used + (most - used) * step // count for step in range(count)}):
        fault = _filled_once(sandbox, size, expected)
        found.add(fault)
        tell(f"disk of {size * _PAGE // 1024} KiB: {fault or 'told, and continued to the same bytes'}")
    return found


def _filled_once(sandbox: Sandbox, pages: int, expected: bytes) -> str | None:
    with _disk(sandbox.folder, pages):
        lay_out(sandbox.folder)
        first = sandbox.run(_command(SERIAL), seconds=600)
        student = sandbox.folder / _STUDENT
        if student.exists() and student.read_bytes() != expected:
            return "a student that is not whole lay under its final name"
        if first.code == 0:
            return None if student.exists() else "ended well without a student"
        if first.code != 2 or first.fault() is not None:
            return f"exit code {first.code}: {first.fault() or first.err[-300:]}"
        _resize(sandbox.folder, 10**6)
        return _continued(sandbox, SERIAL, expected)


def _needed(sandbox: Sandbox) -> tuple[int, int]:
    """Pages that the teacher and its data take, and the most that a run takes with them."""
    with _disk(sandbox.folder, 10**6):
        lay_out(sandbox.folder)
        stat = os.statvfs(sandbox.folder)
        used = stat.f_blocks - stat.f_bfree
        sandbox.run(_command(SERIAL), seconds=600)
        stat = os.statvfs(sandbox.folder)
        most = stat.f_blocks - stat.f_bfree
    size = most
    while True:  # what lies there in the middle of a run may be more than what is left of it
        with _disk(sandbox.folder, size):
            lay_out(sandbox.folder)
            if sandbox.run(_command(SERIAL), seconds=600).code == 0:
                return used, size
        size += max(8, size // 8)


@contextmanager
def _disk(folder: Path, pages: int) -> Iterator[None]:
    """A file system in memory of so many pages, seen by this process and its children alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder.mkdir(parents=True, exist_ok=True)
    if not _own_mounts:
        _checked(libc.unshare(_NEW_MOUNTS))
        _checked(libc.mount(b"none", b"/", None, _PRIVATE, None))
        _own_mounts.append(True)
    _checked(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={pages * _PAGE}".encode()))
    try:
        yield
    finally:
        for _ in range(50):
            if libc.umount2(os.fsencode(folder), 2) == 0:
                break
            time.sleep(0.1)


_own_mounts: list[bool] = []
"""Holds something once this process has left the mounts of the system."""


def _resize(folder: Path, pages: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    _checked(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", _REMOUNT, f"size={pages * _PAGE}".encode()))


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"a file system in memory cannot be mounted here: {os.strerror(number)}")


# Two at once


def pairs(sandbox: Sandbox, seed: int, count: int, tell: Callable[[str], None]) -> Count:
    """Start a second run on the directory of a first one, at any moment of it."""
    rng, found = random.Random(seed), Count()
    expected, seconds = undisturbed(sandbox, SERIAL)
    for number in range(1, count + 1):
        moment = rng.uniform(0, seconds)
        fault = _paired_once(sandbox, moment, expected)
        found.add(fault)
        tell(f"pair {number}, the second after {moment:.2f} s: {fault or 'one of them, or one after the other'}")
    return found


def _paired_once(sandbox: Sandbox, moment: float, expected: bytes) -> str | None:
    with sandbox.fresh() as folder:
        lay_out(folder)
        ended = sandbox.run_two(_command(SERIAL), moment, seconds=600)
        if all(each.code != 0 for each in ended):
            return f"neither ended well: {[each.err[-200:] for each in ended]}"
        for each in ended:
            if each.code != 0 and (each.code != 2 or "in use by" not in each.err or each.fault() is not None):
                return f"exit code {each.code}: {each.err[-300:]}"
        if (folder / _STUDENT).read_bytes() != expected:
            return "the student has other bytes"
        return _continued(sandbox, SERIAL, expected)
