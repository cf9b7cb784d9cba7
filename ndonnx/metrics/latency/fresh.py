"""Timing models in processes of their own, each of which loads and times them anew.

Where memory comes to lie is drawn once per process, and it can move a ratio by more than all other noise.
Each process also tells how long loading takes, and a further one how much memory a model needs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

from ndonnx.data import input_specs
from ndonnx.errors import ModelError
from ndonnx.graph.interface import Interface
from ndonnx.metrics.latency.feeds import Feeds, batch_of, feeds_for
from ndonnx.metrics.latency.timing import open_for_turns, runner, take_turns
from ndonnx.runtime.executor import Job, OnStep, ProcessExecutor
from ndonnx.runtime.executor.worker import peak_rss
from ndonnx.teacher.sessions import make_session

WARMUP = 3
"""Runs of each model before the clock starts: the first one at a new size lays out its memory."""
SECONDS = 1.0
"""Of timed runs of one batch size in one process, unless the number of rounds is given."""
MOST_ROUNDS, LEAST_ROUNDS = 30, 3


@dataclass(frozen=True)
class Setting:
    """How models are run: everything but the inputs."""

    provider: str
    threads: int
    interface: Interface = field(default_factory=Interface)
    """How the models are fed."""


@dataclass(frozen=True)
class Block:
    """What one process measured, by model; runs with the same number stood next to each other."""

    load_ms: dict[str, float]
    times_ms: dict[int, dict[str, list[float]]]
    """By batch size."""


def time_block(
    models: Mapping[str, Path],
    samples: Feeds,
    batch_sizes: Sequence[int],
    setting: Setting,
    rounds: Mapping[int, int] | int | None = None,
) -> Block:
    """Load the models in a fresh process, in the given order, and time them in turn at every batch size.

    Args:
        models: by the name they have in the result.
        samples: arrays (n, ...) by input name; a larger batch than n begins anew.
        batch_sizes: samples in a run.
        setting: provider and threads.
        rounds: timed runs of each model, for all batch sizes or for each; None: what a second has room for.

    Raises:
        ModelError: a model cannot be opened or run, or the process died of it.
        DataError: an input is missing.
    """
    sizes = {size: rounds if rounds is None or isinstance(rounds, int) else rounds[size] for size in batch_sizes}
    return _in_fresh_process(_TimeBlock(" and ".join(models), dict(models), dict(samples), sizes, setting))  # type: ignore[no-any-return]


def peak_memory(model: Path, feeds: Feeds, setting: Setting) -> int | None:
    """Bytes by which a fresh process grows, at most, when it loads a model and runs it; None if the system hides it.

    Memory of the process: what lies on a graphics card is not part of it.

    Raises:
        ModelError: the model cannot be opened or run, or the process died of it.
    """
    grown: int = _in_fresh_process(_MeasureMemory(str(model), model, dict(feeds), setting))
    return grown or None


@dataclass(frozen=True)
class _TimeBlock:
    name: str
    models: dict[str, Path]
    samples: dict[str, NDArray[np.generic]]
    sizes: dict[int, int | None]
    setting: Setting

    def __call__(self, on_step: OnStep) -> Block:
        _wake_onnxruntime(self.setting)
        sessions, load_ms = {}, {}
        for name, path in self.models.items():
            start = time.perf_counter()
            sessions[name] = open_for_turns(path, self.setting.threads, self.setting.provider)
            load_ms[name] = (time.perf_counter() - start) * 1000
        return Block(load_ms, {size: self._times(sessions, size) for size in self.sizes})

    def _times(self, sessions: Mapping[str, ort.InferenceSession], size: int) -> dict[str, list[float]]:
        batch = self.setting.interface.feeds(batch_of(self.samples, size))
        runs = {
            name: runner(f"{self.models[name]}, batch of {size}", session, feeds_for(name, input_specs(session), batch))
            for name, session in sessions.items()
        }
        warm = take_turns(runs, WARMUP)
        return take_turns(runs, self.sizes[size] or rounds_for(sum(times[-1] for times in warm.values())))


@dataclass(frozen=True)
class _MeasureMemory:
    name: str
    model: Path
    feeds: dict[str, NDArray[np.generic]]
    setting: Setting

    def __call__(self, on_step: OnStep) -> int:
        _wake_onnxruntime(self.setting)
        _forget_peak()
        before = peak_rss()
        session = make_session(self.model, threads=self.setting.threads, device=self.setting.provider)
        run = runner(self.name, session, feeds_for(self.name, input_specs(session), self.feeds))
        for _ in range(WARMUP):
            run()
        return max(0, peak_rss() - before)


def rounds_for(turn_ms: float) -> int:
    """Rounds that fit into `SECONDS` where one turn of all models takes `turn_ms`, within bounds."""
    return int(np.clip(SECONDS * 1000 / max(turn_ms, 1e-6), LEAST_ROUNDS, MOST_ROUNDS))


def load_time(blocks: Sequence[Block], name: str) -> float:
    """Median milliseconds from a file to a session."""
    return statistics.median(block.load_ms[name] for block in blocks)


def _in_fresh_process(job: Job) -> Any:
    (outcome,) = ProcessExecutor(1).run([job], lambda *_: None)
    if (fault := outcome.fault) is not None:
        if fault.foreseen:
            raise ModelError(fault.reason)
        cause = fault.reason.partition(";")[0]
        raise ModelError(f"{job.name}: could not be measured: {cause}; try smaller batches, or more memory")
    return outcome.result


def _wake_onnxruntime(setting: Setting) -> None:
    """Run something tiny, so that what onnxruntime sets up once is not put down to the first model."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]), helper.make_tensor_value_info("y", 1, [1])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "tiny", value[:1], value[1:])
    tiny = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = make_session(tiny.SerializeToString(), threads=setting.threads, device=setting.provider)
    session.run(None, {"x": np.zeros(1, np.float32)})


def _forget_peak() -> None:
    """Let the peak begin anew at what is held now, where the system (Linux) offers that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
