"""Install the wheel as a stranger does, with nothing but the package index, and try there what it must be able to do.

    python3 scripts/check_install.py [pinned] [broken] [absent] [newest] [lowest]

Each environment is new, in an empty home, without the variables of this shell, and is deleted afterwards:

- pinned: the versions of constraints.txt; on Linux that is torch for CUDA with its torchvision (5.7 GB).
- broken: the same with a torchvision that does not load, as that for CUDA beside a torch without.
- absent: the same without torchvision.
- newest: the newest versions that the ranges of pyproject.toml admit.
- lowest: the lowest that they claim.

In each run `ndonnx demo`, `ndonnx inspect` and the tests of the conversion. Standard library only.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "ndonnx", "cli")
TESTS = ("test_convert.py", "test_converters.py", "test_torchvision.py")
TOOLS = ("hypothesis", "pytest")
"""What these tests need beside the library."""
TOLD = ("numpy", "onnx", "onnx-ir", "onnxruntime-gpu", "onnxruntime", "pydantic", "scipy", "torch", "torchvision")
"""Distributions whose versions stand in the table."""

PASSED = "passed"
ENVIRONMENTS = ("pinned", "broken", "absent", "newest", "lowest")
"""In the order in which one becomes the next."""
TRIES_TORCHVISION = """
try:
    import torchvision
except RuntimeError as error:
    print(error)
"""


class CheckError(Exception):
    """A step that failed, in one line."""


@dataclass(frozen=True)
class Row:
    """What became of one environment, as it stands in the table."""

    name: str
    result: str
    checks: str = ""
    size: str = ""
    versions: str = ""

    def __str__(self) -> str:
        return f"| {self.name} | {self.result} | {self.checks} | {self.size} | {self.versions} |"


@dataclass(frozen=True)
class Environment:
    """A virtual environment in a folder of its own, with a home that holds nothing else."""

    folder: Path
    constraints: str | None
    """What pip may choose, one requirement a line; None for whatever the ranges admit."""

    @property
    def python(self) -> Path:
        return self.folder / "venv" / "bin" / "python"

    def variables(self) -> dict[str, str]:
        """All that a command here gets to see of this shell.

        A cap on versions in the machine's own pip configuration would hide what the ranges admit.
        """
        bare = {"HOME": str(self.folder / "home"), "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        return bare if self.constraints is not None else bare | {"PIP_CONSTRAINT": os.devnull}

    def run(self, *command: str | Path, quiet: bool = False) -> str:
        """Run a command, shown unless quiet; its standard output is returned where it is quiet."""
        line = [str(part) for part in command]
        print(f"$ {' '.join(line)}", flush=True)
        ended = subprocess.run(
            line,
            cwd=self.folder,
            env=self.variables(),
            stdout=subprocess.PIPE if quiet else None,
            text=True,
            check=False,
        )
        if ended.returncode != 0:
            raise CheckError(f"exit code {ended.returncode} of {' '.join(line)}")
        return ended.stdout or ""

    def pip(self, *arguments: str | Path) -> None:
        self.run(self.python, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir", "--quiet", *arguments)

    def install(self, *requirements: str | Path) -> None:
        (self.folder / "constraints.txt").write_text(self.constraints or "", encoding="utf-8")
        self.pip("install", "-c", self.folder / "constraints.txt", *requirements)


def lowest() -> str:
    """The lower bounds of pyproject.toml, one pin a line: there is no second list to keep."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ranges = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    pins = {match[1]: match[2] for text in ranges if (match := re.match(r"([\w.-]+)\s*>=\s*([\w.]+)", text))}
    if len(pins) != len(ranges):
        raise CheckError("pyproject.toml has a dependency that does not begin with 'name>=version'")
    return "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()))


def pinned() -> str:
    return (ROOT / "constraints.txt").read_text(encoding="utf-8")


@contextmanager
def environment(constraints: str | None) -> Iterator[Environment]:
    """An environment with the wheel in it; nothing of it is left afterwards, whatever happens meanwhile."""
    with tempfile.TemporaryDirectory(prefix="ndonnx-install-") as scratch:
        new = Environment(Path(scratch), constraints)
        (new.folder / "home").mkdir()
        copy_sources(new.folder)
        new.run(sys.executable, "-m", "venv", new.folder / "venv")
        new.install(build_wheel(new), *TOOLS)
        yield new


def copy_sources(folder: Path) -> None:
    """What the wheel is built from, and the tests beside it, all at once: somebody may go on working meanwhile.

    The tests do not lie beside the sources, which they would import instead of the wheel.
    """
    unread = shutil.ignore_patterns("__pycache__")
    (folder / "sources").mkdir()
    for name in BUILT_FROM:
        copy = partial(shutil.copytree, ignore=unread) if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "sources" / name)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=unread)
    shutil.copy(ROOT / "pyproject.toml", folder)


