"""The small trained teacher and the data that `ndonnx demo` runs on; README.md beside it tells their origin."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

from ndonnx.errors import UsageError


def teacher_path() -> Path:
    """The teacher: input `image` float32 [N, 1, 8, 8] in -1..1, output `logits` float32 [N, 10]."""
    return Path(str(files(__name__) / "teacher.onnx"))


def data_path(split: Literal["train", "test"]) -> Path:
    """An `.npz` with `image` float32 [N, 1, 8, 8] in -1..1 and `label` int64 [N]; N is 1297 (train) or 500 (test).

    Raises:
        UsageError: `split` is neither `train` nor `test`.
    """
    if split not in ("train", "test"):
        raise UsageError(f"demo data has no split {split!r}: ask for 'train' or 'test'")
    return Path(str(files(__name__) / f"{split}.npz"))
