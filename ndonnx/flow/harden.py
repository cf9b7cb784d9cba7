"""The teacher trained as a whole to bear noise inside it: its own answers, then the training in a worker."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from ndonnx.config.recipe import Recipe
from ndonnx.distill.hardening import HardenJob
from ndonnx.distill.memory import MemoryPlan
from ndonnx.distill.schedule import Schedule
from ndonnx.distill.trainer import Training
from ndonnx.distill.whole import MODEL_FILE, WholeSettings, tasks_from
from ndonnx.errors import SliceError
from ndonnx.flow.prepare import Opened
from ndonnx.graph import load
from ndonnx.partition import Partition
from ndonnx.runtime.faults import Fault
from ndonnx.runtime.machine import usable_cores
from ndonnx.runtime.progress import Progress
from ndonnx.runtime.run_directory import Entry
from ndonnx.teacher.noise_inputs import Noise
from ndonnx.teacher.outputs import Wanted, capture_outputs, run_alone, storable


@dataclass(frozen=True)
class Hardening:
    """One hardening: the teacher's answers, then the training in a process of its own."""

    given: Opened
    parts: Partition
    recipe: Recipe
    progress: Progress
    folder: Path

    def train(self, noises: tuple[Noise, ...], steps: int) -> tuple[ir.Model, Training] | Fault:
        """The hardened model and its training, or what nobody foresaw.

        Raises:
            SliceError: the model cannot be trained.
        """
        samples = max(
            2, min(self.given.samples, storable(self.parts.model, self.given.split.source, self.recipe.cache_budget))
        )
        recipe, (output,) = self.recipe, self.parts.model.graph.outputs
        wanted = Wanted((output.name or "",), samples)
        captured = capture_outputs(self.parts, self.given.split, wanted, self.folder, recipe, self.progress)
        labelled = captured.labels is not None
        tasks = tasks_from(captured.store, wanted.outputs, labelled=labelled, told=recipe.task)
        if not tasks:
            raise SliceError(f"'{output.name}' holds no answer of its own for each sample of a batch")
        entry = Entry(self.folder / "hardened")
        plan = replace(Schedule(recipe, finetunable=True).plan(steps, whole=True), tries=False)
        memory = MemoryPlan.of(recipe, self.parts, usable_cores()).whole_step()
        plan = replace(plan, memory=memory, threads=usable_cores())
        settings = WholeSettings.of(recipe, plan, captured.holdout, self.parts.interface, tasks)
        path = self.given.teacher.path
        job = HardenJob("model", path, captured.store.path, captured.labels, entry, settings, noises=noises)
        outcome, _ = run_alone(job, "harden", steps, recipe, self.progress)
        if (fault := outcome.fault) is not None:
            if fault.foreseen or not fault.traceback:
                raise SliceError(fault.reason)
            return fault
        hardened = load(entry.path / MODEL_FILE)
        ir.external_data.load_to_model(hardened)  # its files go with the folder
        return hardened, Training.read(entry.meta())
