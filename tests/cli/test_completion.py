"""Completion in a shell: what bash makes of the script that the command prints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).with_name("ndonnx")


def in_bash(script: str) -> list[str]:
    """Words that a script prints, with `ndonnx` on the path."""
    environment = os.environ | {"PATH": f"{COMMAND.parent}{os.pathsep}{os.environ['PATH']}"}
    printed = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    return printed.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None or not COMMAND.exists(), reason="needs bash and the installed command")
@pytest.mark.parametrize(
    ("words", "found"), [("ndonnx compr", ["compress"]), ("ndonnx compress --execu", ["--executor"])]
)
def test_bash_completes_commands_and_flags(words: str, found: list[str]) -> None:
    source = 'eval "$(_NDONNX_COMPLETE=source_bash ndonnx)"'
    call = f"COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _ndonnx_completion ndonnx"
    assert in_bash(f'{source}; {call}; echo "${{COMPREPLY[@]}}"') == found
