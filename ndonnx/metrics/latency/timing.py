"""Timing models within this process: runs that alternate between the models.

A machine's speed drifts (heat, neighbours). Timing the models in turn lets the drift fall on
all of them alike, and a ratio is taken between runs that stood next to each other. Every other
turn goes backwards, so that no model always comes after the same one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from ndonnx.data import input_specs
from ndonnx.errors import ModelError, first_line
from ndonnx.metrics.latency.feeds import Feeds, feeds_for, made_up_feeds
from ndonnx.metrics.latency.statistics import Latency, Ratio, latency, ratio
from ndonnx.teacher.sessions import OrtError, make_session

Model = str | Path | ir.Model
Run = Callable[[], object]


def benchmark(
    models: Mapping[str, Model],
    feeds: Feeds | None,
    *,
    rounds: int = 50,
    warmup: int = 5,
    threads: int | None = None,
    provider: str = "cpu",
) -> dict[str, Latency]:
    """Time the models in turn (A B B A ...) on the same inputs.

    Args:
        models: by the name they have in the result.
        feeds: arrays (n, ...) by input name, of which each model takes those that it reads;
            None makes one sample up: normal floats, zeros elsewhere.
        rounds: timed runs of each model.
        warmup: runs of each model before the clock starts.
        threads: for onnxruntime; None takes the cores of the process's affinity.
        provider: execution provider, as `make_session` names it.

    Raises:
        ModelError: a model cannot be opened or run.
        DataError: an input is missing from `feeds`, or has a dynamic dimension and there are none.
        UsageError: the provider is not there.
    """
    if not models or rounds < 1 or warmup < 0:
        raise ValueError(f"expected models, rounds >= 1 and warmup >= 0, found {len(models)}, {rounds}, {warmup}")
    sessions = {name: open_for_turns(model, threads, provider) for name, model in models.items()}
    given = made_up_feeds(input_specs(next(iter(sessions.values())))) if feeds is None else feeds
    used = {name: feeds_for(name, input_specs(session), given) for name, session in sessions.items()}
    runs = {name: runner(name, session, used[name]) for name, session in sessions.items()}
    take_turns(runs, warmup)
    times = take_turns(runs, rounds)
    return {name: latency(times[name], _samples(used[name])) for name in runs}


def time_beside(model: Model, other: Model, feeds: Feeds) -> Ratio:
    """Time of a run of one model over that of another, in turn, in about a second and a half.

    On one core: whatever else the machine does takes less from one thread than from threads that wait for each other.

    Args:
        model: the one.
        other: the other.
        feeds: arrays by input name, as both take them.

    Raises:
        ModelError: one of them cannot be opened or run.
    """
    models = {"one": model, "other": other}
    first = benchmark(models, feeds, rounds=1, warmup=1, threads=1)
    rounds = int(np.clip(_BESIDE_MS / sum(timed.p50_ms for timed in first.values()), *_BESIDE_ROUNDS))
    timed = benchmark(models, feeds, rounds=rounds, warmup=2, threads=1)
    return ratio(timed["one"], timed["other"])


_BESIDE_MS = 1500
"""Milliseconds of timed runs of both models of a comparison, where so few runs do."""
_BESIDE_ROUNDS = 5, 30
"""Fewest and most timed runs of each."""


def latency_of(
    models: Mapping[str, Model],
    feeds: Feeds,
    *,
    rounds: int = 20,
    warmup: int = 3,
    threads: int | None = None,
    provider: str = "cpu",
) -> dict[str, float]:
    """Median milliseconds of one run of each of many slices, timed in turn.

    Args: as `benchmark`; `feeds` holds the inputs of all the slices, by value name.

    Raises:
        ModelError, DataError, UsageError: as `benchmark`.
    """
    found = benchmark(models, feeds, rounds=rounds, warmup=warmup, threads=threads, provider=provider)
    return {name: entry.p50_ms for name, entry in found.items()}


def open_for_turns(model: Model, threads: int | None, provider: str) -> ort.InferenceSession:
    """A session whose threads rest as soon as its run is over, so that they take no core from the next model."""
    return make_session(model, threads=threads, device=provider, rest=True)


def runner(name: str, session: ort.InferenceSession, feeds: Mapping[str, NDArray[np.generic]]) -> Run:
    """One run of a model as a call without arguments, whose error is a `ModelError`."""
    given = dict(feeds)

    def run() -> object:
        try:
            return session.run(None, given)
        except OrtError as error:
            raise ModelError(f"{name}: onnxruntime failed to run the model: {first_line(error)}") from error

    return run


def take_turns(
    runs: Mapping[str, Run], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Milliseconds of every run: each `rounds` times, in the given order and backwards by turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs.items())
    for _ in range(rounds):
        for name, run in order:
            start = clock()
            run()
            times[name].append((clock() - start) * 1000)
        order.reverse()
    return times


def _samples(feeds: Feeds) -> int:
    return next((len(value) for value in feeds.values() if value.ndim), 1)
