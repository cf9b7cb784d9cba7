"""Trained students into one: refitted down the chain, spliced, fine-tuned, verified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from ndonnx.data import DataSource
from ndonnx.distil import load_student, read_result
from ndonnx.errors import VerificationError
from ndonnx.faults import Fault, fault_of
from ndonnx.graph import Cost
from ndonnx.graph.bound import bind
from ndonnx.graph.declared import copy_of, state_as_in_file
from ndonnx.graph.load import infer_shapes
from ndonnx.graph.macs import sample_cost
from ndonnx.graph.working_copy import working_copy
from ndonnx.partition import Neighbourhood, Partition
from ndonnx.pipeline.batches import probe
from ndonnx.pipeline.clock import Clock
from ndonnx.pipeline.finishing import Finishing
from ndonnx.pipeline.schedule import Schedule
from ndonnx.progress import Progress
from ndonnx.recipe import Recipe
from ndonnx.report import FinetuneReport
from ndonnx.rundir import Entry
from ndonnx.splice import is_changed, splice
from ndonnx.verify import check_no_larger, verify


@dataclass(frozen=True)
class Composed:
    """A finished student."""

    model: ir.Model
    tuned: FinetuneReport | None
    """What its fine-tuning came to; None where there was none."""
    refused: dict[str, Fault]
    """Neighbourhoods whose students failed at their place in the whole and were left out, with the reason."""


@dataclass(frozen=True)
class Composition:
    """Puts students together, the same way whoever chose them."""

    original: ir.Model
    """The teacher as its file has it: what is written where no student is."""
    teacher: ir.Model
    """Where students go, see `ndonnx.pipeline.opening.Given`."""
    parts: Partition
    source: DataSource
    recipe: Recipe
    schedule: Schedule
    finishing: Finishing
    progress: Progress
    clock: Clock

    def spliced(self, entries: Mapping[str, Entry]) -> ir.Model:
        """The students as they were trained, in the teacher's place."""
        students = self._students(entries)
        return self._in_place(students)

    def compose(self, entries: Mapping[str, Entry], data: tuple[str, ...]) -> Composed:
        """The finished student; students that fail their check inside it are left out.

        Args:
            entries: trained students by the name of the neighbourhood.
            data: what they and the finishing depend on.

        Raises:
            VerificationError: the whole is not what was trained, and no student alone is to blame.
        """
        refused: dict[str, Fault] = {}
        while True:
            try:
                student, tuned = self._composed({n: e for n, e in entries.items() if n not in refused}, data)
            except VerificationError as error:
                if error.neighbourhood is None:
                    raise
                uses = self.parts.uses(self._by_name(error.neighbourhood))
                fault = replace(fault_of(error.__cause__ or error), reason=str(error))
                refused |= dict.fromkeys((n.name for n in uses), fault)
                self.progress.note(f"{error}; it stays as the teacher has it")
            else:
                return Composed(student, tuned, refused)

    def _by_name(self, name: str) -> Neighbourhood:
        return next(n for n in self.parts.neighbourhoods if n.name == name)

    def _composed(self, entries: Mapping[str, Entry], data: tuple[str, ...]) -> tuple[ir.Model, FinetuneReport | None]:
        # In the teacher's order, not in that of completion: the same students are the same bytes.
        entries = {n.name: entries[n.name] for n in self.parts.neighbourhoods if n.name in entries}
        key: tuple[str, ...] = (*data, *(entry.path.name for entry in entries.values()))
        with self.clock.measure("splice"):
            students = self._students(entries)
        inputs = self.recipe.inputs
        if inputs == "refit" or (inputs is None and not self.schedule.finetunes):
            students = self._refitted(students, key)
        student, tuned = self._spliced(students), None
        self._check_size(student, students, entries)
        if self.schedule.finetunes and students:
            with self.clock.measure("finetune"):
                student, tuned = self.finishing.finetune(student, students, (*key, str(inputs)))
            if tuned.reason is not None and inputs is None:
                students = self._refitted(students, key)
                student = self._spliced(students)
        with self.clock.measure("splice"):
            # Fine-tuning compares the student as a whole; its slices are no longer those that were trained.
            unchanged = students if tuned is None or tuned.reason is not None else {}
            verify(self.teacher, student, self.parts, unchanged, probe(self.source), self.recipe.parity)
            state_as_in_file(student, self.teacher)
        return student, tuned

    def _refitted(self, students: dict[str, ir.Model], key: tuple[str, ...]) -> dict[str, ir.Model]:
        if not students:
            return students
        with self.clock.measure("refit"):
            return self.finishing.refit(students, key)

    def _spliced(self, students: Mapping[str, ir.Model]) -> ir.Model:
        with self.clock.measure("splice"):
            self.progress.stage("splice")
            return self._in_place(students)

    def _in_place(self, students: Mapping[str, ir.Model]) -> ir.Model:
        if not students:
            return copy_of(self.original)
        turned = {name: self.parts.as_in_teacher(student) for name, student in students.items()}
        return splice(self.teacher, turned, self.parts.shared)

    def _students(self, entries: Mapping[str, Entry]) -> dict[str, ir.Model]:
        """The students that differ from the teacher, at each of their places."""
        found: dict[str, ir.Model] = {}
        for n in self.parts.trained:
            student = load_student(entries[n.name]) if n.name in entries else None
            if student is not None and is_changed(student, self.parts.slice_of(n)):
                found |= {use.name: self.parts.at(use, student) for use in self.parts.uses(n)}
        return {n.name: found[n.name] for n in self.parts.neighbourhoods if n.name in found}

    def _check_size(self, student: ir.Model, students: Mapping[str, ir.Model], entries: Mapping[str, Entry]) -> None:
        """Refuse students that make the whole larger, but for those of methods that promise nothing of the kind."""
        larger = {name for name, entry in entries.items() if read_result(entry).may_grow}
        promising = {n: model for n, model in students.items() if self.parts.shared.get(n, n) not in larger}
        if promising:
            whole = student if len(promising) == len(students) else self._in_place(promising)
            turned = {name: self.parts.as_in_teacher(model) for name, model in promising.items()}
            check_no_larger(self.teacher, whole, turned, self.parts.shared)


def costs_of(model: ir.Model, parts: Partition) -> Cost:
    """Cost of the teacher or a whole student, MACs for one sample as the partition tells them of the teacher."""
    working = working_copy(infer_shapes(model.clone()), parts.interface)
    return sample_cost(working.graph, bind(working, parts.stated))
