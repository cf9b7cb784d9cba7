"""Settings of the whole test suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import settings

from ndonnx.flow import finish, measure, mixed_precision, train
from ndonnx.runtime.executor import processes
from ndonnx.teacher import sessions
from tests.helpers.models import inputs_of, residual_cnn
from tests.helpers.runs import Bench

# A busy machine must not fail a property: no test has a time limit. What must pass before a change lands draws the same
# examples every time; `make test-all` draws new ones, and what they find is written down as an `@example`.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("new", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

COUNTING: tuple[Any, ...] = (train, finish, measure, mixed_precision, sessions, processes)
"""Modules that ask for the number of cores."""


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything on one core, in one thread: tests run side by side."""
    for module in COUNTING:
        monkeypatch.setattr(module, "usable_cores", lambda: 1)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A small residual network and its data."""
    return Bench(tmp_path).put(residual_cnn())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same with data enough to set some aside: `teacher.onnx` and `data.npz`."""
    onnx.save(residual_cnn(), tmp_path / "teacher.onnx")
    np.savez(tmp_path / "data.npz", **inputs_of(residual_cnn(), 160))  # type: ignore[arg-type]
    return tmp_path
