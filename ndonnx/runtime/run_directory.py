"""The run directory: the only channel between stages, and what an interrupted run continues from.

    <run>/lock                        held by the one run that may write here
    <run>/<kind>/<key>/...            files of one entry
    <run>/<kind>/<key>/done.json      written last: what the entry holds, with sizes and digests
    <run>/faults/<name>.txt           tracebacks of what nobody foresaw in the latest run

A run may be killed at any moment, the disk may fill up, somebody may start a second run on the
same directory: whatever is read back as done is whole, and everything else is made again.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

from ndonnx.errors import RunDirError
from ndonnx.runtime.atomic import TEMPORARY, atomic_write, atomic_write_json, explained, sync
from ndonnx.runtime.faults import Fault
from ndonnx.runtime.fingerprints import digest_of

_LOCK = "lock"
DONE = "done.json"
"""Name of the file of an entry that is written last."""
_FAULTS = "faults"
_LOCK_ATTEMPTS = 100
_LONGEST_NAME = 100
"""Characters of the name of a file with a fault."""


# Fingerprints


# Atomic writes


# Entries


def _checked_name(what: str, name: str) -> str:
    if _is_name(name) and not (what == "kind" and name.lower() == _LOCK):
        return name
    raise RunDirError(
        f"{what} {name!r} cannot name a folder of the run directory: "
        "it must not be empty, start with '.', nor hold '/', '\\', ':' or control characters; use its fingerprint"
    )


def _is_name(name: str) -> bool:
    return bool(name) and name.isprintable() and not name.startswith(".") and not set(name) & set("/\\:")


class Entry:
    """A folder of the run directory that counts only once `commit` has written its done-marker."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.key = path.name

    def __repr__(self) -> str:
        return f"Entry({str(self.path)!r})"

    @property
    def done(self) -> bool:
        """Whether the entry is committed and every file of it is as it was then (reads them all)."""
        record = self._record()
        return record is not None and all(self._is_whole(name, file) for name, file in record["files"].items())

    def begin(self) -> Path:
        """Empty the entry, whatever an earlier attempt left, and return its folder."""
        self.remove()
        with explained(self.path, "create"):
            self.path.mkdir(parents=True)
        return self.path

    def commit(self, meta: Mapping[str, Any], *, digest: bool = True) -> None:
        """Declare the entry done: record `meta` (JSON) and every file of the folder, in `done.json`.

        With `digest=False` only sizes are recorded and nothing is flushed to the disk: for large
        files that carry their own checksums.

        Raises:
            RunDirError: the operating system refused; the entry is not done.
            TypeError, ValueError: `meta` is not JSON (NaN and Inf are not).
        """
        files = {}
        with explained(self.path, "complete"):
            for path in sorted(self.path.rglob("*")):
                if path.is_file() and path != self.path / DONE:
                    files[path.relative_to(self.path).as_posix()] = self._describe(path, digest)
        atomic_write_json(self.path / DONE, {"meta": dict(meta), "files": files})

    def meta(self) -> dict[str, Any]:
        """What `commit` was given, as JSON gives it back (tuples as lists).

        Raises:
            RunDirError: the entry is not committed, or its done-marker is damaged.
        """
        record = self._record()
        if record is None:
            raise RunDirError(f"{self.path / DONE}: missing or damaged; run again to make this entry anew")
        meta: dict[str, Any] = record["meta"]
        return meta

    def remove(self) -> None:
        """Delete the entry: the done-marker first, so that no moment shows it done and half there."""
        with explained(self.path, "remove"):
            with suppress(FileNotFoundError):
                (self.path / DONE).unlink()
            with suppress(FileNotFoundError):
                shutil.rmtree(self.path)

    @staticmethod
    def _describe(path: Path, digest: bool) -> dict[str, Any]:
        if digest:
            sync(path)
        return {"size": path.stat().st_size, "blake2b": digest_of(path) if digest else None}

    def _record(self) -> dict[str, Any] | None:
        """The done-marker's contents; None where it is missing or not what `commit` writes."""
        try:
            record = json.loads((self.path / DONE).read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        match record:
            case {"meta": dict(), "files": dict()}:
                return dict(record)
        return None

    def _is_whole(self, name: str, recorded: object) -> bool:
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            return False
        path = self.path / relative
        try:
            match recorded:
                case {"size": int(size), "blake2b": None}:
                    return path.is_file() and path.stat().st_size == size
                case {"size": int(size), "blake2b": str(digest)}:
                    return path.is_file() and path.stat().st_size == size and digest_of(path) == digest
        except (OSError, ValueError):
            return False
        return False


# The directory


class RunDir:
    """A run directory; as a context manager, held by this run alone.

    Reading needs no lock. Entering creates the directory and takes the lock, which the operating
    system drops when the process ends in whatever way. A directory that this run created is
    removed again when the block fails before anything was written into it.

    Raises:
        RunDirError: on entering, another process holds the directory, or it cannot be created.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: int | None = None
        self._created: list[Path] = []

    def entry(self, kind: str, key: str) -> Entry:
        """The entry `<run>/<kind>/<key>`, whether or not it exists.

        Raises:
            RunDirError: `kind` or `key` cannot name a folder.
        """
        return Entry(self.path / _checked_name("kind", kind) / _checked_name("key", key))

    def entries(self, kind: str) -> list[Entry]:
        """The entries of a kind that are done, by key."""
        folder = self.path / _checked_name("kind", kind)
        with explained(folder, "read"):
            names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        entries = [self.entry(kind, name) for name in names if _is_name(name)]
        return [entry for entry in entries if entry.done]

    def record(self, name: str, fault: Fault) -> Path | None:
        """Keep what is known of a fault that nobody foresaw until the next run here; see `record_fault`."""
        return record_fault(self.path / _FAULTS, name, fault)

    def __enter__(self) -> Self:
        if self._lock is not None:
            raise RunDirError(f"{self.path}: entered twice by the same run; leave it first")
        with explained(self.path, "use as the run directory"):
            self._created = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            lock = self._acquire()
            try:
                for leftover in self.path.glob(TEMPORARY + "*"):
                    leftover.unlink()
                shutil.rmtree(self.path / _FAULTS, ignore_errors=True)
            except BaseException:
                os.close(lock)
                raise
        self._lock = lock
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        lock, self._lock = self._lock, None
        if lock is None:
            return
        try:
            if kind is not None and self._created and self._is_unused():
                self._remove(lock)
            else:
                # Only for a human's eye: whether the directory is held is the system's to say.
                with suppress(OSError):
                    os.ftruncate(lock, 0)
        finally:
            with suppress(OSError):
                os.close(lock)

    def _acquire(self) -> int:
        for _ in range(_LOCK_ATTEMPTS):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | _NO_FOLLOW, 0o666)
            except FileNotFoundError:
                continue  # its failed owner removed the directory in between
            try:
                if not _try_lock(descriptor):
                    raise RunDirError(
                        f"{self.path}: in use by {_holder(descriptor)}; wait for it to end, or choose another --run-dir"
                    )
                if self._is_lock_file(descriptor):
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
        raise RunDirError(f"{self.path}: it keeps disappearing; choose another --run-dir")

    def _is_lock_file(self, descriptor: int) -> bool:
        """Whether the lock that was taken is still the one that the next run will look at."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path / _LOCK))
        except FileNotFoundError:
            return False

    def _is_unused(self) -> bool:
        files = [path for path in self.path.rglob("*") if path.is_symlink() or not path.is_dir()]
        return files == [self.path / _LOCK]

    def _remove(self, lock: int) -> None:
        if sys.platform == "win32":
            os.close(lock)  # an open file cannot be removed there
        # A folder that meanwhile holds something else stays.
        with suppress(OSError):
            (self.path / _LOCK).unlink()
            for folder in sorted(self.path.rglob("*"), reverse=True):
                folder.rmdir()
            for folder in self._created:
                folder.rmdir()


def record_fault(folder: Path, name: str, fault: Fault) -> Path | None:
    """Keep what is known of a fault that nobody foresaw, for whoever looks into it later.

    Args:
        folder: where; it is made if it is missing.
        name: whose fault it is; it becomes a file name, with `_` for what cannot stand in one.
        fault: any; one that was foreseen says everything in its reason, and is not kept.

    Returns:
        The text file with its traceback; None for a foreseen one.

    Raises:
        RunDirError: the operating system refused.
    """
    if fault.foreseen:
        return None
    with explained(folder, "create"):
        folder.mkdir(exist_ok=True)
    path = folder / ("".join(c if c.isalnum() or c in " .,=-" else "_" for c in name)[:_LONGEST_NAME] + ".txt")
    text = f"{name}: {fault.reason}\n\n{fault.traceback}"
    atomic_write(path, text.encode("utf-8", errors="backslashreplace"))
    return path


def _holder(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    return os.read(descriptor, 200).decode("utf-8", errors="replace") or "another process"


if sys.platform == "win32":
    import msvcrt

    # Locked bytes cannot be read by others: lock one far behind the text that names the holder.
    _LOCKED_BYTE = 1 << 20
    _NO_FOLLOW = 0

    def _try_lock(descriptor: int) -> bool:
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
        return True

else:
    import fcntl

    _NO_FOLLOW = os.O_NOFOLLOW

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
