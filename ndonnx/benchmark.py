"""How fast models answer: paired runs that alternate between the models within one process.

A machine's speed drifts (heat, neighbours). Timing the models in turn lets the drift fall on
all of them alike, and a ratio is taken between runs that stood next to each other.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from ndonnx.data import InputSpec, input_specs
from ndonnx.errors import DataError, ModelError
from ndonnx.teacher.sessions import OrtError, first_line, make_session

RESAMPLES = 2000
"""Bootstrap resamples behind a confidence interval."""


@dataclass(frozen=True)
class Latency:
    """Times of one model, per run of one batch."""

    p50_ms: float
    p95_ms: float
    mean_ms: float
    throughput: float
    """Samples per second at the median time."""
    times_ms: tuple[float, ...]
    """Every timed run in order; run i of one model stood next to run i of the others."""


@dataclass(frozen=True)
class Ratio:
    """Median of the paired ratios of times, with its confidence interval."""

    median: float
    low: float
    high: float
    confidence: float


def benchmark(
    models: Mapping[str, str | Path | ir.Model],
    feeds: Mapping[str, NDArray[np.generic]] | None,
    *,
    rounds: int = 50,
    warmup: int = 5,
    threads: int | None = None,
) -> dict[str, Latency]:
    """Time the models in turn (A B A B ...) on the same inputs.

    Args:
        models: by the name they have in the result.
        feeds: arrays (n, ...) by input name; None makes one sample up: normal floats, zeros elsewhere.
        rounds: timed runs of each model.
        warmup: runs of each model before the clock starts.
        threads: for onnxruntime; None takes the cores of the process's affinity.

    Raises:
        ModelError: a model cannot be opened or run.
        DataError: an input is missing from `feeds`, or has a dynamic dimension and there are none.
    """
    if not models or rounds < 1 or warmup < 0:
        raise ValueError(f"expected models, rounds >= 1 and warmup >= 0, found {len(models)}, {rounds}, {warmup}")
    sessions = {name: make_session(model, threads=threads) for name, model in models.items()}
    first = input_specs(next(iter(sessions.values())))
    given = made_up_feeds(first) if feeds is None else dict(feeds)
    used = {name: _feeds_for(name, session, given) for name, session in sessions.items()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(warmup + rounds):
        for name, session in sessions.items():
            milliseconds = _timed(name, session, used[name])
            if turn >= warmup:
                times[name].append(milliseconds)
    return {name: _latency(times[name], _samples(used[name])) for name in sessions}


def ratio(numerator: Latency, denominator: Latency, *, confidence: float = 0.95, seed: int = 0) -> Ratio:
    """How long `numerator` takes as a multiple of `denominator`; both from one `benchmark` call."""
    if len(numerator.times_ms) != len(denominator.times_ms):
        raise ValueError(f"expected paired runs, found {len(numerator.times_ms)} and {len(denominator.times_ms)}")
    pairs = np.asarray(numerator.times_ms) / np.asarray(denominator.times_ms)
    drawn = np.random.default_rng(seed).choice(pairs, size=(RESAMPLES, len(pairs)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.median(drawn, axis=1), [tail, 1 - tail])
    return Ratio(float(np.median(pairs)), float(low), float(high), confidence)


def made_up_feeds(inputs: list[InputSpec], *, seed: int = 0) -> dict[str, NDArray[np.generic]]:
    """One batch of standard normal floats, and zeros for other types; a dynamic batch becomes 1.

    Raises:
        DataError: another dimension is dynamic.
    """
    rng = np.random.default_rng(seed)
    feeds: dict[str, NDArray[np.generic]] = {}
    for spec in inputs:
        shape = []
        for axis, size in enumerate(spec.shape):
            if not isinstance(size, int) and axis > 0:
                raise DataError(f"dimension {axis} ({size or '?'}) of input {spec} is dynamic; give data to run on")
            shape.append(size if isinstance(size, int) else 1)
        values = rng.standard_normal(shape) if spec.is_float else np.zeros(shape)
        feeds[spec.name] = np.asarray(values, dtype=spec.dtype)
    return feeds


def _feeds_for(
    name: str, session: ort.InferenceSession, feeds: Mapping[str, NDArray[np.generic]]
) -> dict[str, NDArray[np.generic]]:
    wanted = [spec.name for spec in input_specs(session)]
    if missing := [entry for entry in wanted if entry not in feeds]:
        raise DataError(f"{name}: expected the inputs {wanted}, found {list(feeds)}; missing {missing}")
    return {entry: feeds[entry] for entry in wanted}


def _timed(name: str, session: ort.InferenceSession, feeds: Mapping[str, NDArray[np.generic]]) -> float:
    start = time.perf_counter()
    try:
        session.run(None, dict(feeds))
    except OrtError as error:
        raise ModelError(f"{name}: onnxruntime failed to run the model: {first_line(error)}") from error
    return (time.perf_counter() - start) * 1000


def _latency(times: list[float], samples: int) -> Latency:
    p50, p95 = (float(value) for value in np.quantile(times, [0.5, 0.95]))
    return Latency(p50, p95, float(np.mean(times)), samples * 1000 / p50, tuple(times))


def _samples(feeds: Mapping[str, NDArray[np.generic]]) -> int:
    return next((len(value) for value in feeds.values() if value.ndim), 1)
