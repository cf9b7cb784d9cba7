"""ndonnx: compress ONNX models by neighbourhood distillation, without the training code.

    import ndonnx
    result = ndonnx.compress("model.onnx", data="calib.npz", output="student.onnx")

Names are imported when first used, so that `import ndonnx` costs nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ndonnx.api.benchmark import benchmark
    from ndonnx.api.compress import CompressResult, compress
    from ndonnx.api.evaluate import evaluate
    from ndonnx.api.harden import HardenReport, HardenResult, harden
    from ndonnx.api.inspect import inspect, partition_model
    from ndonnx.api.models import Model, Student
    from ndonnx.api.report import WrittenReport, write_report
    from ndonnx.api.search import SearchResult, search
    from ndonnx.api.sensitivity import threshold
    from ndonnx.api.settings import RecipeLike, load_recipe
    from ndonnx.config.recipe import DataRecipe, InputRecipe, Recipe, SearchRecipe
    from ndonnx.data.registry import Data, Opening, register_source
    from ndonnx.data.source import DataSource, RowSource
    from ndonnx.data.sources.arrays import ArraySource
    from ndonnx.data.specs import Batch, InputSpec
    from ndonnx.distill.tasks.base import Output, OutputTask, Recognised, TaskKind
    from ndonnx.distill.tasks.fidelity import OutputFidelity
    from ndonnx.errors import (
        ConversionError,
        DataError,
        ModelError,
        NdonnxError,
        ParityError,
        RecipeError,
        RunDirError,
        SearchError,
        ShrinkError,
        SliceError,
        TrainingError,
        UsageError,
        VerificationError,
    )
    from ndonnx.graph.load import load
    from ndonnx.metrics.baselines.comparison import BaselineRow, Baselines
    from ndonnx.metrics.evaluation import Evaluation
    from ndonnx.metrics.latency import Latency, ProviderSpeed, Ratio, Timing
    from ndonnx.metrics.looks import DataLook, TimeLook, ValueLook
    from ndonnx.metrics.metric import register_metric
    from ndonnx.metrics.sensitivity import ThresholdReport
    from ndonnx.metrics.verdict import Verdict
    from ndonnx.partition import Partition
    from ndonnx.report import (
        CompressReport,
        FinetuneReport,
        ModelSummary,
        NeighbourhoodReport,
        QuantisationReport,
        SimplifiedReport,
        StageReport,
        TargetReport,
    )
    from ndonnx.report.inspection import Inspection
    from ndonnx.report.search import SearchedStudent, SearchReport
    from ndonnx.report.speed import ModelSize, Speed
    from ndonnx.runtime.progress import Event, Listener, Progress
    from ndonnx.students.base import StudentMethod
    from ndonnx.students.methods.activation import ActivationSwap
    from ndonnx.students.methods.custom import Custom
    from ndonnx.students.methods.lowrank import LowRank
    from ndonnx.students.methods.removal import Removal
    from ndonnx.students.methods.sparsity import Sparsity
    from ndonnx.students.methods.width import Width
    from ndonnx.students.registry import load_methods

    __version__: str

__all__ = [
    "ActivationSwap",
    "ArraySource",
    "BaselineRow",
    "Baselines",
    "Batch",
    "CompressReport",
    "CompressResult",
    "ConversionError",
    "Custom",
    "Data",
    "DataError",
    "DataLook",
    "DataRecipe",
    "DataSource",
    "Evaluation",
    "Event",
    "FinetuneReport",
    "HardenReport",
    "HardenResult",
    "InputRecipe",
    "InputSpec",
    "Inspection",
    "Latency",
    "Listener",
    "LowRank",
    "Model",
    "ModelError",
    "ModelSize",
    "ModelSummary",
    "NdonnxError",
    "NeighbourhoodReport",
    "Opening",
    "Output",
    "OutputFidelity",
    "OutputTask",
    "ParityError",
    "Partition",
    "Progress",
    "ProviderSpeed",
    "QuantisationReport",
    "Ratio",
    "Recipe",
    "RecipeError",
    "RecipeLike",
    "Recognised",
    "Removal",
    "RowSource",
    "RunDirError",
    "SearchError",
    "SearchRecipe",
    "SearchReport",
    "SearchResult",
    "SearchedStudent",
    "ShrinkError",
    "SimplifiedReport",
    "SliceError",
    "Sparsity",
    "Speed",
    "StageReport",
    "Student",
    "StudentMethod",
    "TargetReport",
    "TaskKind",
    "ThresholdReport",
    "TimeLook",
    "Timing",
    "TrainingError",
    "UsageError",
    "ValueLook",
    "Verdict",
    "VerificationError",
    "Width",
    "WrittenReport",
    "benchmark",
    "compress",
    "evaluate",
    "harden",
    "inspect",
    "load",
    "load_methods",
    "load_recipe",
    "partition_model",
    "register_metric",
    "register_source",
    "search",
    "threshold",
    "write_report",
]

_MODULES: Mapping[str, tuple[str, ...]] = {
    "ndonnx.api.benchmark": ("benchmark",),
    "ndonnx.api.compress": ("CompressResult", "compress"),
    "ndonnx.api.evaluate": ("evaluate",),
    "ndonnx.api.harden": ("HardenReport", "HardenResult", "harden"),
    "ndonnx.api.inspect": ("inspect", "partition_model"),
    "ndonnx.api.models": ("Model", "Student"),
    "ndonnx.api.report": ("WrittenReport", "write_report"),
    "ndonnx.api.search": ("SearchResult", "search"),
    "ndonnx.api.sensitivity": ("threshold",),
    "ndonnx.api.settings": ("RecipeLike", "load_recipe"),
    "ndonnx.config.recipe": ("DataRecipe", "InputRecipe", "Recipe", "SearchRecipe"),
    "ndonnx.data.registry": ("Data", "Opening", "register_source"),
    "ndonnx.data.source": ("DataSource", "RowSource"),
    "ndonnx.data.sources.arrays": ("ArraySource",),
    "ndonnx.data.specs": ("Batch", "InputSpec"),
    "ndonnx.errors": (
        "ConversionError",
        "DataError",
        "ModelError",
        "NdonnxError",
        "ParityError",
        "RecipeError",
        "RunDirError",
        "SearchError",
        "ShrinkError",
        "SliceError",
        "TrainingError",
        "UsageError",
        "VerificationError",
    ),
    "ndonnx.graph.load": ("load",),
    "ndonnx.metrics.baselines.comparison": ("BaselineRow", "Baselines"),
    "ndonnx.metrics.evaluation": ("Evaluation",),
    "ndonnx.distill.tasks.base": ("Output", "OutputTask", "Recognised", "TaskKind"),
    "ndonnx.distill.tasks.fidelity": ("OutputFidelity",),
    "ndonnx.metrics.latency": ("Latency", "ProviderSpeed", "Ratio", "Timing"),
    "ndonnx.metrics.looks": ("DataLook", "TimeLook", "ValueLook"),
    "ndonnx.metrics.metric": ("register_metric",),
    "ndonnx.metrics.sensitivity": ("ThresholdReport",),
    "ndonnx.metrics.verdict": ("Verdict",),
    "ndonnx.partition": ("Partition",),
    "ndonnx.report": (
        "CompressReport",
        "FinetuneReport",
        "ModelSummary",
        "NeighbourhoodReport",
        "SimplifiedReport",
        "QuantisationReport",
        "StageReport",
        "TargetReport",
    ),
    "ndonnx.report.inspection": ("Inspection",),
    "ndonnx.report.search": ("SearchReport", "SearchedStudent"),
    "ndonnx.report.speed": ("ModelSize", "Speed"),
    "ndonnx.runtime.progress": ("Event", "Listener", "Progress"),
    "ndonnx.students.base": ("StudentMethod",),
    "ndonnx.students.methods.activation": ("ActivationSwap",),
    "ndonnx.students.methods.custom": ("Custom",),
    "ndonnx.students.methods.lowrank": ("LowRank",),
    "ndonnx.students.methods.removal": ("Removal",),
    "ndonnx.students.methods.sparsity": ("Sparsity",),
    "ndonnx.students.methods.width": ("Width",),
    "ndonnx.students.registry": ("load_methods",),
}
"""Which module has which public names."""
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("ndonnx-compress")
    if name not in _HOMES:
        raise AttributeError(f"module 'ndonnx' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
