"""How fast models answer in onnxruntime, how long they take to load, and how much memory they need."""

from __future__ import annotations

from ndonnx.metrics.latency.feeds import batch_of, common_batch_size, feeds_for, made_up_feeds
from ndonnx.metrics.latency.measure import AGAINST, MODEL, PROCESSES, Plan, ProviderSpeed, Start, Timing, measure
from ndonnx.metrics.latency.statistics import Latency, Ratio, ratio, ratio_over_blocks
from ndonnx.metrics.latency.timing import benchmark, latency_of

__all__ = [
    "AGAINST",
    "MODEL",
    "PROCESSES",
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
    "ratio",
    "ratio_over_blocks",
]
