"""What becomes of an exception: why one piece of work came to nothing, or the end of the whole run.

Whatever is raised by the work on one neighbourhood costs that neighbourhood only. What ends a run is what every
further piece of work would meet too: a run directory that cannot be used, a full disk, Ctrl-C.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from ndonnx.errors import NdonnxError, RunDirError

T = TypeVar("T")

_DISK_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_NO_MEMORY = ("out of memory", "can't allocate memory", "failed to allocate memory", "bad_alloc", "bad allocation")
"""What torch, onnxruntime and the C++ runtime say where Python would raise `MemoryError`."""
_LONGEST = 300
"""Characters of a reason that was not written by this package."""


@dataclass(frozen=True)
class Fault:
    """Why one piece of work has no result."""

    reason: str
    """One line, as the report prints it."""
    foreseen: bool = True
    """Whether this package refused the work on purpose; False for bugs, lost workers and a lack of memory."""
    traceback: str = ""
    """Where an unforeseen error was raised, as Python prints it; empty where there is nothing to show."""


def fault_of(error: BaseException) -> Fault:
    """The fault that an exception means for the piece of work that raised it.

    Raises:
        RunDirError: the error concerns the whole run: its directory, or a disk that is full.
        KeyboardInterrupt, GeneratorExit: as they come.
    """
    if isinstance(error, RunDirError | KeyboardInterrupt | GeneratorExit):
        raise error
    if full := next((cause for cause in _causes(error) if _is_full_disk(cause)), None):
        raise RunDirError(f"{getattr(full, 'filename', None) or 'a file'}: cannot be written: {full}") from error
    if isinstance(error, NdonnxError):
        return Fault(" ".join(str(error).split()))
    return Fault(_reason(error), False, "".join(traceback.format_exception(error)))


def tried(work: Callable[[], T]) -> T | Fault:
    """The result of a piece of work on one neighbourhood, or the fault that it ended in.

    Raises:
        RunDirError: what the work met concerns the whole run.
    """
    try:
        return work()
    except Exception as error:  # sorted by `fault_of`, which raises again what is not the work's alone
        return fault_of(error)


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    told = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in _NO_MEMORY):
        return f"out of memory{f' ({told})' if told else ''}; use fewer --workers or a smaller --batch-size"
    if isinstance(error, SystemExit):
        return f"its work ended the process (exit code {error.code})"
    return f"{type(error).__name__}: {told}" if told else type(error).__name__


def _is_full_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _DISK_FULL


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
