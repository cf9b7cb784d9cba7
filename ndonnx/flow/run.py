"""What all stages of a run share: made once, handed on, never changed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx_ir as ir

from ndonnx.config.recipe import Recipe
from ndonnx.data import DataSource
from ndonnx.data.split import Split
from ndonnx.distill.memory import MemoryPlan
from ndonnx.distill.padding import find_padding
from ndonnx.distill.schedule import Schedule
from ndonnx.graph.dataflow import float_outputs
from ndonnx.graph.interface import Interface
from ndonnx.graph.storage.external import external_tensors
from ndonnx.metrics.sensitivity import StudyFile
from ndonnx.partition import Partition
from ndonnx.report import SimplifiedReport
from ndonnx.runtime.clock import Clock
from ndonnx.runtime.fingerprints import fingerprint, fingerprint_file
from ndonnx.runtime.machine import usable_cores
from ndonnx.runtime.progress import Progress
from ndonnx.runtime.run_directory import RunDir
from ndonnx.select import Candidate
from ndonnx.teacher.batches import read_batch, whole_batches
from ndonnx.teacher.capture_plan import gigabytes


@dataclass(frozen=True)
class Teacher:
    """The user's model, opened."""

    path: Path
    original: ir.Model
    """The model as its file has it: what is written where no student is."""
    model: ir.Model
    """The model with the branches that are always taken in the place of their `If`, and simplified where that is asked
    for: where students go."""
    interface: Interface
    """How the model is fed."""
    simplified: SimplifiedReport | None = None
    """What became of the simplification of `model`; None where there was none."""
    change: str = ""
    """Fingerprint of what the simplification changed in `model`; empty where it changed nothing."""


def files_key(teacher: Teacher) -> str:
    """Fingerprint of a teacher's file and of the weights that it keeps beside it."""
    beside = sorted({str(tensor.path) for tensor in external_tensors(teacher.original)})
    return fingerprint(*map(fingerprint_file, [str(teacher.path), *beside]))


@dataclass(frozen=True)
class Run:
    """One run: what it works on, with what settings, and whom it tells."""

    directory: RunDir
    recipe: Recipe
    progress: Progress
    clock: Clock
    teacher: Teacher
    parts: Partition
    split: Split
    """The data, and which of its rows do what."""
    comparison_data: DataSource
    """Data of the final comparison: those given for it, else rows that nothing else reads."""
    samples: int
    """Maximum number of training samples of a neighbourhood."""
    schedule: Schedule
    study: StudyFile | None = None
    """The sensitivity study that the recipe names."""
    candidates: tuple[Candidate, ...] = ()
    """What a search tries in every neighbourhood, cheapest first; empty where nothing is searched."""

    @cached_property
    def float_outputs(self) -> list[str]:
        """Names of the outputs by which students can be measured."""
        return float_outputs(self.teacher.model)

    @cached_property
    def model_key(self) -> str:
        """Fingerprint of the teacher's file, of the weights that it keeps beside it, and of its simplification."""
        teacher = self.teacher
        return fingerprint(files_key(teacher), teacher.change) if teacher.change else files_key(teacher)

    @cached_property
    def padding(self) -> str | None:
        """The input by which the model passes over positions behind a sample's own length; None without one."""
        batch = next(whole_batches(self.split.source, read_batch(self.split.source)))
        return find_padding(self.parts.model, batch)

    @cached_property
    def memory(self) -> MemoryPlan:
        """Number of jobs at a time, and the bytes of each; a budget that cannot be kept is told once."""
        plan = MemoryPlan.of(self.recipe, self.parts, usable_cores())
        if plan.least > plan.budget:
            self.progress.note(
                f"the memory budget of {gigabytes(plan.budget)} is less than the {gigabytes(plan.least)}, about, that "
                "this model takes with one job at a time, and will be exceeded; raise --memory-budget"
            )
        return plan
