"""Other processes that work in a run directory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")


def run(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Another process that has this package at hand."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def kill_after_first_line(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() != ""
    process.kill()
    process.communicate()
