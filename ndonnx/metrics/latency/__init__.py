"""How fast models answer in onnxruntime, how long they take to load, and how much memory they need."""

from __future__ import annotations

from ndonnx.metrics.latency.feeds import batch_of, common_batch_size, feeds_for, made_up_feeds
from ndonnx.metrics.latency.measure import (
    AGAINST,
    MODEL,
    PROCESSES,
    Beside,
    Plan,
    ProviderSpeed,
    Start,
    Timing,
    measure,
    measure_beside,
)
from ndonnx.metrics.latency.source import plan_for
from ndonnx.metrics.latency.statistics import Latency, Ratio, ratio, ratio_over_blocks
from ndonnx.metrics.latency.timing import benchmark, latency_of, time_beside

__all__ = [
    "AGAINST",
    "MODEL",
    "PROCESSES",
    "Beside",
    "Latency",
    "Plan",
    "ProviderSpeed",
    "Ratio",
    "Start",
    "Timing",
    "batch_of",
    "benchmark",
    "common_batch_size",
    "feeds_for",
    "latency_of",
    "made_up_feeds",
    "measure",
    "measure_beside",
    "plan_for",
    "ratio",
    "ratio_over_blocks",
    "time_beside",
]
