"""ndonnx: compress ONNX models by neighbourhood distillation, without the training code.

    import ndonnx
    result = ndonnx.compress("model.onnx", data="calib.npz", output="student.onnx")

Names are imported when first used, so that `import ndonnx` costs nothing.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ndonnx.api.benchmark import benchmark
    from ndonnx.api.compress import CompressResult, compress
    from ndonnx.api.evaluate import evaluate
    from ndonnx.api.harden import HardenReport, HardenResult, harden
    from ndonnx.api.inspect import inspect, partition_model
    from ndonnx.api.search import SearchResult, search
    from ndonnx.api.sensitivity import threshold
    from ndonnx.config.recipe import DataRecipe, Recipe, SearchRecipe, load_recipe
    from ndonnx.graph.load import load
    from ndonnx.metrics.evaluation import Evaluation
    from ndonnx.metrics.latency import Latency, ProviderSpeed, Ratio, Timing
    from ndonnx.metrics.sensitivity import ThresholdReport
    from ndonnx.partition import Partition
    from ndonnx.report import CompressReport
    from ndonnx.report.inspection import Inspection
    from ndonnx.report.search import SearchReport
    from ndonnx.report.speed import Speed
    from ndonnx.students.registry import load_methods

    __version__: str

__all__ = [
    "CompressReport",
    "CompressResult",
    "DataRecipe",
    "Evaluation",
    "HardenReport",
    "HardenResult",
    "Inspection",
    "Latency",
    "Partition",
    "ProviderSpeed",
    "Ratio",
    "Recipe",
    "SearchRecipe",
    "SearchReport",
    "SearchResult",
    "Speed",
    "ThresholdReport",
    "Timing",
    "benchmark",
    "compress",
    "evaluate",
    "harden",
    "inspect",
    "load",
    "load_methods",
    "load_recipe",
    "partition_model",
    "search",
    "threshold",
]

_HOMES = {
    "CompressReport": "ndonnx.report",
    "CompressResult": "ndonnx.api.compress",
    "DataRecipe": "ndonnx.config.recipe",
    "Evaluation": "ndonnx.metrics.evaluation",
    "HardenReport": "ndonnx.api.harden",
    "HardenResult": "ndonnx.api.harden",
    "Inspection": "ndonnx.report.inspection",
    "Latency": "ndonnx.metrics.latency",
    "Partition": "ndonnx.partition",
    "ProviderSpeed": "ndonnx.metrics.latency",
    "Ratio": "ndonnx.metrics.latency",
    "Recipe": "ndonnx.config.recipe",
    "SearchRecipe": "ndonnx.config.recipe",
    "SearchReport": "ndonnx.report.search",
    "SearchResult": "ndonnx.api.search",
    "Speed": "ndonnx.report.speed",
    "ThresholdReport": "ndonnx.metrics.sensitivity",
    "Timing": "ndonnx.metrics.latency",
    "benchmark": "ndonnx.api.benchmark",
    "compress": "ndonnx.api.compress",
    "evaluate": "ndonnx.api.evaluate",
    "harden": "ndonnx.api.harden",
    "inspect": "ndonnx.api.inspect",
    "load": "ndonnx.graph.load",
    "load_methods": "ndonnx.students.registry",
    "load_recipe": "ndonnx.config.recipe",
    "partition_model": "ndonnx.api.inspect",
    "search": "ndonnx.api.search",
    "threshold": "ndonnx.api.sensitivity",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("ndonnx-compress")
    if name not in _HOMES:
        raise AttributeError(f"module 'ndonnx' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
