"""Small runs of `compress`: settings that take no time, a folder with a teacher and data, and what is told of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ndonnx.api.compress import CompressResult, compress
from ndonnx.config.recipe import Recipe
from tests.helpers.models import inputs_of

ALONE: dict[str, Any] = {
    "batch_size": 16,
    "finetune_steps": 0,
    "executor": "serial",
    "workers": 1,
    "device": "cpu",
    "precision": "fp32",
}
"""How every small run is carried out."""
SMALL = ALONE | {"steps": 6, "inputs": "teacher"}
LEARNING = ALONE | {"steps": 40, "lr": 0.02, "holdout": 0.2, "inputs": "teacher"}
"""Long enough for errors to fall."""
UNITS = {"n02", "n03", "n04"}
"""Neighbourhoods of `residual_cnn` that can be shrunk."""


@dataclass
class Recorder:
    """Keeps the events of a run, and calls back on each."""

    react: Callable[[str], None] = lambda kind: None
    stages: list[str] = field(default_factory=list)
    ends: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        self.stages.append(name)
        self.react("stage")

    def advance(self, amount: int = 1) -> None:
        self.react("advance")

    def step(self, neighbourhood: str, step: int, steps: int, nmse: float) -> None:
        self.react("step")

    def finished(self, neighbourhood: str, status: str, nmse: float | None, reason: str | None) -> None:
        self.ends[neighbourhood] = status
        self.react("finished")

    def note(self, message: str) -> None:
        self.notes.append(message)


@dataclass
class Bench:
    """A folder with a teacher and its data."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "teacher.onnx"

    @property
    def student(self) -> Path:
        return self.folder / "student.onnx"

    @property
    def data(self) -> Path:
        return self.folder / "data.npz"

    def put(self, model: onnx.ModelProto, samples: int = 48, free: onnx.ModelProto | None = None) -> Bench:
        """Write the teacher and random data for it (made for `free` where the teacher fixes its batch)."""
        onnx.save(model, self.model)
        np.savez(self.data, **inputs_of(free or model, samples))  # type: ignore[arg-type]
        return self

    def compress(self, run_dir: str = "run", progress: Recorder | None = None, **recipe: Any) -> CompressResult:
        return compress(
            self.model,
            data=str(self.data),
            output=self.student,
            run_dir=self.folder / run_dir,
            recipe=Recipe(**(SMALL | recipe)),
            progress=progress,
        )

    def bytes(self, run_dir: str = "run", **recipe: Any) -> bytes:
        self.compress(run_dir, **recipe)
        return self.student.read_bytes()


def statuses(result: CompressResult) -> dict[str, str]:
    return {n.name: n.status for n in result.report.neighbourhoods}


def done_markers(run_dir: Path) -> dict[str, Path]:
    return {path.parent.name.partition("-")[0]: path for path in run_dir.glob("students/*/done.json")}


def activations(run_dir: Path) -> int:
    """Bytes of the values that lie in a run directory."""
    total = 0
    for path in (*run_dir.glob("activations/**/*"), *run_dir.glob("prefix/**/*")):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total