def build_wheel(new: Environment) -> Path:
    """The wheel, built from copies: a build leaves its outputs beside its sources."""
    sources = new.folder / "sources"
    new.pip("wheel", "--no-deps", "--wheel-dir", new.folder / "wheel", sources)
    (wheel,) = (new.folder / "wheel").glob("*.whl")
    return wheel


def check(new: Environment) -> None:
    """What has to work wherever the wheel is installed."""
    command = new.python.with_name("ndonnx")
    home = new.run(new.python, "-P", "-c", "import ndonnx; print(ndonnx.__file__)", quiet=True)
    if not home.startswith(str(new.folder / "venv")):
        raise CheckError(f"it is not the wheel that is tried, but {home.strip()}")
    new.run(command, "demo", "--quiet")
    teacher = new.run(new.python, "-P", "-c", "import ndonnx.demo as d; print(d.teacher_path())", quiet=True)
    new.run(command, "inspect", teacher.strip())
    new.run(new.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/convert/{name}" for name in TESTS))


def check_cuda(new: Environment) -> None:
    """On Linux the index serves torch for CUDA: anything else came from somewhere else."""
    cuda = new.run(new.python, "-P", "-c", "import torch; print(torch.version.cuda)", quiet=True).strip()
    if (sys.platform, platform.machine()) == ("linux", "x86_64") and cuda == "None":
        raise CheckError("torch is a build without CUDA, which the index does not serve: a local wheel was found")


def versions(new: Environment) -> str:
    """Versions of the distributions that matter, as they stand in the table."""
    listed = new.run(new.python, "-m", "pip", "--disable-pip-version-check", "list", "--format=json", quiet=True)
    found = {entry["name"].lower(): entry["version"] for entry in json.loads(listed)}
    return ", ".join(f"{name} {found[name]}" for name in TOLD if name in found)


def size(new: Environment) -> str:
    used = subprocess.run(["du", "-sk", new.folder / "venv"], capture_output=True, text=True, check=True)
    return f"{int(used.stdout.split()[0]) * 1024 / 1e9:.1f} GB"


def try_all(names: Sequence[str]) -> list[Row]:
    """The rows of the table; environments that differ in torchvision alone share one installation."""
    alike = [name for name in ENVIRONMENTS[:3] if name in names]
    rows = try_group(alike, pinned()) if alike else []
    if "newest" in names:
        rows += try_group(["newest"], None)
    if "lowest" in names:
        rows += try_group(["lowest"], lowest())
    return rows


def try_group(names: Sequence[str], constraints: str | None) -> list[Row]:
    """One installation, tried in each of its states."""
    try:
        with environment(constraints) as new:
            return [try_one(name, new) for name in names]
    except CheckError as error:
        return [Row(name, f"not installed: {error}") for name in names]


def try_one(name: str, new: Environment) -> Row:
    """What becomes of the checks in one state, how long they take, and with which versions."""
    started = time.monotonic()
    try:
        prepare(name, new)
        check(new)
        result = PASSED
    except CheckError as error:
        result = f"failed: {error}"
    return Row(name, result, f"{time.monotonic() - started:.0f} s", size(new), versions(new))


def prepare(name: str, new: Environment) -> None:
    """Bring the installed environment into the state that its name stands for."""
    if name == "absent":
        new.pip("uninstall", "--yes", "torchvision")
    elif name == "broken":
        break_torchvision(new)
    else:
        check_cuda(new)


def break_torchvision(new: Environment) -> None:
    """Take its library away: then it fails as one that was built for another torch."""
    for library in new.folder.glob("venv/lib/python*/site-packages/torchvision/_C*.so"):
        library.unlink()
    if "nms does not exist" not in new.run(new.python, "-P", "-c", TRIES_TORCHVISION, quiet=True):
        raise CheckError("torchvision loads without its library: this environment shows nothing")


def main(names: Sequence[str]) -> int:
    """Try the environments that are named, in their order; 1 where one of them fails."""
    if unknown := [name for name in names if name not in ENVIRONMENTS]:
        print(f"error: no environment is called {unknown[0]!r}: {', '.join(ENVIRONMENTS)}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folders go then too
    rows = try_all(names or ENVIRONMENTS[:1])
    print(
        f"\n{time.strftime('%Y-%m-%d')}, {platform.system()} {platform.machine()}, Python {platform.python_version()}\n"
    )
    print("| environment | result | checks | size | versions |\n| --- | --- | --- | --- | --- |")
    print(*rows, sep="\n")
    return 0 if all(row.result == PASSED for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
