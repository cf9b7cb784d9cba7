"""One command in a process of its own: with limits, a folder that it may not leave, and a witness of what it opened.

The process is forked from one that has imported everything, so that a command costs milliseconds. It is limited in
memory and time, and whatever it opens is noted twice: Python's audit events tell of files that Python opens, and the
kernel tells (inotify) of whatever opens the files that lie where hostile input would like to read or write.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

MEMORY = 6 * 10**9
"""Bytes that one command may take."""
SECONDS = 60.0
"""Seconds of a processor that one command may take; what it waits while others use the processors is not its own."""
_PATIENCE = 5.0
"""How many times as long it may take by the clock, before it counts as one that waits for ever."""
_CLEAN = (0, 2, 3)
_INSIDE = "inside"
_STREAMS = ("out", "err", "noted")
"""Files beside the folder: what a command prints, and what it opened elsewhere."""
_LARGEST_FILE = 4 * 10**9
_BAIT = b"what lies outside is nobody's to read\n" * 1000
_READS = ("/usr", "/lib", "/lib64", "/etc", "/proc", "/sys", "/dev", "/bin", "/opt/conda")
"""Where libraries, and what they ask of the system, may lie."""
_FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "pickle.find_class")
_CHANGES = {
    "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
    "shutil.rmtree",
}  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_OPENED, _MODIFIED, _MOVED, _CREATED, _DELETED = 0x20, 0x2, 0xC0, 0x100, 0x200


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """Its exit code; below 0 the signal that ended it."""
    seconds: float
    """Of a processor; by the clock where it waited for ever."""
    memory: int
    """Most bytes that it held."""
    out: str
    err: str
    outside: tuple[str, ...]
    """What it opened or changed that is not in its folder."""

    def fault(self) -> str | None:
        """What is wrong with the way it ended, in one line; None for a clean answer."""
        if self.outside:
            return f"reached outside: {self.outside[0]}"
        if self.seconds >= SECONDS:
            return f"not done after {SECONDS:.0f} s"
        if self.code not in _CLEAN:
            return f"exit code {self.code}: {self._last_line()}"
        if "Traceback" in self.err:
            return f"traceback: {self._last_line()}"
        if self.code == 2 and not self._is_one_line():
            return f"not one line: {self.err.strip()[:200]!r}"
        return None if self.memory <= MEMORY else f"took {self.memory / 1e9:.1f} GB"

    def _is_one_line(self) -> bool:
        return self.err.startswith("error: ") and self.err.count("\n") == 1 and self.err.strip().isprintable()

    def _last_line(self) -> str:
        return next((line for line in reversed(self.err.splitlines()) if line.strip()), "")[:300]


class Sandbox:
    """A folder for one command after the other, beside one with baits that no command may touch."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / _INSIDE
        self._started = 0
        self.bait = root / "outside"
        self.bait.mkdir(parents=True)
        (self.bait / "secret.bin").write_bytes(_BAIT)
        (self.bait / "folder").mkdir()

    @contextmanager
    def fresh(self) -> Iterator[Path]:
        """The empty folder of a command, which is emptied again afterwards."""
        _remove(self.folder)
        (self.folder / "tmp").mkdir(parents=True)
        yield self.folder
        _remove(self.folder)

    def run(self, command: Callable[[], int], *, seconds: float = SECONDS, kill_after: float | None = None) -> Ended:
        """Run a command in a forked process inside the folder.

        Args:
            command: gives its exit code.
            seconds: after which it is killed, and has failed.
            kill_after: kill it, with all that it has started, after so many seconds.
        """
        before = self._listing()
        with _Witness([self.bait, self.bait / "folder", self.root]) as witness:
            child = self._start(command, seconds)
            ended = self._end(child, seconds, kill_after)
            touched = witness.told()
        if (after := self._listing()) != before:
            touched.append(f"changed {sorted(after ^ before)[:1]}")
        return replace(ended, outside=(*ended.outside, *touched))

    def run_two(self, command: Callable[[], int], later: float, *, seconds: float) -> tuple[Ended, Ended]:
        """Run a command twice, the second one so many seconds after the first."""
        first = self._start(command, seconds)
        time.sleep(later)
        second = self._start(command, seconds)
        return self._end(first, seconds), self._end(second, seconds)

    def _start(self, command: Callable[[], int], seconds: float) -> tuple[int, float, list[Path]]:
        self._started += 1
        files = [self.root / f"{name}{self._started}" for name in _STREAMS]
        began = time.perf_counter()
        child = os.fork()
        if child == 0:
            _child(command, self.folder, files, seconds)
        return child, began, files

    def _end(self, started: tuple[int, float, list[Path]], seconds: float, kill_after: float | None = None) -> Ended:
        child, began, files = started
        status, usage, late = _wait(child, began + (_PATIENCE * seconds if kill_after is None else kill_after))
        took = usage.ru_utime + usage.ru_stime
        out, err, noted = (
            path.read_text(encoding="utf-8", errors="replace") if path.exists() else "" for path in files
        )
        for path in files:
            path.unlink(missing_ok=True)
        if late and kill_after is None:
            took = time.perf_counter() - began
        code = os.waitstatus_to_exitcode(status)
        return Ended(code, took, usage.ru_maxrss * 1024, out, err, tuple(noted.splitlines()))

    def _listing(self) -> set[tuple[str, int, int]]:
        found = set()
        for path in (*self.bait.rglob("*"), *self.root.iterdir()):
            if not _is_own(path.name) and not path.is_dir():
                stat = path.lstat()
                found.add((str(path), stat.st_size, stat.st_mtime_ns))
        return found


