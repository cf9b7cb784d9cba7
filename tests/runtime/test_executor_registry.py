"""Executors by name: one of a program's own or of a package runs the jobs, and an unknown one is refused beforehand."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

import ndonnx
from ndonnx.errors import RecipeError
from ndonnx.runtime.executor import (
    Job,
    OnStepNamed,
    Outcome,
    ProcessExecutor,
    SerialExecutor,
    make_executor,
    register_executor,
    registry,
)
from ndonnx_cli.main import main
from tests.helpers.models import residual_cnn
from tests.helpers.runs import UNITS, Bench, statuses

PACKAGE = """
from ndonnx.runtime.executor import SerialExecutor, register_executor


@register_executor("packaged", "as a package has it")
class Packaged(SerialExecutor):
    def __init__(self, workers):
        self.workers = workers
"""


class Listing(SerialExecutor):
    """Runs jobs here, and tells which."""

    workers: ClassVar[list[int]] = []
    ran: ClassVar[list[str]] = []

    def __init__(self, workers: int) -> None:
        self.workers.append(workers)

    def run(self, jobs: Iterable[Job], on_step: OnStepNamed) -> Iterator[Outcome]:
        for outcome in super().run(jobs, on_step):
            self.ran.append(outcome.name)
            yield outcome


@pytest.fixture
def listing() -> Iterator[type[Listing]]:
    """A toy executor, registered as `listing`."""
    register_executor("listing", "here, and tells which")(Listing)
    Listing.workers.clear()
    Listing.ran.clear()
    yield Listing
    registry.REGISTERED.pop("listing")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages, with two executors that entry points name."""
    about = tmp_path / "packaged-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: packaged\nVersion: 1.0\n", encoding="utf-8")
    points = "[ndonnx.executors]\npackaged = packaged_executor\nbroken = broken_executor\nsilent = silent_executor\n"
    (about / "entry_points.txt").write_text(points, encoding="utf-8")
    (tmp_path / "packaged_executor.py").write_text(PACKAGE, encoding="utf-8")
    (tmp_path / "broken_executor.py").write_text("raise RuntimeError('no cluster')\n", encoding="utf-8")
    (tmp_path / "silent_executor.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    registry._brought.cache_clear()
    yield tmp_path
    registry._brought.cache_clear()
    registry.REGISTERED.pop("packaged", None)


def test_those_that_come_with_the_library() -> None:
    assert isinstance(make_executor("serial", 3), SerialExecutor)
    assert isinstance(make_executor("process", 3), ProcessExecutor)


def test_a_recipe_names_an_executor_of_the_programs_own(tmp_path: Path, listing: type[Listing]) -> None:
    bench = Bench(tmp_path).put(residual_cnn())
    result = bench.compress(executor="listing", workers=2, finetune_steps=2)
    assert {name for name, status in statuses(result).items() if status == "distilled"} == UNITS
    assert set(listing.ran) >= UNITS and "student" in listing.ran, "the neighbourhoods and the fine-tuning"
    assert max(listing.workers) == 2
    student = bench.student.read_bytes()
    assert bench.bytes("serially", executor="serial", workers=2, finetune_steps=2) == student


@pytest.mark.parametrize("command", ["compress", "search", "harden"])
def test_an_unknown_one_is_refused_before_anything_runs(
    tmp_path: Path, listing: type[Listing], capsys: pytest.CaptureFixture[str], command: str
) -> None:
    bench = Bench(tmp_path).put(residual_cnn())
    files = [str(bench.model), "--data", str(bench.data), "-o", str(bench.student)]
    assert main([command, *files, "--executor", "cloud", "-q"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'executor' = 'cloud'" in line
    known = "listing (here, and tells which), process (in worker processes), ray (on the nodes of a Ray cluster)"
    assert f"{known} or serial (one after" in line
    assert {path.name for path in tmp_path.iterdir()} == {"teacher.onnx", "data.npz"}


def test_a_package_brings_one(installed: Path) -> None:
    executor = make_executor("packaged", 4)
    assert type(executor).__name__ == "Packaged" and vars(executor) == {"workers": 4}
    with pytest.raises(RecipeError, match=r"expected broken, packaged \(as a package has it\), process"):
        make_executor("cloud", 1)


@pytest.mark.parametrize(
    ("name", "told"),
    [("broken", "cannot import broken_executor: no cluster"), ("silent", "silent_executor registers no executor")],
)
def test_a_package_that_fails_is_told_of_in_one_line(installed: Path, name: str, told: str) -> None:
    bench = Bench(installed).put(residual_cnn())
    with pytest.raises(ndonnx.RecipeError, match=told):
        bench.compress(executor=name)


@pytest.mark.parametrize("command", ["compress", "search", "harden"])
def test_without_ray_the_way_out_is_told_in_one_line(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    make_executor("serial", 1)  # so that the file of the Ray executor is imported
    monkeypatch.setitem(sys.modules, "ray", None)
    sys.modules["ndonnx.runtime.executor.ray_session"]._ray.cache_clear()
    files = [str(bench.model), "--data", str(bench.data), "-o", str(bench.student)]
    assert main([command, *files, "--executor", "ray", "-q"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'ndonnx-compress[ray]'" in line and "--executor process" in line
    assert {path.name for path in bench.folder.iterdir()} == {"teacher.onnx", "data.npz"}
