"""After the neighbourhoods: sequential reconstruction and fine-tuning, each kept in the run directory when done."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ndonnx.assemble.propagation import reconstruct_in_order
from ndonnx.convert import Grid
from ndonnx.data.augmentation import image_axes
from ndonnx.distill.finetune import FinetuneJob, why_not_finetuned
from ndonnx.distill.plan import Plan
from ndonnx.distill.trainer import Training
from ndonnx.distill.whole import MODEL_FILE, WholeSettings, tasks_from
from ndonnx.flow.run import Run
from ndonnx.graph import load, save
from ndonnx.graph.costs import weights_of
from ndonnx.graph.dataflow import float_outputs, reads
from ndonnx.graph.interface import NOWHERE, sample_axis
from ndonnx.report import FinetuneReport
from ndonnx.runtime.faults import Fault, tried
from ndonnx.runtime.fingerprints import fingerprint
from ndonnx.runtime.machine import usable_cores
from ndonnx.runtime.run_directory import Entry
from ndonnx.teacher.batches import read_batch, value_bytes, whole_batches
from ndonnx.teacher.outputs import TeacherOutputs, Wanted, capture_outputs, run_alone, storable

_REFIT_SAMPLES = 2048
"""Most samples of sequential reconstruction."""
_LEAST_REFIT = 2
"""One to fit on, and one to tell whether that helped."""


@dataclass(frozen=True)
class _Training:
    """How a whole student is trained."""

    plan: Callable[[], Plan]
    """By what is left of a time budget when it is asked for."""
    kept: frozenset[str] = frozenset()
    """Names of weights that stay as they are."""
    grid: Grid | None = None
    is_last: bool = True
    """Whether no training after it reads the same answers."""
    name: str = "fine-tuned"
    """What the student is not where it fails."""


@dataclass
class Finish:
    """What is done to the students together."""

    run: Run
    workers_rss: int = 0
    _answers: tuple[Wanted, TeacherOutputs] | None = None

    def refit(self, students: Mapping[str, ir.Model], key: tuple[str, ...]) -> dict[str, ir.Model]:
        """Walk down the chain and refit each student's last linear operator; see `reconstruct_in_order`.

        Args:
            students: by the name of the neighbourhood.
            key: what they depend on.
        """
        if not students:
            return {}
        samples = self._refit_samples()
        source = self.run.split.to_fit(samples)
        if source.length < _LEAST_REFIT:
            self.run.progress.note(
                f"the students are not refitted on their own inputs: {source.length} sample to fit on"
            )
            return dict(students)
        entry = self.run.directory.entry("refitted", fingerprint(*key, sorted(students), source.fingerprint()))
        if not entry.done:
            self.run.progress.stage("refit", len(students), "neighbourhoods")
            folder = entry.begin()
            scratch = self.run.directory.path / "propagated"
            try:
                refitted = reconstruct_in_order(
                    self.run.parts,
                    students,
                    lambda: whole_batches(source, read_batch(source)),
                    scratch,
                    source.length,
                    threads=usable_cores(),
                    on_end=self._told,
                )
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            for name, student in refitted.items():
                save(student, folder / f"{name}.onnx")
            entry.commit({"students": sorted(refitted)})
        return {name: load(entry.path / f"{name}.onnx") for name in students}

    def _told(self, name: str, ended: bool | Fault) -> None:
        if isinstance(ended, Fault):
            self._not_refitted(name, ended)
        else:
            self.run.progress.advance()

    def _not_refitted(self, name: str, fault: Fault) -> None:
        self.run.directory.record(f"{name} refit", fault)
        self.run.progress.note(f"{name} is not refitted on its own inputs: {fault.reason}")

    def _refit_samples(self) -> int:
        """As many as the cache budget holds of the largest neighbourhood, on both sides, in full precision."""
        ends = [
            [value.name or "" for value in (n.entry, *n.context, n.exit) if value is not None]
            for n in self.run.parts.distillable
        ]
        wanted = (name for names in ends for name in names)
        sizes = value_bytes(self.run.parts.model, wanted, self.run.split.source, np.float32)
        most = max((sum(sizes.get(name, 0) for name in names) for names in ends), default=0)
        samples = min(_REFIT_SAMPLES, self.run.samples, self.run.recipe.cache_budget // (2 * max(1, most)))
        return max(2, self.run.schedule.refit_samples(samples))

    def finetune(
        self, student: ir.Model, replaced: Collection[str], key: tuple[str, ...]
    ) -> tuple[ir.Model, FinetuneReport]:
        """Train the whole student against the teacher's answers; it comes back as it was where that cannot be.

        Args:
            student: the spliced student.
            replaced: names of the neighbourhoods whose weights are trained; all others stay the teacher's.
            key: what it depends on.
        """
        how = _Training(self.run.schedule.finetune, self._kept(replaced), is_last=not self.run.recipe.quantises)
        return self._finetuned(student, how, key)

    def finetune_in_bits(self, student: ir.Model, grid: Grid, key: tuple[str, ...]) -> tuple[ir.Model, FinetuneReport]:
        """Train all weights of a student that rounds its values, in floats that are rounded in every step.

        Args:
            student: of `ndonnx.assemble.quantise.rounded`.
            grid: what its weights are rounded to.
            key: what it depends on.
        """
        return self._finetuned(
            student, _Training(self.run.schedule.finetune_in_bits, grid=grid, name="trained in 8 bits"), key
        )

    def _finetuned(self, student: ir.Model, how: _Training, key: tuple[str, ...]) -> tuple[ir.Model, FinetuneReport]:
        if (reason := why_not_finetuned(student)) is not None:
            return self._not_finetuned(student, Fault(reason), how.name)
        plan = replace(how.plan(), memory=self.run.memory.whole_step())
        samples, per_sample = self._finetune_samples()
        rows = self.run.split.to_train(samples).fingerprint()
        settings: list[object] = [
            self.run.recipe.temperature,
            self.run.recipe.label_weight,
            self.run.recipe.holdout,
            rows,
            *self.run.recipe.task,
        ]
        if per_sample > 1:
            settings += [per_sample, *self.run.recipe.augment]
        # Of a time budget, not what is left of it: a run that goes on finds what it has done.
        length = (str(self.run.recipe.time_budget), str(self.run.schedule.finetune_steps))
        same = replace(plan, steps=0, seconds=None).key()
        entry = self.run.directory.entry("finetuned", fingerprint(*key, same, *length, *map(str, settings)))
        if not entry.done:
            fault = tried(lambda: self._train(student, how, entry, samples, per_sample))
            if fault is not None:
                return self._not_finetuned(student, fault, how.name)
        found = Training.read(entry.meta())
        return load(entry.path / MODEL_FILE), FinetuneReport(
            steps=found.steps,
            seconds=round(found.seconds, 3),
            loss_start=found.loss_start,
            loss=found.loss,
            nmse_start=found.nmse_start,
            nmse=found.nmse,
            curve=found.curve,
            lr=found.lr,
            format=found.format,
        )

    def _not_finetuned(self, student: ir.Model, fault: Fault, name: str) -> tuple[ir.Model, FinetuneReport]:
        self.run.progress.note(f"the student is not {name}: {fault.reason}")
        path = self.run.directory.record("fine-tuning" if name == _Training.name else name, fault)
        told = None if path is None else str(path)
        return student, FinetuneReport(steps=0, seconds=0.0, reason=fault.reason, traceback=told)

    def _train(self, student: ir.Model, how: _Training, entry: Entry, samples: int, per_sample: int) -> Fault | None:
        """Why there is no fine-tuned student; None when there is one."""
        try:
            wanted = Wanted(self._outputs(student), samples, per_sample)
            captured = self._answered(wanted)
            told = self.run.recipe.task
            tasks = tasks_from(captured.store, wanted.outputs, labelled=captured.labels is not None, told=told)
            if not tasks:
                names = " and ".join(f"'{name}'" for name in float_outputs(student))
                return Fault(f"{names} holds no answer of its own for each sample of a batch")
            model = self._scratch / MODEL_FILE
            save(student, model)
            # Now, when the answers' time is spent.
            plan = replace(how.plan(), memory=self.run.memory.whole_step(), threads=usable_cores())
            settings = WholeSettings.of(self.run.recipe, plan, captured.holdout, self.run.parts.interface, tasks)
            settings = replace(settings, padding=self.run.padding)
            read = model, captured.store.path, captured.labels
            job = FinetuneJob("student", *read, entry, settings, kept=how.kept, grid=how.grid)
            steps = plan.steps if plan.seconds is None else None
            outcome, rss = run_alone(job, "finetune", steps, self.run.recipe, self.run.progress)
            self.workers_rss = max(self.workers_rss, rss)
            return outcome.fault
        finally:
            if how.is_last:
                self.forget_answers()

    def _answered(self, wanted: Wanted) -> TeacherOutputs:
        """The teacher's answers, those of the training before where it wanted the same."""
        if self._answers is None or self._answers[0] != wanted:
            self.forget_answers()
            self._scratch.mkdir()
            run = self.run
            found = capture_outputs(run.parts, run.split, wanted, self._scratch, run.recipe, run.progress)
            self._answers = wanted, found
        return self._answers[1]

    def forget_answers(self) -> None:
        """Delete what trainings of the whole have read."""
        self._answers = None
        shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def _scratch(self) -> Path:
        return self.run.directory.path / "finetune"

    def _outputs(self, student: ir.Model) -> tuple[str, ...]:
        """Outputs that can be trained: floats that are computed, with samples that can be told apart."""
        trainable = float_outputs(student)
        ends = self.run.parts.model.graph.outputs
        return tuple(v.name or "" for v in ends if v.name in trainable and sample_axis(v) != NOWHERE)

    def _kept(self, replaced: Collection[str]) -> frozenset[str]:
        outside = (n for n in self.run.parts.neighbourhoods if n.name not in replaced)
        read = (v for n in outside for node in n.nodes for v in (*reads(node), *weights_of(node)) if v.is_initializer())
        return frozenset(value.name or "" for value in read)

    def _finetune_samples(self) -> tuple[int, int]:
        """How many, and how often each comes."""
        source = self.run.split.source
        available = min(self.run.split.available, self.run.schedule.finetune_samples())
        held = max(2, storable(self.run.parts.model, source, self.run.recipe.cache_budget))
        samples = max(2, min(available, held))
        images = image_axes(source.inputs, source.recipe)
        per_sample = self.run.schedule.per_sample(samples) if self.run.recipe.augment and images else 1
        return samples, max(1, min(per_sample, held // samples))
