"""The pages that tell how to add something: their code runs, and what it adds works from end to end."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import ndonnx
from ndonnx.config.declared import withdraw
from ndonnx.convert import to_torch
from ndonnx.convert.registry import has_converter
from ndonnx.graph import load
from ndonnx.partition.channels.rules import RULES
from ndonnx.runtime.executor.registry import REGISTERED as EXECUTORS
from ndonnx.students import methods, registry
from ndonnx.students.base import REGISTERED
from ndonnx_cli.main import main
from tests.helpers.models import Array, Net, inputs_of, residual_cnn
from tests.helpers.runs import SMALL, UNITS, Bench, statuses

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ["adding-a-method.md", "adding-a-converter.md", "adding-a-rule.md", "adding-an-executor.md"]


def block_of(page: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    return code


def module_of(page: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The code of a page, imported as a module of this name."""
    (folder / f"{name}.py").write_text(block_of(page), encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_short(page: str) -> None:
    assert len((DOCS / page).read_text(encoding="utf-8").splitlines()) < 53


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The method of the page, and a folder with a teacher and its data."""
    module_of("adding-a-method.md", "docs_grid", tmp_path, monkeypatch)
    model = residual_cnn(2)
    onnx.save(model, tmp_path / "teacher.onnx")
    np.savez(tmp_path / "data.npz", **inputs_of(model, 80))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    REGISTERED.pop("grid")
    withdraw("levels")


def weights_of(path: Path) -> dict[str, Array]:
    return {name: np.array(v.const_value.numpy()) for name, v in load(path).graph.initializers.items()}  # type: ignore[union-attr]


def is_on_grid(folder: Path, student: str, levels: int) -> bool:
    """Whether weights were changed, and those that were have no more sizes than the grid has."""
    teacher, changed = weights_of(folder / "teacher.onnx"), weights_of(folder / student)
    changed = {name: array for name, array in changed.items() if not np.array_equal(array, teacher[name])}
    sizes = [len(np.unique(np.round(np.abs(array) / np.abs(array).max(), 5))) for array in changed.values()]
    return bool(sizes) and max(sizes) <= levels + 1


def test_a_method_is_a_recipe_a_flag_and_python(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ndonnx.load_recipe(method="grid", levels=3, **SMALL | {"steps": 0})
    assert recipe.extra["levels"] == 3
    result = ndonnx.compress("teacher.onnx", data="data.npz", recipe=recipe, output="python.onnx")
    assert {n.candidate for n in result.report.neighbourhoods if n.status == "distilled"} == {"grid 3"}
    assert is_on_grid(grid, "python.onnx", 3)
    (grid / "recipe.toml").write_text('method = "grid"\nlevels = 3\nsteps = 0\n', encoding="utf-8")
    assert ndonnx.load_recipe("recipe.toml").extra["levels"] == 3
    flags = ["--method", "grid", "--levels", "3", "--steps", "0", "--finetune-steps", "0", "--inputs", "teacher"]
    code = main(
        ["compress", "teacher.onnx", "--data", "data.npz", *flags, "--executor", "serial", "-o", "flags.onnx", "-q"]
    )
    assert code == 0
    assert (grid / "flags.onnx").read_bytes() == (grid / "python.onnx").read_bytes()
    assert main(["compress", "teacher.onnx", "--data", "data.npz", "--method", "grid", "--levels", "0"]) == 2
    assert "levels" in capsys.readouterr().err


def test_a_file_among_the_methods_is_found_with_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "grid.py").write_text(block_of("adding-a-method.md"), encoding="utf-8")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    try:
        assert "grid" in registry.method_names() and "grid" not in REGISTERED
        assert main(["compress", "--method", "grid", "--help"]) == 0
        assert "--levels" in capsys.readouterr().out
        (tmp_path / "recipe.toml").write_text('method = "grid"\nlevels = 5\n', encoding="utf-8")
        assert ndonnx.load_recipe(tmp_path / "recipe.toml").extra["levels"] == 5
    finally:
        sys.modules.pop("ndonnx.students.methods.grid", None)
        REGISTERED.pop("grid", None)
        withdraw("levels")


def test_a_method_is_a_candidate_of_a_search(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(
        ["search", "teacher.onnx", "--data", "data.npz", "--candidates", "grid 2,7, width 0.5", "--held-out", "10",
         "--pareto", "2", "--steps", "4", "--executor", "serial", "-q", "--json", "-o", "curve"]
    )  # fmt: skip
    assert code == 0
    report = json.loads(capsys.readouterr().out)
    trained = {option["candidate"] for option in report["options"] if option["status"] == "trained"}
    assert trained == {"grid 2", "grid 7", "width 0.5"}
    assert main(["search", "teacher.onnx", "--data", "data.npz", "--candidates", "grid x"]) == 2
    assert "grid N (N from 1)" in capsys.readouterr().err


def test_a_converter_of_a_page_agrees_with_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_converter("CumProd"), "the page needs another example"
    module_of("adding-a-converter.md", "docs_cumprod", tmp_path, monkeypatch)
    assert has_converter("CumProd")
    net = Net()
    x = net.gemm(net.input("x", "N", 6), 6, 4)
    net.op("CumProd", x, net.constant("axis", np.array(1, np.int64)), out="y")
    module = to_torch(ir.from_proto(net.proto("y")))
    assert [name for name, _ in module.named_parameters()]


def test_a_rule_of_a_page_lets_a_width_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Atan" not in RULES, "the page needs another example"
    net = Net()
    hidden = net.op("Atan", net.gemm(net.input("x", "N", 6), 6, 16))
    onnx.save(net.proto(net.gemm(hidden, 16, 4, out="y")), tmp_path / "m.onnx")
    assert not ndonnx.partition_model(tmp_path / "m.onnx").distillable
    page = module_of("adding-a-rule.md", "docs_atan", tmp_path, monkeypatch)
    monkeypatch.setitem(RULES, "Atan", page.RULES["Atan"])
    (neighbourhood,) = ndonnx.partition_model(tmp_path / "m.onnx").distillable
    assert neighbourhood.widths == [16]
    assert ort.InferenceSession(tmp_path / "m.onnx").get_outputs()[0].name == "y"


def test_an_executor_of_a_page_runs_the_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module_of("adding-an-executor.md", "docs_pool", tmp_path, monkeypatch)
    try:
        bench = Bench(tmp_path).put(residual_cnn())
        result = bench.compress(executor="pool")
        assert {name for name, status in statuses(result).items() if status == "distilled"} == UNITS
        pooled = bench.student.read_bytes()
        assert bench.bytes("serially", executor="serial") == pooled
    finally:
        EXECUTORS.pop("pool")
