"""Trained students into one: refitted down the chain, spliced, fine-tuned, verified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from ndonnx.assemble.splice import is_changed, splice
from ndonnx.assemble.verify import check_no_larger, verify
from ndonnx.distill.job import load_student, read_result
from ndonnx.errors import VerificationError
from ndonnx.flow.finish import Finish
from ndonnx.flow.pieces_in_bits import PiecesInBits
from ndonnx.flow.quantise import Quantisation
from ndonnx.flow.run import Run
from ndonnx.flow.stages import Stage, Stages
from ndonnx.graph.shapes.declared import copy_of, state_as_in_file
from ndonnx.partition import Neighbourhood
from ndonnx.report import FinetuneReport, QuantisationReport, StageReport
from ndonnx.runtime.faults import Fault, fault_of
from ndonnx.runtime.run_directory import Entry
from ndonnx.teacher.batches import probe


@dataclass(frozen=True)
class Assembled:
    """A finished student."""

    model: ir.Model
    tuned: FinetuneReport | None
    """What its fine-tuning came to; None where there was none."""
    refused: dict[str, Fault]
    """Neighbourhoods whose students failed at their place in the whole and were left out, with the reason."""
    stages: tuple[StageReport, ...] = ()
    """What the whole came to after each stage."""
    quantised: QuantisationReport | None = None
    """How it was quantised; None where that was not asked for."""


@dataclass(frozen=True)
class Assembly:
    """Puts students together, the same way whoever chose them."""

    run: Run
    finishing: Finish

    def spliced(self, entries: Mapping[str, Entry]) -> ir.Model:
        """The students as they were trained, in the teacher's place."""
        students = self._students(entries)
        return self._in_place(students)

    def assemble(
        self, entries: Mapping[str, Entry], data: tuple[str, ...], bits: PiecesInBits | None = None
    ) -> Assembled:
        """The finished student; students that fail their check inside it are left out.

        Args:
            entries: trained students by the name of the neighbourhood.
            data: what they and the finishing depend on.
            bits: pieces that were chosen to be in 8 bits. None: what the recipe asks for.

        Raises:
            VerificationError: the whole is not what was trained, and no student alone is to blame.
        """
        refused: dict[str, Fault] = {}
        try:
            while True:
                try:
                    found = self._assembled({n: e for n, e in entries.items() if n not in refused}, data, bits)
                except VerificationError as error:
                    if error.neighbourhood is None:
                        raise
                    uses = self.run.parts.uses(self._by_name(error.neighbourhood))
                    fault = replace(fault_of(error.__cause__ or error), reason=str(error))
                    refused |= dict.fromkeys((n.name for n in uses), fault)
                    self.run.progress.note(f"{error}; it stays as the teacher has it")
                else:
                    return replace(found, refused=refused)
        finally:
            self.finishing.forget_answers()

    def _by_name(self, name: str) -> Neighbourhood:
        return next(n for n in self.run.parts.neighbourhoods if n.name == name)

    def _assembled(self, entries: Mapping[str, Entry], data: tuple[str, ...], bits: PiecesInBits | None) -> Assembled:
        # In the teacher's order, not in that of completion: the same students are the same bytes.
        entries = {n.name: entries[n.name] for n in self.run.parts.neighbourhoods if n.name in entries}
        key: tuple[str, ...] = (*data, *(entry.path.name for entry in entries.values()))
        with self.run.clock.measure("splice"):
            students = self._students(entries)
        if not students:
            return self.unchanged(bits)
        stages, inputs = Stages(self.run), self.run.recipe.inputs
        student = self._spliced(students)
        self._check_size(student, students, entries)
        stages.add(self._verified(Stage("spliced", student, students)))
        if inputs == "refit" or (inputs is None and self.run.schedule.reconstructs(len(students))):
            refitted = self._refitted(students, key)
            with self.run.clock.measure("splice"):
                student = self._in_place(refitted)
            stages.add(self._verified(Stage("reconstructed", student, refitted)))
        tuned = self._finetuned(stages, students, (*key, str(inputs)))
        return self._quantised(stages, tuned, bits)

    def unchanged(self, bits: PiecesInBits | None = None) -> Assembled:
        """The teacher itself, quantised where that is asked for, or in these pieces."""
        stages = Stages(self.run)
        if not (self.run.recipe.quantises if bits is None else bits.names):
            return Assembled(state_as_in_file(self._spliced({}), self.run.teacher.model), None, {})
        teacher = copy_of(self.run.teacher.model)
        stages.add(Stage("teacher", teacher, {}))
        try:
            return self._quantised(stages, None, bits)
        finally:
            self.finishing.forget_answers()

    def _quantised(self, stages: Stages, tuned: FinetuneReport | None, bits: PiecesInBits | None) -> Assembled:
        """The best stage, as the file has it; behind it, where that is asked for, the same quantised."""
        best = stages.best
        assert best is not None
        state_as_in_file(best.model, self.run.teacher.model)
        if bits is not None:
            quantised = bits.quantise(stages)
        else:
            last = Quantisation(self.run, stages, self.finishing)
            quantised = last.quantise(best) if self.run.recipe.quantises else None
        assert stages.best is not None
        return Assembled(stages.best.model, tuned, {}, stages.reports(), quantised)

    def _finetuned(
        self, stages: Stages, replaced: Mapping[str, ir.Model], key: tuple[str, ...]
    ) -> FinetuneReport | None:
        """Train the best stage so far as a whole, where that is asked for, as one stage more."""
        best = stages.best
        if best is None or not self.run.schedule.finetunes:
            return None
        with self.run.clock.measure("finetune"):
            student, tuned = self.finishing.finetune(best.model, replaced, (*key, best.name))
        if tuned.reason is None:
            # It is compared as a whole; its slices are no longer those that were trained.
            recipe = self.run.recipe
            asked = recipe.label_weight > 0 or any(":" in task for task in recipe.task)
            better = asked and tuned.loss is not None and tuned.loss_start is not None and tuned.loss < tuned.loss_start
            stages.add(self._verified(Stage("fine-tuned", student, {})), better=better)
        return tuned

    def _verified(self, stage: Stage) -> Stage:
        """The stage, after its checks.

        Raises:
            VerificationError: it is not what was trained.
        """
        with self.run.clock.measure("splice"):
            verify(
                self.run.teacher.model,
                stage.model,
                self.run.parts,
                stage.students,
                probe(self.run.split.source),
                self.run.recipe.parity,
            )
        return stage

    def _refitted(self, students: dict[str, ir.Model], key: tuple[str, ...]) -> dict[str, ir.Model]:
        with self.run.clock.measure("refit"):
            return self.finishing.refit(students, key)

    def _spliced(self, students: Mapping[str, ir.Model]) -> ir.Model:
        with self.run.clock.measure("splice"):
            self.run.progress.stage("splice")
            return self._in_place(students)

    def _in_place(self, students: Mapping[str, ir.Model]) -> ir.Model:
        if not students:
            return copy_of(self.run.teacher.original)
        turned = {name: self.run.parts.as_in_teacher(student) for name, student in students.items()}
        return splice(self.run.teacher.model, turned, self.run.parts.shared)

    def _students(self, entries: Mapping[str, Entry]) -> dict[str, ir.Model]:
        """The students that differ from the teacher, at each of their places."""
        found: dict[str, ir.Model] = {}
        for n in self.run.parts.trained:
            student = load_student(entries[n.name]) if n.name in entries else None
            if student is not None and is_changed(student, self.run.parts.slice_of(n)):
                found |= {use.name: self.run.parts.at(use, student) for use in self.run.parts.uses(n)}
        return {n.name: found[n.name] for n in self.run.parts.neighbourhoods if n.name in found}

    def _check_size(self, student: ir.Model, students: Mapping[str, ir.Model], entries: Mapping[str, Entry]) -> None:
        """Refuse students that make the whole larger, but for those of methods that promise nothing of the kind."""
        larger = {name for name, entry in entries.items() if read_result(entry).may_grow}
        promising = {n: model for n, model in students.items() if self.run.parts.shared.get(n, n) not in larger}
        if promising:
            whole = student if len(promising) == len(students) else self._in_place(promising)
            turned = {name: self.run.parts.as_in_teacher(model) for name, model in promising.items()}
            check_no_larger(self.run.teacher.model, whole, turned, self.run.parts.shared)
