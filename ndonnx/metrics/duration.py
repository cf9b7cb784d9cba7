"""How long a compression would take, told before it: the samples it reads and the steps it takes, as timed here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from ndonnx.config.recipe import Recipe
from ndonnx.data import DataSource
from ndonnx.data.augmentation import image_axes
from ndonnx.data.inputs import interface_of
from ndonnx.data.split import compared_of
from ndonnx.distill.schedule import Schedule
from ndonnx.distill.step_time import seconds_a_step
from ndonnx.graph.dataflow import float_outputs
from ndonnx.metrics.looks import TimeLook
from ndonnx.partition import Partition
from ndonnx.runtime.machine import usable_cores

_STARTING = 3.0
"""Seconds that ranking, refitting and converting a neighbourhood take one core, about: measured on a text recogniser, a
sentence embedder and a ResNet-20, 0.3 to 5 s."""
_BESIDE = 1.5
"""Time of a training over that of its gradients, about: the optimiser, reading batches, trying rates, measuring."""


def duration(
    parts: Partition, source: DataSource, rows: Mapping[str, NDArray[Any]], recipe: Recipe, samples_a_second: float
) -> TimeLook | None:
    """Tell how long a compression by a recipe takes here, about.

    All neighbourhoods together are the whole, and all cores are busy with them: a step of each takes what a step of
    the whole takes. A student's takes as much less as it has fewer multiply-accumulates.

    Args:
        parts: the teacher and what of it is distilled.
        source: the data.
        rows: some samples of them.
        recipe: how it would be compressed.
        samples_a_second: what the teacher answers here.

    Returns:
        None where the recipe gives a time budget, or the teacher does not convert as a whole.
    """
    if recipe.time_budget is not None or not math.isfinite(samples_a_second):
        return None
    schedule, interface = Schedule(recipe, finetunable=True), interface_of(source.inputs, source.fixed)
    outputs = sorted(float_outputs(parts.model))
    step = seconds_a_step(parts.model, interface, outputs, rows, schedule.plan(recipe.steps)) if outputs else None
    if step is None:
        return None
    inside = _part_inside(parts)
    left = recipe.part_kept if recipe.method == "width" else 1.0
    samples = recipe.samples if source.length is None else min(recipe.samples, source.length)
    count, finetuned = len(parts.distillable), schedule.finetune_steps if schedule.finetunes else 0
    whole = min(samples, schedule.finetune_samples()) if finetuned else 0
    copies = schedule.per_sample(whole) if whole and recipe.augment and image_axes(source.inputs, source.recipe) else 1
    return TimeLook(
        neighbourhoods=count,
        steps=recipe.steps,
        finetune_steps=finetuned,
        reading=(samples + whole * copies) / samples_a_second,
        training=count * _STARTING / usable_cores() + _BESIDE * recipe.steps * step * inside * left,
        finetuning=_BESIDE * finetuned * step * (1 - inside + inside * left),
        comparing=2 * compared_of(samples) / samples_a_second,
    )


def _part_inside(parts: Partition) -> float:
    """Part of the multiply-accumulates that lies in what is distilled; of the parameters where those are not told."""
    parameters, macs = parts.coverage()
    return parameters if macs is None else macs
