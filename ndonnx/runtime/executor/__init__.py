"""Running jobs: one after the other here, or side by side in processes. Knows nothing of what they do."""

from __future__ import annotations

from typing import Literal

from ndonnx.errors import RecipeError
from ndonnx.runtime.executor.base import Executor, Job, OnStep, OnStepNamed, Outcome
from ndonnx.runtime.executor.processes import ProcessExecutor
from ndonnx.runtime.executor.serial import SerialExecutor

__all__ = [
    "Executor",
    "Job",
    "OnStep",
    "OnStepNamed",
    "Outcome",
    "ProcessExecutor",
    "SerialExecutor",
    "make_executor",
]


def make_executor(kind: Literal["serial", "process"], workers: int) -> Executor:
    """The executor of a recipe's `executor` and `workers`; `serial` runs one job at a time whatever `workers` is.

    Raises:
        RecipeError: `kind` is unknown or `workers` is below 1.
    """
    if workers < 1:
        raise RecipeError(f"workers = {workers}: at least 1 is needed")
    match kind:
        case "serial":
            return SerialExecutor()
        case "process":
            return ProcessExecutor(workers)
    raise RecipeError(f"executor = {kind!r}: unknown; choose serial or process")
