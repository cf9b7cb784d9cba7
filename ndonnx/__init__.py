"""ndonnx: compress ONNX models by neighbourhood distillation, without the training code.

    import ndonnx
    result = ndonnx.compress("model.onnx", data="calib.npz", output="student.onnx")

Names are imported when first used, so that `import ndonnx` costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ndonnx.api import benchmark, evaluate, inspect, partition, threshold
    from ndonnx.benchmark import Latency, ProviderSpeed, Ratio, Timing
    from ndonnx.evaluate import Evaluation
    from ndonnx.graph.load import load
    from ndonnx.harden import HardenReport, HardenResult, harden
    from ndonnx.partition import Partition
    from ndonnx.pipeline import CompressResult, SearchResult, compress, search
    from ndonnx.recipe import DataRecipe, Recipe, SearchRecipe, load_recipe
    from ndonnx.report import CompressReport
    from ndonnx.report.inspection import Inspection
    from ndonnx.report.search import SearchReport
    from ndonnx.report.speed import Speed
    from ndonnx.threshold import ThresholdReport

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
    "load_recipe",
    "partition",
    "search",
    "threshold",
]

_HOMES = {
    "CompressReport": "ndonnx.report",
    "CompressResult": "ndonnx.pipeline",
    "DataRecipe": "ndonnx.recipe",
    "Evaluation": "ndonnx.evaluate",
    "HardenReport": "ndonnx.harden",
    "HardenResult": "ndonnx.harden",
    "Inspection": "ndonnx.report.inspection",
    "Latency": "ndonnx.benchmark",
    "Partition": "ndonnx.partition",
    "ProviderSpeed": "ndonnx.benchmark",
    "Ratio": "ndonnx.benchmark",
    "Recipe": "ndonnx.recipe",
    "SearchRecipe": "ndonnx.recipe",
    "SearchReport": "ndonnx.report.search",
    "SearchResult": "ndonnx.pipeline",
    "Speed": "ndonnx.report.speed",
    "ThresholdReport": "ndonnx.threshold",
    "Timing": "ndonnx.benchmark",
    "benchmark": "ndonnx.api",
    "compress": "ndonnx.pipeline",
    "evaluate": "ndonnx.api",
    "harden": "ndonnx.harden",
    "inspect": "ndonnx.api",
    "load": "ndonnx.graph.load",
    "load_recipe": "ndonnx.recipe",
    "partition": "ndonnx.api",
    "search": "ndonnx.pipeline",
    "threshold": "ndonnx.api",
}


class _Package(ModuleType):
    """Keeps a public name for its function where a module is called the same (`evaluate`, `partition`).

    The import system sets an imported sub-module as an attribute of its package; without this,
    `ndonnx.evaluate` would be the function before something imports that module, and the module
    afterwards. `from ndonnx.evaluate import ...` finds the module either way.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("ndonnx-compress")
    if name not in _HOMES:
        raise AttributeError(f"module 'ndonnx' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
