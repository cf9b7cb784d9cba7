"""The command in an empty folder, and a folder in which a tiny run has ended."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ndonnx_cli.main import main
from tests.helpers.command import QUICK, TEACHER, TRAIN, Run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(arguments)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a tiny run has ended: `s.onnx` and `s.run`."""
    folder = tmp_path_factory.mktemp("finished")
    flags = ["--data", TRAIN, "-o", str(folder / "s.onnx"), *QUICK]
    assert main(["compress", TEACHER, *flags]) == 0
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """The same, as a copy in the current folder of `run`."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path