def _is_own(name: str) -> bool:
    return name == _INSIDE or name.rstrip("0123456789") in _STREAMS


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _wait(child: int, until: float) -> tuple[int, resource.struct_rusage, bool]:
    pause, late = 0.001, False
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # whatever it started goes with it
            return status, usage, late
        if time.perf_counter() > until:
            late = True
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)


def _child(command: Callable[[], int], folder: Path, files: Sequence[Path], seconds: float) -> None:
    code = 1
    try:
        os.setsid()
        gc.freeze()
        os.chdir(folder)
        os.environ["TMPDIR"] = str(folder / "tmp")
        tempfile.tempdir = None
        for number, path in enumerate(files[:2], start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        noted = os.open(files[2], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 5))
        resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE, _LARGEST_FILE))
        faulthandler.dump_traceback_later(_PATIENCE * seconds - 1)  # where it stands when it takes too long
        sys.addaudithook(_auditor(folder, noted))
        code = command()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:  # what a shell would see of it: a traceback, and exit code 1
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code & 255)


def _auditor(folder: Path, noted: int) -> Callable[[str, tuple[Any, ...]], None]:
    """A hook that notes whatever Python opens or changes elsewhere, and what it starts."""
    inside = os.path.realpath(folder)
    code = (os.path.realpath(sys.prefix), os.path.realpath(sys.base_prefix), *map(os.path.realpath, sys.path[:]))
    reads = (inside, *(f"{path}{os.sep}" for path in (*code, *_READS) if path))

    def note(what: str, path: object) -> None:
        os.write(noted, f"{what} {path}\n".encode(errors="backslashreplace"))

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in _FORBIDDEN:
            note(event, args[0] if args else "")
        elif event == "open":
            path, _, flags = args
            if isinstance(path, int) or path is None:
                return
            real = os.path.realpath(os.fsdecode(path))
            if flags & _WRITES and real != os.devnull and not real.startswith(inside):
                note("write", real)
            elif not real.startswith(reads):
                note("read", real)
        elif event in _CHANGES and isinstance(args[0], str | bytes | os.PathLike):
            relative = len(args) > 1 and isinstance(args[-1], int) and args[-1] >= 0
            real = os.path.realpath(os.fsdecode(args[0]))
            if not relative and not real.startswith(inside):
                note(event, real)

    return hook


class _Witness:
    """The kernel's word of what was opened or changed in some folders."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._library = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._library.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        mask = _OPENED | _MODIFIED | _MOVED | _CREATED | _DELETED
        self._watched = {
            self._library.inotify_add_watch(self._descriptor, os.fsencode(folder), mask): folder for folder in folders
        }

    def __enter__(self) -> _Witness:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def told(self) -> list[str]:
        """What was touched, without the command's own folder and the files that its streams go to."""
        found = []
        with suppress(BlockingIOError):
            while packed := os.read(self._descriptor, 65536):
                found += list(self._read(packed))
        return [text for text, name in found if name and not _is_own(name)]

    def _read(self, packed: bytes) -> Iterator[tuple[str, str]]:
        at = 0
        while at < len(packed):
            watch, mask, _, length = struct.unpack_from("iIII", packed, at)
            name = os.fsdecode(packed[at + 16 : at + 16 + length].rstrip(b"\0"))
            at += 16 + length
            if not mask & 0x40000000:  # of a folder itself, as when it is listed
                yield f"{'opened' if mask & _OPENED else 'changed'} {self._watched.get(watch)}/{name}", name
