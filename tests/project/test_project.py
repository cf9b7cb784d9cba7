"""The project's own files agree with each other: packaging, pins, version, command."""

from __future__ import annotations

import ast
import sys
import tomllib
from importlib.metadata import entry_points, packages_distributions, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import ndonnx

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTION = "ndonnx-compress"

PLATFORMS = {
    "linux-x86": ({"sys_platform": "linux", "platform_machine": "x86_64"}, "onnxruntime-gpu"),
    "linux-arm": ({"sys_platform": "linux", "platform_machine": "aarch64"}, "onnxruntime"),
    "windows-x86": ({"sys_platform": "win32", "platform_machine": "AMD64"}, "onnxruntime-gpu"),
    "windows-arm": ({"sys_platform": "win32", "platform_machine": "ARM64"}, "onnxruntime"),
    "macos-arm": ({"sys_platform": "darwin", "platform_machine": "arm64"}, "onnxruntime"),
    "macos-x86": ({"sys_platform": "darwin", "platform_machine": "x86_64"}, "onnxruntime"),
}


def read_pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read_constraints() -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def direct_requirements() -> list[Requirement]:
    project = read_pyproject()["project"]
    return [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["dev"]]


def package_folders() -> dict[str, Path]:
    """Every package that must be installed, by its import name: each folder that holds Python files."""
    found = {}
    for folder, name in ((ROOT / "ndonnx", "ndonnx"), (ROOT / "cli", "ndonnx_cli")):
        for inner in {path.parent for path in folder.rglob("*.py")}:
            found[".".join((name, *inner.relative_to(folder).parts))] = inner
    return found


def imported_modules(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


OF_EXTRAS = {"olive"}
"""Modules of extras that a file of `ndonnx.integrations` imports, and that nothing else does."""
PACKAGES = package_folders()
REQUIREMENTS = {requirement.name: requirement for requirement in direct_requirements()}


def test_every_package_is_listed_for_installation() -> None:
    assert sorted(PACKAGES) == sorted(read_pyproject()["tool"]["setuptools"]["packages"])


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_package_says_what_it_is_for(name: str) -> None:
    init = PACKAGES[name] / "__init__.py"
    assert init.is_file(), f"{init} is missing"
    assert ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))), f"{init} has no docstring"


def test_every_data_file_is_installed() -> None:
    globs = read_pyproject()["tool"]["setuptools"]["package-data"]
    installed = {
        path for name, folder in PACKAGES.items() for glob in globs.get(name, []) for path in folder.glob(glob)
    }
    present = {path for folder in (ROOT / "ndonnx", ROOT / "cli") for path in folder.rglob("*") if path.is_file()}
    missed = {path for path in present - installed if path.suffix not in {".py", ".pyc"}}
    assert not missed, "add to [tool.setuptools.package-data]"


def test_every_import_is_declared() -> None:
    declared = {Requirement(line).name for line in read_pyproject()["project"]["dependencies"]}
    distributions = packages_distributions()
    undeclared = {
        module
        for folder in PACKAGES.values()
        for path in folder.glob("*.py")
        for module in imported_modules(path) - sys.stdlib_module_names - {"ndonnx", "ndonnx_cli"} - OF_EXTRAS
        if declared.isdisjoint(canonicalize_name(name) for name in distributions.get(module, [module]))
    }
    assert not undeclared, "add to dependencies in pyproject.toml"


def test_modules_of_extras_are_imported_by_integrations_alone() -> None:
    folders = {
        folder for folder in PACKAGES.values() for path in folder.glob("*.py") if imported_modules(path) & OF_EXTRAS
    }
    assert folders == {PACKAGES["ndonnx.integrations"]}


def test_constraints_are_exact_and_carry_no_local_version() -> None:
    pins = read_constraints()
    assert len({pin.name for pin in pins}) == len(pins), "a package is pinned twice"
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "==", pin
        assert Version(specifier.version).local is None, pin
        assert pin.url is None and pin.marker is None, pin


@pytest.mark.parametrize("name", sorted(REQUIREMENTS))
def test_direct_dependency_is_a_range_that_holds_its_pin(name: str) -> None:
    requirement = REQUIREMENTS[name]
    assert requirement.specifier, "no lower bound"
    assert all(specifier.operator != "==" for specifier in requirement.specifier), "a pin belongs into constraints.txt"
    pins = {pin.name: pin for pin in read_constraints()}
    assert name in pins, "not pinned in constraints.txt"
    (pinned,) = pins[name].specifier
    assert requirement.specifier.contains(pinned.version)


@pytest.mark.parametrize(("platform", "expected"), PLATFORMS.values(), ids=PLATFORMS)
def test_each_platform_gets_exactly_one_onnxruntime(platform: dict[str, str], expected: str) -> None:
    chosen = [
        requirement.name
        for requirement in REQUIREMENTS.values()
        if requirement.name.startswith("onnxruntime") and requirement.marker and requirement.marker.evaluate(platform)
    ]
    assert chosen == [expected]


def test_version_is_the_one_in_pyproject() -> None:
    stated = read_pyproject()["project"]["version"]
    assert version(DISTRIBUTION) == stated, "reinstall: the installed metadata is stale"
    assert ndonnx.__version__ == stated


def test_command_leads_to_a_callable() -> None:
    (command,) = (entry for entry in entry_points(group="console_scripts", name="ndonnx") if entry.dist)
    assert command.dist is not None and command.dist.name == DISTRIBUTION
    assert callable(command.load())
