"""What training a whole model needs: the teacher's answers with the labels beside them, and a process of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ndonnx.config.recipe import Recipe
from ndonnx.data import DataSource
from ndonnx.data.augmentation import image_axes, with_augmented
from ndonnx.data.split import Split
from ndonnx.graph.dataflow import real_inputs
from ndonnx.partition import Partition
from ndonnx.runtime.executor import Job, Outcome, make_executor
from ndonnx.runtime.machine import pick_device
from ndonnx.runtime.progress import Progress
from ndonnx.teacher import ActivationStore, CaptureSettings, capture, make_session
from ndonnx.teacher.batches import read_batch, sample_bytes, whole_batches


def outputs_a_second(model: Path | ir.Model, source: DataSource) -> float:
    """Samples that are read and answered by a model in a second, roughly: by a few batches, the first not counted."""
    session = make_session(model)
    began, samples, size = time.perf_counter(), 0, min(_TIMED_BATCH, read_batch(source))
    for number, batch in enumerate(whole_batches(source, size, samples=_TIMED * size)):
        session.run(None, dict(batch))
        if number == 0:
            began = time.perf_counter()
        else:
            samples += len(next(iter(batch.values())))
    return samples / (time.perf_counter() - began) if samples else math.inf


_TIMED = 16
"""Batches."""
_TIMED_BATCH = 16
"""Samples of one."""


@dataclass(frozen=True)
class TeacherOutputs:
    """What the teacher says to samples and to changed copies of them."""

    store: ActivationStore
    """Activation store with the teacher's inputs and outputs."""
    labels: Path | None
    """An `.npy` of class numbers, one per sample; None where the data hold none."""
    holdout: float
    """Part of the store, at its beginning, that chooses the best state: it shares no sample with the rest."""


def storable(model: ir.Model, source: DataSource, budget: int) -> int:
    """How many samples of a model's inputs and outputs a number of bytes holds."""
    graph = model.graph
    names = [value.name or "" for value in (*real_inputs(graph), *graph.outputs)]
    return budget // max(1, sample_bytes(model, names, source, np.float32))


@dataclass(frozen=True)
class Wanted:
    """What of the teacher's outputs is captured."""

    outputs: tuple[str, ...]
    """Names of those that are stored beside the inputs."""
    samples: int
    """How many samples, those that choose the best state among them."""
    per_sample: int = 1
    """How often each image comes, once as it is and then changed; see `ndonnx.data.augmentation`."""


def capture_outputs(
    parts: Partition,
    split: Split,
    wanted: Wanted,
    folder: Path,
    recipe: Recipe,
    progress: Progress,
) -> TeacherOutputs:
    """Run the teacher on the data.

    Args:
        parts: the teacher.
        split: the data.
        wanted: which outputs, of how many samples.
        folder: exists; the store goes to `answers` in it.
        recipe: the seed of the copies, the device and the kinds of change; a `label_weight` without labels is told of.
        progress: told how far it is.
    """
    copies = _Copies.of(split, wanted.samples, recipe, wanted.per_sample)
    source = split.to_train(copies.samples, copies.held)
    # Two images in one have no class number.
    kinds = [kind for kind in recipe.augment if kind != "mixup" or recipe.label_weight == 0]
    labels: list[npt.NDArray[np.int64]] = []

    def batches() -> Iterator[Mapping[str, npt.NDArray[Any]]]:
        labels.clear()
        drawn = whole_batches(source, copies.batch, on_labels=labels.append)
        yield from with_augmented(
            drawn, kinds, copies.axes, per_sample=copies.per_sample, after=copies.held, seed=recipe.seed
        )

    progress.stage("answers", copies.total, "samples")
    store = capture(
        parts.model,
        [*(value.name or "" for value in real_inputs(parts.model.graph)), *wanted.outputs],
        batches,
        folder / "answers",
        samples=copies.total,
        # What a teacher rules out, it gives probabilities that float16 takes for 0: a tail that it does not have.
        settings=CaptureSettings(device=pick_device(recipe.device), half=False),
        on_batch=progress.advance,
    )
    if not labels:
        if recipe.label_weight > 0:
            progress.note("--label-weight has no effect: the data hold no labels")
        return TeacherOutputs(store, None, copies.holdout)
    path = folder / "labels.npy"
    np.save(path, np.concatenate(list(copies.repeated(labels))))
    return TeacherOutputs(store, path, copies.holdout)


@dataclass(frozen=True)
class _Copies:
    """How many samples come, and how often; copies come batch by batch."""

    axes: Mapping[str, tuple[int, int]]
    batch: int
    samples: int
    held: int
    """Samples at the beginning without copies."""
    per_sample: int
    holdout: float

    @classmethod
    def of(cls, split: Split, samples: int, recipe: Recipe, per_sample: int) -> _Copies:
        samples = min(samples, split.available)
        wanted, size = split.held(samples), read_batch(split.source)
        once = cls({}, size, samples, wanted, 1, wanted / samples)
        axes = image_axes(split.source.inputs, split.source.recipe)
        if per_sample == 1 or not recipe.augment or not axes:
            return once
        fixed = split.source.fixed_batch
        batch = fixed or min(size, wanted)
        held = max(1, wanted // batch) * batch  # whole batches, since copies come batch by batch
        samples = split.to_train(samples, held).length
        samples -= samples % fixed if fixed else 0  # a batch that is filled up has no copies
        if held >= samples:
            return once
        return cls(axes, batch, samples, held, per_sample, held / (held + (samples - held) * per_sample))

    @property
    def total(self) -> int:
        return self.held + (self.samples - self.held) * self.per_sample

    def repeated(self, labels: Iterable[npt.NDArray[np.int64]]) -> Iterator[npt.NDArray[np.int64]]:
        """Labels of batches as those of their copies."""
        seen = 0
        for batch in labels:
            yield from [batch] * (self.per_sample if seen >= self.held else 1)
            seen += len(batch)


def run_alone(job: Job, stage: str, steps: int | None, recipe: Recipe, progress: Progress) -> tuple[Outcome, int]:
    """Run one job in a process of its own, for its threads' sake (see `ndonnx.runtime.executor.worker`).

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

    executor = make_executor(recipe.executor, 1, recipe)
    (outcome,) = executor.run([job], on_step)
    return outcome, executor.peak_rss_bytes
