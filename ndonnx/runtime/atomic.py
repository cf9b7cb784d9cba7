"""Files that are whole under their final name, or not there."""

from __future__ import annotations

import errno
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ndonnx.errors import RunDirError

TEMPORARY = ".ndonnx-tmp-"


_WAY_OUT = {
    errno.ENOSPC: "free some disk space and run again",
    errno.EDQUOT: "free some disk space and run again",
    errno.EACCES: "check its permissions, or choose another path",
    errno.EPERM: "check its permissions, or choose another path",
    errno.EROFS: "choose a path that can be written",
    errno.ENOENT: "create the missing folder, or choose another path",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@contextmanager
def explained(path: Path, doing: str) -> Iterator[None]:
    """Turn an `OSError` into a `RunDirError` of one line: path, reason, way out."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        way_out = _WAY_OUT.get(error.errno or 0, "choose another path")
        raise RunDirError(f"{path}: cannot {doing}: {reason}; {way_out}") from error


def atomic_write(path: Path, write: bytes | Callable[[Path], None]) -> None:
    """Write a file so that `path` holds either all of it or what it held before.

    `write` is the contents, or a function that writes them to the path it is given: another
    name in the same folder, with the same suffix. That file is removed on any failure.

    Raises:
        RunDirError: the operating system refused (disk full, no permission, no such folder).
    """
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}{path.suffix}")
    with explained(path, "write"):
        try:
            if callable(write):
                write(temporary)
            else:
                temporary.write_bytes(write)
            sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            # Where even this is refused, the first error is the one worth telling.
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def atomic_write_json(path: Path, obj: Any) -> None:
    """Write `obj` as strict JSON (no NaN, no Inf) with `atomic_write`.

    Raises:
        RunDirError: the operating system refused.
        TypeError, ValueError: `obj` is not JSON; nothing is written.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    # A lone surrogate (a file name that is not UTF-8) has no UTF-8 form, but an escaped one.
    atomic_write(path, (text + "\n").encode("utf-8", errors="backslashreplace"))


def sync(path: Path) -> None:
    # Windows flushes only what is open for writing; elsewhere a read-only file can be flushed too.
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # The file itself is safe already; some file systems cannot sync a folder.
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
