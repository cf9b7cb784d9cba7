"""What training a whole model needs: the teacher's answers with the labels beside them, and a process of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ndonnx.data import DataSource
from ndonnx.executor import Job, Outcome, make_executor
from ndonnx.graph.dataflow import real_inputs
from ndonnx.machine import pick_device
from ndonnx.partition import Partition
from ndonnx.pipeline.batches import CAPTURE_BATCH, whole_batches
from ndonnx.progress import Progress
from ndonnx.recipe import Recipe
from ndonnx.teacher import ActivationStore, capture


def capture_answers(
    parts: Partition, source: DataSource, samples: int, folder: Path, recipe: Recipe, progress: Progress
) -> tuple[ActivationStore, Path | None]:
    """A store of the teacher's inputs and outputs, and an `.npy` of labels if the data hold any.

    Args:
        parts: the teacher.
        source: the data.
        samples: how many of them, drawn with the recipe's seed.
        folder: exists; the store goes to `answers` in it.
        recipe: the seed and the device; a `label_weight` without labels is told of.
        progress: told how far it is.
    """
    labels: list[npt.NDArray[np.int64]] = []

    def batches() -> Iterator[Mapping[str, npt.NDArray[Any]]]:
        labels.clear()
        yield from whole_batches(source, CAPTURE_BATCH, samples=samples, seed=recipe.seed, on_labels=labels.append)

    progress.stage("answers", samples, "samples")
    graph = parts.model.graph
    store = capture(
        parts.model,
        [value.name or "" for value in (*real_inputs(graph), *graph.outputs)],
        batches,
        folder / "answers",
        samples=samples,
        device=pick_device(recipe.device),
        on_batch=progress.advance,
    )
    if not labels:
        if recipe.label_weight > 0:
            progress.note("--label-weight has no effect: the data hold no labels")
        return store, None
    path = folder / "labels.npy"
    np.save(path, np.concatenate(labels))
    return store, path


def run_alone(job: Job, stage: str, steps: int | None, recipe: Recipe, progress: Progress) -> tuple[Outcome, int]:
    """Run one job in a process of its own, for its threads' sake (see `ndonnx.executor.worker`).

    Args:
        job: tells its steps.
        stage: what it is called.
        steps: of it; None where a time says when it ends.
        recipe: the executor.
        progress: told how far it is.

    Returns:
        What came of it, and the most memory that its process took, in bytes.
    """
    progress.stage(stage, steps, "steps")
    reached = 0

    def on_step(name: str, step: int, steps: int, nmse: float) -> None:
        nonlocal reached
        progress.advance(step - reached)
        reached = step
        progress.step(name, step, steps, nmse)

    executor = make_executor(recipe.executor, 1)
    (outcome,) = executor.run([job], on_step)
    return outcome, executor.peak_rss_bytes
