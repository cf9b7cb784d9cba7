"""From a model file and data to the hardened model and what there is to tell of it."""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from ndonnx.api.models import Model, Placed, placed
from ndonnx.api.settings import RecipeLike, recipe_of
from ndonnx.assemble.verify import verify
from ndonnx.config.recipe import Recipe
from ndonnx.data import Data
from ndonnx.distill.noisy_body import measure_noises
from ndonnx.distill.tasks.outputs import check_told
from ndonnx.errors import ModelError, NdonnxError, SliceError, UsageError
from ndonnx.flow.harden import Hardening
from ndonnx.flow.prepare import Request, open_all, partition_model
from ndonnx.graph import save, to_proto
from ndonnx.graph.shapes.declared import state_as_in_file
from ndonnx.metrics.evaluation import Evaluation, evaluate
from ndonnx.runtime.faults import Fault
from ndonnx.runtime.progress import Listener, Progress, listening
from ndonnx.runtime.run_directory import record_fault
from ndonnx.teacher.batches import probe

NOISE = 0.3
"""Deviation of the noise, as a part of the activation's own."""
STEPS = 2000

_SPREAD_SAMPLES = 128
"""Samples by which the size of activations is measured."""


@dataclass(frozen=True)
class HardenReport:
    """What a hardening came to."""

    model: str
    output: str | None
    noise: float
    """Deviation of the noise, as a part of each activation's own."""
    values: tuple[str, ...]
    """Exits of neighbourhoods, to which it was added."""
    steps: int
    seconds: float
    """Wall time of the training, in seconds."""
    loss_start: float
    """Under noise, as all four, on the samples by which the best state was chosen."""
    loss: float
    nmse_start: float
    """Normalised squared error of the noisy output against the teacher's clean one, before the training."""
    nmse: float
    metrics: dict[str, Evaluation]
    """Evaluations of `teacher` and `hardened`, without any noise."""

    def to_json(self) -> dict[str, Any]:
        """As one JSON document."""
        return asdict(self) | {"metrics": {name: found.to_json() for name, found in self.metrics.items()}}


@dataclass(frozen=True)
class HardenResult:
    """The hardened model, and what there is to tell of it."""

    model: ir.Model
    report: HardenReport

    def proto(self) -> onnx.ModelProto:
        """The hardened model as a message of the `onnx` package, all weights inside; a new one each time."""
        return to_proto(self.model)

    def save(self, path: str | Path) -> None:
        """Write the hardened model under its final name only when it is complete.

        Raises:
            RunDirError: the folder is missing, unwritable or full.
        """
        save(self.model, path)


def harden(
    model: Model,
    *,
    data: Data,
    noise: float = NOISE,
    steps: int | None = None,
    recipe: RecipeLike | None = None,
    output: str | Path | None = None,
    eval_data: Data | None = None,
    progress: Listener | None = None,
    **settings: Any,
) -> HardenResult:
    """Train a model to answer the same with noise on its inner activations (appendix B.1).

    The targets are the model's own clean answers: class scores by the softened cross-entropy
    (and the labels', if `label_weight` says so), any other output by the squared error. The best
    held-out state is kept, so the model never tolerates noise worse than it did.

    Args:
        model: teacher as a path, an `onnx.ModelProto` or an `onnx_ir.Model`; never modified. It has one output.
        data: inputs to train on, as `compress` takes them.
        noise: deviation of the noise at the exit of every neighbourhood, as a part of the activation's own.
        steps: optimiser steps. None: the recipe's `finetune_steps`, or 2,000 where it says none.
        recipe: the partition, `finetune_lr`, `finetune_samples`, `temperature`, `label_weight` and how to run, as a
            `Recipe`, its keys in a mapping, or the path of a TOML file.
        output: where the hardened model is written. None: nowhere, see `HardenResult.model`.
        eval_data: data for the comparison without noise, as `data`; labels give accuracy. None: rows of `data`
            that nothing else has seen, a tenth of them, at most 2,000.
        progress: who is told what goes on, as a `Progress` or a callable that takes an `Event`. None: the logger
            `ndonnx`.
        settings: further keys of the recipe, laid over it, as `label_weight=0.5`.

    Raises:
        UsageError: bad input, a model that does not convert to torch, or a training that broke down.
        NdonnxError: the training ended in something that nobody foresaw; a file beside the output has its traceback.
    """
    chosen, told = recipe_of(recipe, settings), listening(progress)
    if not (math.isfinite(noise) and noise >= 0):
        raise UsageError(f"--noise {noise:g}: expected a number from 0, as a part of each activation's deviation")
    if steps is not None and steps < 0:
        raise UsageError(f"--steps {steps}: expected at least 0")
    steps = (chosen.finetune_steps or STEPS) if steps is None else steps
    with placed(model) as place:
        request = Request(place.path, data, eval_data, None if output is None else Path(output))
        return _hardened(place, request, chosen, told, noise, steps)


def _hardened(
    place: Placed, request: Request, recipe: Recipe, progress: Progress, noise: float, steps: int
) -> HardenResult:
    path, output = place.path, request.output
    progress.stage("load")
    given = open_all(request, recipe, samples=recipe.finetune_samples)
    for remark in given.remarks:
        progress.note(remark)
    if len(given.teacher.model.graph.outputs) != 1:
        raise ModelError(
            f"{place.name}: has {len(given.teacher.model.graph.outputs)} outputs; only a model with one can be hardened"
        )
    check_told(recipe.task, [value.name or "" for value in given.teacher.model.graph.outputs])
    progress.stage("partition")
    parts = partition_model(given.teacher.model, recipe, given.teacher.interface)
    try:
        noises = measure_noises(parts, given.split.to_fit(_SPREAD_SAMPLES), noise)
        with tempfile.TemporaryDirectory(prefix="ndonnx-") as folder:
            trained = Hardening(given, parts, recipe, progress, Path(folder)).train(noises, steps)
    except SliceError as error:
        raise UsageError(f"{place.name}: cannot be hardened: {error}") from error
    if isinstance(trained, Fault):
        raise _unforeseen(trained, place.name, output or (Path("model") if place.temporary else path))
    hardened, training = trained
    state_as_in_file(hardened, given.teacher.model)
    verify(given.teacher.model, hardened, parts, {}, probe(given.split.source), recipe.parity)
    if output is not None:
        save(hardened, output)
    report = HardenReport(
        model=place.name,
        output=None if output is None else str(output),
        noise=noise,
        values=tuple(found.value for found in noises),
        steps=training.steps,
        seconds=round(training.seconds, 3),
        loss_start=training.loss_start,
        loss=training.loss,
        nmse_start=training.nmse_start,
        nmse=training.nmse,
        metrics={
            "teacher": evaluate(path, given.comparison_data),
            "hardened": evaluate(hardened, given.comparison_data, teacher=path, progress=progress),
        },
    )
    return HardenResult(hardened, report)


def _unforeseen(fault: Fault, model: str, output: Path) -> NdonnxError:
    """One line of what nobody foresaw, and where more is told of it."""
    told = record_fault(output.with_suffix(".faults"), "model", fault)
    return NdonnxError(f"{model}: cannot be hardened: {fault.reason}; {told} tells more")
