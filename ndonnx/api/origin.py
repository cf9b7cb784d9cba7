"""What a run was asked for, written down so that somebody else can repeat it: its recipe, files and command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ndonnx.config.recipe import Recipe
from ndonnx.config.toml import to_toml
from ndonnx.data import Data
from ndonnx.flow.prepare import Request
from ndonnx.flow.run import Run
from ndonnx.report.provenance import command_line, described_data, described_model, sha256_of
from ndonnx.runtime.atomic import atomic_write

RECIPE_FILE = "recipe.toml"
"""Every setting of the run, in its directory."""


@dataclass(frozen=True)
class Origin:
    """See the fields of `CompressReport` with these names."""

    asked: dict[str, Any]
    command: str | None
    files: dict[str, Any]


def origin_of(run: Run, request: Request, recipe: Recipe, *, of_file: bool) -> Origin:
    """Describe a run, and write its recipe into its directory.

    Args:
        run: the run; its student is written.
        request: the files that it was given.
        recipe: as the user gave it, before the run decided what it leaves open.
        of_file: whether the user gave the model as a file.
    """
    path = run.directory.path / RECIPE_FILE
    atomic_write(path, to_toml(recipe).encode("utf-8", errors="backslashreplace"))
    asked = {
        "model": str(request.model) if of_file else None,
        "data": None if request.data is None else run.split.source.spec,
        "eval": None if request.eval_data is None else run.comparison_data.spec,
        "output": None if request.output is None else str(request.output),
        "recipe": recipe.model_dump(mode="json"),
    }
    files = _files(run, request, path)
    if not of_file:
        files["teacher"]["path"] = None
    return Origin(asked, _command(request, path) if of_file else None, files)


def _command(request: Request, recipe: Path) -> str | None:
    """None where data were given as objects, which no command can name."""
    if not (_has_name(request.data) and _has_name(request.eval_data)):
        return None
    return command_line(
        "compress",
        [
            ("", request.model),
            ("--data", request.data),
            ("--eval", request.eval_data),
            ("--recipe", recipe),
            ("--output", request.output),
        ],
    )


def _has_name(data: Data | None) -> bool:
    return data is None or isinstance(data, str | Path)


def _files(run: Run, request: Request, recipe: Path) -> dict[str, Any]:
    student = request.output
    return {
        "teacher": described_model(request.model),
        "student": None if student is None else described_model(student),
        "data": described_data(run.split.source),
        "eval": None if request.eval_data is None else described_data(run.comparison_data),
        "recipe": {"path": str(recipe), "sha256": sha256_of(recipe)},
    }
