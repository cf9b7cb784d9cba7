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
    from ndonnx.api import evaluate, partition
    from ndonnx.graph.load import load
    from ndonnx.pipeline import CompressResult, compress
    from ndonnx.recipe import DataRecipe, Recipe, load_recipe

    __version__: str

__all__ = ["CompressResult", "DataRecipe", "Recipe", "compress", "evaluate", "load", "load_recipe", "partition"]

_HOMES = {
    "CompressResult": "ndonnx.pipeline",
    "DataRecipe": "ndonnx.recipe",
    "Recipe": "ndonnx.recipe",
    "compress": "ndonnx.pipeline",
    "evaluate": "ndonnx.api",
    "load": "ndonnx.graph.load",
    "load_recipe": "ndonnx.recipe",
    "partition": "ndonnx.api",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("ndonnx-compress")
    if name not in _HOMES:
        raise AttributeError(f"module 'ndonnx' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
