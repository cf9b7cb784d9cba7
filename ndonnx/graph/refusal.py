"""Whether a file is to blame for an error that nobody foresaw: whether those who define ONNX, or run it, refuse it."""

from __future__ import annotations

from pathlib import Path

import onnx

from ndonnx.errors import first_line
from ndonnx.graph.shapes.onnxruntime_types import open_quietly


def refusal(path: Path) -> str | None:
    """Why onnxruntime does not open a model, or ONNX's own checks do not pass it, in one line; None where both do.

    Args:
        path: the model's file.
    """
    for check in (_opened, _checked):
        try:
            check(path)
        except Exception as error:  # their errors share no base class
            return first_line(error)
    return None


def _opened(path: Path) -> None:
    open_quietly(str(path))


def _checked(path: Path) -> None:
    onnx.checker.check_model(str(path), full_check=True)
