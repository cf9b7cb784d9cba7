"""`benchmarks.faults`: its sandbox notices what it is there for, its cases repeat, and a few of them end cleanly."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from tests.helpers.models import with_if

if sys.platform != "linux":
    pytest.skip("the benchmark asks Linux what a process opens", allow_module_level=True)

from benchmarks.faults.cases import make
from benchmarks.faults.mutations import MUTATIONS
from benchmarks.faults.sandbox import Sandbox

FEW = 16


def told(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code


def reads(path: str) -> int:
    Path(path).read_bytes()
    return 0


def writes(path: str) -> int:
    Path(path).write_text("owned")
    return 0


def through_the_kernel(path: str) -> int:
    """As a library does that is not written in Python: no audit event tells of it."""
    ctypes.CDLL(None).open(path.encode(), os.O_RDONLY)
    return 0


def fails() -> int:
    raise KeyError("of a library")


def waits() -> int:
    time.sleep(60)
    return 0


def grows() -> int:
    held = bytearray(5 * 10**8)
    held[::4096] = b"x" * len(held[::4096])
    return 0 if held else 1


NOTICED: dict[str, tuple[Callable[[], int], str | None]] = {
    "nothing wrong": (lambda: 0, None),
    "one line": (lambda: told("error: d.npz: no such file", 2), None),
    "a file inside": (lambda: writes("mine") or reads("mine"), None),
    "two lines": (lambda: told("a warning\nerror: d.npz: no such file", 2), "not one line"),
    "no line": (lambda: 2, "not one line"),
    "a control sequence": (lambda: told("error: \x1b[31m", 2), "not one line"),
    "a bug": (fails, "exit code 1: KeyError"),
    "a traceback that was printed": (lambda: told("Traceback (most recent call last):", 0), "traceback"),
    "a crash": (lambda: os.kill(os.getpid(), 9) or 0, "exit code -9"),
    "a read": (lambda: reads("../outside/secret.bin"), "reached outside: read"),
    "a read by a library": (lambda: through_the_kernel("../outside/secret.bin"), "reached outside: opened"),
    "a write": (lambda: writes("../outside/new"), "reached outside: write"),
    "a write beside": (lambda: writes("../new"), "reached outside"),
    "a programme": (lambda: os.system("true"), "reached outside: os.system"),
}


@pytest.mark.parametrize("name", NOTICED)
def test_the_sandbox_notices_what_goes_wrong(tmp_path: Path, name: str) -> None:
    command, fault = NOTICED[name]
    sandbox = Sandbox(tmp_path / "case")
    with sandbox.fresh():
        found = sandbox.run(command).fault()
    assert found is None if fault is None else fault in (found or "")


def test_what_takes_too_long_is_ended(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path / "case")
    with sandbox.fresh():
        ended = sandbox.run(waits, kill_after=0.2)
    assert ended.code == -9


def test_memory_is_measured(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path / "case")
    with sandbox.fresh():
        assert sandbox.run(grows).memory > 5 * 10**8


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}


@pytest.mark.parametrize("number", range(8))
def test_a_case_is_the_same_again(tmp_path: Path, number: int) -> None:
    sandbox = Sandbox(tmp_path / "case")
    found = []
    for _ in range(2):
        with sandbox.fresh() as folder:
            case = make(5, number, folder, sandbox.bait)
            held = files(folder)
            found.append((case, held if not any(name.endswith((".npz", ".parquet")) for name in held) else set(held)))
    assert found[0] == found[1]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_every_mutation_changes_something(mutation: Callable[[random.Random, onnx.ModelProto], None]) -> None:
    before = with_if().SerializeToString()
    changed = 0
    for seed in range(12):
        model = onnx.load_from_string(before)
        mutation(random.Random(seed), model)
        changed += model.SerializeToString() != before
    assert changed


@pytest.mark.slow
def test_a_few_hostile_inputs_end_cleanly() -> None:
    """The short form of `python -m benchmarks.faults --fuzz 5000`."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults", "--fuzz", str(FEW), "--seed", "3"],
        capture_output=True, text=True, check=False, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{FEW} of {FEW} clean" in done.stdout
