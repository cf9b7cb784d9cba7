"""Where a result comes from: files by their digests, versions, the machine, and the command that repeats it."""

from __future__ import annotations

import hashlib
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ndonnx.data import DataSource
from ndonnx.graph.storage.files import model_files
from ndonnx.runtime.machine import memory_bytes, usable_cores

_PACKAGES = {
    "ndonnx": ("ndonnx-compress",),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "torch": ("torch",),
    "numpy": ("numpy",),
}
"""Distributions that may hold each package."""
_CPU_INFO = Path("/proc/cpuinfo")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on, by name; those that are not installed lack."""
    found = {"python": platform.python_version()}
    for name, distributions in _PACKAGES.items():
        for distribution in distributions:
            try:
                found[name] = version(distribution)
            except PackageNotFoundError:
                continue
            break
    return found


def machine() -> dict[str, Any]:
    """The processor, the cores that this process may use, the memory in bytes, and the system."""
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _processor() -> str:
    """The processor's name as Linux tells it, else as Python does."""
    if sys.platform == "linux" and _CPU_INFO.is_file():
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's contents, 64 hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def described_model(path: Path) -> dict[str, Any]:
    """A model's file: its path, its digest, and those of the files beside it that hold weights, by name."""
    _, *beside = model_files(path)
    document: dict[str, Any] = {"path": str(path), "sha256": sha256_of(path)}
    if beside:
        document["beside"] = {part.name: sha256_of(part) for part in beside}
    return document


def described_data(source: DataSource) -> dict[str, Any]:
    """A data source: as the user wrote it, a fingerprint of what it gives a model, and the digest of a single file."""
    path = Path(source.spec)
    document: dict[str, Any] = {"source": source.spec, "fingerprint": source.fingerprint()}
    try:
        if path.is_file():
            document["sha256"] = sha256_of(path)
    except (OSError, ValueError):  # the name of another kind of source, which no path can have
        pass
    return document


def command_line(verb: str, arguments: Sequence[tuple[str, object | None]]) -> str:
    """A command of `ndonnx` for a shell.

    Args:
        verb: as `compress`.
        arguments: flags with their values; an empty flag is an argument by position, and None leaves it out.
    """
    words = ["ndonnx", verb]
    for flag, value in arguments:
        if value is not None:
            words += [flag, str(value)] if flag else [str(value)]
    return shlex.join(words)
