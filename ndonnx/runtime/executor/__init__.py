"""Running jobs: one after the other here, or side by side in processes. Knows nothing of what they do."""

from __future__ import annotations

from ndonnx.runtime.executor.base import (
    Demands,
    Executor,
    Job,
    MovableJob,
    OnStep,
    OnStepNamed,
    Outcome,
    attempt,
)
from ndonnx.runtime.executor.processes import ProcessExecutor
from ndonnx.runtime.executor.registry import (
    check_executor,
    machines_of,
    make_executor,
    register_configured,
    register_executor,
)
from ndonnx.runtime.executor.serial import SerialExecutor

__all__ = [
    "Demands",
    "Executor",
    "Job",
    "MovableJob",
    "OnStep",
    "OnStepNamed",
    "Outcome",
    "ProcessExecutor",
    "SerialExecutor",
    "attempt",
    "check_executor",
    "machines_of",
    "make_executor",
    "register_configured",
    "register_executor",
]
