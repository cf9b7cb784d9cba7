"""The command beside another distribution whose import package is called `ndonnx` too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

VERSION = "1.2.3"

WAY_OUT = (
    "error: the distribution 'ndonnx' is installed here too, and its files and those of 'ndonnx-compress' overwrite "
    "each other: pip uninstall -y ndonnx ndonnx-compress; pip install ndonnx-compress; keep 'ndonnx' in another "
    "environment\n"
)


def install_ours(site: Path) -> None:
    """Lay this library and its command into a folder, as a wheel does."""
    unread = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "ndonnx", site / "ndonnx", ignore=unread, dirs_exist_ok=True)
    shutil.copytree(ROOT / "cli", site / "ndonnx_cli", ignore=unread)
    describe(site, "ndonnx-compress", VERSION)


def install_theirs(site: Path) -> None:
    """Lay the other distribution into a folder: one file that ours has too, and one that it has not."""
    (site / "ndonnx").mkdir(parents=True, exist_ok=True)
    (site / "ndonnx" / "__init__.py").write_text("from ndonnx._array import Array\n")
    (site / "ndonnx" / "_array.py").write_text("class Array: ...\n")
    describe(site, "ndonnx", "0.17.1")


def describe(site: Path, name: str, version: str) -> None:
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def ndonnx(*sites: Path, arguments: tuple[str, ...] = ("--version",)) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command where these folders come first."""
    ended = subprocess.run(
        [sys.executable, "-P", "-c", "import sys; from ndonnx_cli.start import main; sys.exit(main())", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sites))},
        capture_output=True,
        text=True,
        check=False,
    )
    return ended.returncode, ended.stdout, ended.stderr


NEVER = ("numpy", "onnx", "onnx_ir", "onnxruntime", "torch", "scipy", "networkx", "matplotlib", "PIL", "pyarrow")
"""What takes long to import and is for no help text."""


@pytest.mark.parametrize(
    ("arguments", "further"),
    [
        (("--help",), ("pydantic", "rich.progress")),
        (("--version",), ()),  # typer itself reads its value with pydantic
        (("compress", "--help"), ()),
    ],
    ids=str,
)
def test_a_help_text_imports_little(arguments: tuple[str, ...], further: tuple[str, ...]) -> None:
    code = (
        "import sys; from ndonnx_cli.start import main; code = main(); "
        f"print(*(name for name in {(*NEVER, *further)} if name in sys.modules), file=sys.stderr); sys.exit(code)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (ended.returncode, ended.stderr) == (0, "\n")
    assert ended.stdout.startswith("ndonnx ") or "Usage: ndonnx" in ended.stdout


def test_alone_it_starts(tmp_path: Path) -> None:
    install_ours(tmp_path)
    assert ndonnx(tmp_path) == (0, f"ndonnx {VERSION}\n", "")


@pytest.mark.parametrize("order", [(install_ours, install_theirs), (install_theirs, install_ours)])
@pytest.mark.parametrize("command", ["--version", "--help", "inspect"])
def test_both_in_one_folder_are_told_in_one_line(
    tmp_path: Path, order: Sequence[Callable[[Path], None]], command: str
) -> None:
    for install in order:
        install(tmp_path)
    assert ndonnx(tmp_path, arguments=(command,)) == (2, "", WAY_OUT)


def test_the_other_one_in_front_is_told(tmp_path: Path) -> None:
    install_theirs(tmp_path / "theirs")
    install_ours(tmp_path / "ours")
    assert ndonnx(tmp_path / "theirs", tmp_path / "ours") == (2, "", WAY_OUT)


def test_the_other_one_further_back_does_no_harm(tmp_path: Path) -> None:
    install_ours(tmp_path / "ours")
    install_theirs(tmp_path / "theirs")
    assert ndonnx(tmp_path / "ours", tmp_path / "theirs") == (0, f"ndonnx {VERSION}\n", "")


def test_what_a_removal_of_the_other_one_leaves_is_told(tmp_path: Path) -> None:
    install_ours(tmp_path)
    (tmp_path / "ndonnx" / "__init__.py").unlink()
    code, out, error = ndonnx(tmp_path)
    assert (code, out) == (2, "")
    assert error.endswith("pip install --force-reinstall --no-deps ndonnx-compress\n") and error.count("\n") == 1
