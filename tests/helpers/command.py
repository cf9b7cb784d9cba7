"""What tests of the command share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from typer.main import get_command

from ndonnx.demo import data_path, teacher_path
from ndonnx_cli.main import build_app

TEACHER = str(teacher_path())
TRAIN = str(data_path("train"))
TEST = str(data_path("test"))
UNITS = [f"/unit{i}/relu2/Relu_output_0" for i in range(1, 7)]
QUICK = ["--steps", "5", "--samples", "64", "--executor", "serial", "-q"]
Run = Callable[..., tuple[int, str, str]]


def parameters(command: str) -> dict[str, Any]:
    """The parameters of a command by their Python name."""
    return {parameter.name: parameter for parameter in get_command(build_app()).commands[command].params}  # type: ignore[attr-defined]
