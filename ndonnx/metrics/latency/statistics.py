"""From single times to what is told about them: percentiles, and ratios with an interval that holds.

Runs of one pair of sessions are not independent of each other: where the sessions' memory came to
lie stays with them for as long as they live, and moves every one of their ratios the same way. An
interval drawn from those runs alone is far too narrow: a second process would not confirm it. So
the interval over several processes takes each of them as one observation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
"""Bootstrap resamples behind a confidence interval within one process."""


@dataclass(frozen=True)
class Latency:
    """Times of one model, per run of one batch."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    mean_ms: float
    throughput: float
    """Samples per second at the median time."""
    times_ms: tuple[float, ...]
    """Every timed run in order; run i of one model stood next to run i of the others."""


@dataclass(frozen=True)
class Ratio:
    """Typical paired ratio of times, with its confidence interval."""

    median: float
    """Median over the pairs; of several processes, the geometric mean of their medians."""
    low: float
    high: float
    confidence: float


def latency(times: Sequence[float], samples: int) -> Latency:
    """Percentiles of times in milliseconds, each of one run of `samples` samples."""
    p50, p95, p99 = (float(value) for value in np.quantile(times, [0.5, 0.95, 0.99]))
    return Latency(p50, p95, p99, float(np.mean(times)), samples * 1000 / p50, tuple(times))


def ratio(numerator: Latency, denominator: Latency, *, confidence: float = 0.95, seed: int = 0) -> Ratio:
    """How long `numerator` takes as a multiple of `denominator`; both from one `benchmark` call.

    The interval (bootstrap over the pairs) tells how well these sessions were timed, no more.
    """
    pairs = _pairs(numerator.times_ms, denominator.times_ms)
    drawn = np.random.default_rng(seed).choice(pairs, size=(RESAMPLES, len(pairs)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.median(drawn, axis=1), [tail, 1 - tail])
    return Ratio(float(np.median(pairs)), float(low), float(high), confidence)


def ratio_over_blocks(blocks: Sequence[tuple[Sequence[float], Sequence[float]]], *, confidence: float = 0.95) -> Ratio:
    """The ratio of paired times, from several processes that timed both models anew.

    Args:
        blocks: for each process the times of the one model and of the other, as many, in pairs.
        confidence: of Student's interval around the mean of the logarithms of the blocks' medians.

    Raises:
        ValueError: fewer than two blocks, from which no interval can be had, or times that are no pairs.
    """
    if len(blocks) < 2:
        raise ValueError(f"expected at least 2 blocks, found {len(blocks)}")
    from scipy.special import stdtrit  # noqa: PLC0415 - slow to import, needed here alone

    logs = np.log([float(np.median(_pairs(one, other))) for one, other in blocks])
    centre, count = float(logs.mean()), len(logs)
    reach = float(stdtrit(count - 1, (1 + confidence) / 2)) * float(logs.std(ddof=1)) / math.sqrt(count)
    return Ratio(math.exp(centre), math.exp(centre - reach), math.exp(centre + reach), confidence)


def _pairs(one: Sequence[float], other: Sequence[float]) -> NDArray[np.float64]:
    if len(one) != len(other):
        raise ValueError(f"expected paired runs, found {len(one)} and {len(other)}")
    return np.asarray(one, np.float64) / np.asarray(other, np.float64)
