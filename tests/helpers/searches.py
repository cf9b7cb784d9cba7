"""Small searches on a residual network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ndonnx.api.compress import CompressResult, compress
from ndonnx.api.search import SearchResult, search
from ndonnx.config.recipe import Recipe
from tests.helpers.runs import ALONE, Recorder

SETTINGS = ALONE | {"steps": 4, "samples": 64}


SEARCH: dict[str, Any] = {"candidates": ("width 0.25,0.5,0.75",), "steps": 4, "samples": 64}


def made(options: dict[str, Any]) -> Recipe:
    table = SEARCH | options.pop("search", {})
    return Recipe(**(SETTINGS | options), search=table)


def searched(folder: Path, progress: Recorder | None = None, pareto: int = 2, **options: Any) -> SearchResult:
    out = options.pop("output", None)
    dry_run = options.pop("dry_run", False)
    return search(
        folder / "teacher.onnx",
        data=str(folder / "data.npz"),
        recipe=made(options),
        output=None if out is None else folder / out,
        pareto=pareto,
        run_dir=folder / "run",
        dry_run=dry_run,
        progress=progress,
    )


def compressed(folder: Path, progress: Recorder | None = None, run_dir: str = "run", **options: Any) -> CompressResult:
    return compress(
        folder / "teacher.onnx",
        data=str(folder / "data.npz"),
        recipe=made(options),
        output=folder / "student.onnx",
        run_dir=folder / run_dir,
        progress=progress,
    )


def markers(folder: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in (folder / "run").glob("students/*/done.json")}
