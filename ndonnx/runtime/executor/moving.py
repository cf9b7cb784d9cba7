"""Moving a job to a machine that does not have its files, and what it wrote back: knows of no network.

On the machine that sends, a `Warehouse` hands out each file that jobs read in parts, once, whatever the number of jobs.
On the machine that works, a `Store` keeps what has arrived under its digest, and every job gets a tree of its own in
which its files lie under the names that they have at home: links, no copies. There the job's paths lead.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ndonnx.runtime.atomic import atomic_write, explained
from ndonnx.runtime.executor.base import Job
from ndonnx.runtime.run_directory import DONE

PART = 64 * 2**20
"""Most bytes of a file that travel together."""
Part = npt.NDArray[np.uint8]
"""Bytes of a file, uint8 (bytes,)."""


@dataclass(frozen=True)
class Sent:
    """A file on its way: where it lies at home, and under which keys its parts are found."""

    path: str
    """Absolute."""
    digest: str
    """BLAKE2b of its contents, hexadecimal."""
    parts: tuple[Any, ...]
    """What a network gave for each part; it makes the part of it again."""


def pack(job: Job) -> bytes:
    """A job in bytes, in which every path is one that `unpack` may lead elsewhere.

    Raises:
        Exception: whatever a job that cannot be pickled raises.
    """
    buffer = io.BytesIO()
    _Packer(buffer, pickle.HIGHEST_PROTOCOL).dump(job)
    return buffer.getvalue()


def unpack(packed: bytes, root: Path) -> Job:
    """The job of `pack`, whose absolute paths begin at `root`."""
    job: Job = _Unpacker(io.BytesIO(packed), root).load()
    return job


class _Packer(pickle.Pickler):
    def persistent_id(self, thing: object) -> str | None:
        return str(thing.absolute()) if isinstance(thing, Path) else None


class _Unpacker(pickle.Unpickler):
    def __init__(self, packed: io.BytesIO, root: Path) -> None:
        super().__init__(packed)
        self._root = root

    def persistent_load(self, path: str) -> Path:
        return under(self._root, path)


def under(root: Path, path: str | Path) -> Path:
    """Where an absolute path of another machine lies in a tree."""
    return root.joinpath(*Path(path).parts[1:])


class Warehouse:
    """Files at home, each handed out once, and again when its contents change."""

    def __init__(self, put: Callable[[Part], Any]) -> None:
        """Make an empty one.

        Args:
            put: gives a part to the network; what it returns goes into `Sent.parts`.
        """
        self._put = put
        self._sent: dict[Path, tuple[tuple[int, ...], Sent]] = {}
        self._gone: list[str] = []
        self.sent_bytes = 0

    def send(self, files: Iterable[Path]) -> list[Sent]:
        """The files as they are now.

        Raises:
            RunDirError: one cannot be read.
        """
        return [self._send(path.absolute()) for path in dict.fromkeys(files)]

    def forget_deleted(self) -> list[str]:
        """Let go of files that are not there any more; digests of all that have ever been let go."""
        for path in [path for path in self._sent if not path.exists()]:
            self._forget(path)
        return list(self._gone)

    def _send(self, path: Path) -> Sent:
        with explained(path, "read"):
            found = os.stat(path)
            state = (found.st_size, found.st_mtime_ns, found.st_ino)
            before = self._sent.get(path)
            if before is not None and before[0] == state:
                return before[1]
            digest = _digest(path)
            if before is not None and before[1].digest != digest:
                self._forget(path)
            sent = next((each for _, each in self._sent.values() if each.digest == digest), None)
            parts = sent.parts if sent is not None else tuple(map(self._put_part, _parts(path)))
        self._sent[path] = state, Sent(str(path), digest, parts)
        with suppress(ValueError):
            self._gone.remove(digest)  # it has come back
        return self._sent[path][1]

    def _put_part(self, part: bytes) -> Any:
        self.sent_bytes += len(part)
        return self._put(np.frombuffer(part, np.uint8))

    def _forget(self, path: Path) -> None:
        _, sent = self._sent.pop(path)
        if all(other.digest != sent.digest for _, other in self._sent.values()):
            self._gone.append(sent.digest)


def _parts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while part := file.read(PART):
            yield part


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(path):
        digest.update(part)
    return digest.hexdigest()


class Store:
    """Files that have arrived on one node for one run, shared by all workers there."""

    def __init__(self, run: str, node: str) -> None:
        """Open the node's folder for a run; those of runs that were killed go.

        Args:
            run: names the run, and nothing else ever.
            node: names the node: several of them may be one machine.
        """
        home = Path(tempfile.gettempdir()) / f"ndonnx-{os.getuid() if sys.platform != 'win32' else 0}"
        self.path = home / f"{run}-{node[:_NODE]}"
        self._files = self.path / "files"
        with explained(self.path, "create"):
            self._held = _hold(self.path)
            self._files.mkdir(exist_ok=True)
            for other in home.iterdir():
                if other != self.path and not _is_held(other):
                    shutil.rmtree(other, ignore_errors=True)

    @contextmanager
    def tree(self, files: Sequence[Sent], fetch: Callable[[Any], Part]) -> Iterator[Path]:
        """A folder with links to the files, each under its whole path at home; it goes with the block.

        Args:
            files: what a job reads.
            fetch: a part by what `Sent.parts` says; called only for files that have not arrived yet.

        Raises:
            RunDirError: the disk is full, or a file arrived damaged.
        """
        root = self.path / f"job-{secrets.token_hex(8)}"
        with explained(self.path, "write"):
            root.mkdir()
        try:
            for sent in files:
                self._link(sent, under(root, sent.path), fetch)
            yield root
        finally:
            shutil.rmtree(root, ignore_errors=True)

    def drop(self, digests: Iterable[str]) -> None:
        """Delete files that no later job reads; trees that have links to them keep them until they go."""
        for digest in digests:
            (self._files / digest).unlink(missing_ok=True)

    def close(self) -> None:
        """Delete all of it."""
        os.close(self._held)
        shutil.rmtree(self.path, ignore_errors=True)

    def _link(self, sent: Sent, target: Path, fetch: Callable[[Any], Part]) -> None:
        file = self._files / sent.digest
        with explained(target, "write"):
            target.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                _receive(sent, file, fetch)
            os.link(file, target)


_NODE = 12
"""Characters of a node's name in a folder's."""


def _receive(sent: Sent, file: Path, fetch: Callable[[Any], Part]) -> None:
    """Write a file part by part, whole under its name or not at all."""

    def write(path: Path) -> None:
        digest = hashlib.blake2b(digest_size=16)
        with path.open("wb") as into:
            for key in sent.parts:
                part = fetch(key).data
                digest.update(part)
                into.write(part)
        if digest.hexdigest() != sent.digest:
            raise OSError(f"{sent.path} changed on its way here")

    atomic_write(file, write)


def collect(folder: Path) -> dict[str, bytes]:
    """Contents of all files of a folder, by name relative to it."""
    if not folder.is_dir():
        return {}
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put_down(files: Mapping[str, bytes], folder: Path) -> None:
    """Fill a folder with what a job wrote elsewhere, the marker that it is whole at last.

    Raises:
        RunDirError: the disk is full, or the folder cannot be written.
    """
    with explained(folder, "write"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for name in sorted(files, key=lambda name: (name == DONE, name)):
        with explained(folder, "write"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / name, files[name])


_HELD = "held"
"""The file of a node's folder that its processes have locked for as long as they live."""

if sys.platform == "win32":

    def _hold(folder: Path) -> int:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder / _HELD, os.O_RDWR | os.O_CREAT)

    def _is_held(folder: Path) -> bool:
        del folder
        return True  # not known

else:
    import fcntl

    def _hold(folder: Path) -> int:
        """Make a folder and mark it as in use by this process."""
        while True:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with suppress(FileNotFoundError):  # somebody takes it for forgotten, and clears it away
                descriptor = os.open(folder / _HELD, os.O_RDWR | os.O_CREAT, 0o600)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                if os.path.samestat(os.fstat(descriptor), os.stat(folder / _HELD)):
                    return descriptor

    def _is_held(folder: Path) -> bool:
        try:
            descriptor = os.open(folder / _HELD, os.O_RDWR)
        except OSError:
            return True  # just made, or just cleared away
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False
