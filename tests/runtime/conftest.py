"""Both executors that ship."""

from __future__ import annotations

import pytest

from ndonnx.runtime.executor import Executor, make_executor


@pytest.fixture(params=["serial", "process"])
def executor(request: pytest.FixtureRequest) -> Executor:
    return make_executor(request.param, 2)
