"""The last stage that changes a student: 8 bits, in the way and in the places that cost least of its quality.

Several ways to quantise the whole are measured; the best of them gives those pieces back to float that gain most
quality for the time that they cost. Every move is measured on the whole student: its outputs on the rows that choose,
and its latency beside the float student's. What was decided stays in the run directory: a continued run takes no
second measurement.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

import onnx_ir as ir

from ndonnx.assemble.quantise import Scheme, can_be_quantised, quantisable
from ndonnx.assemble.quantise_biases import Shifts
from ndonnx.assemble.quantise_pieces import executed, grouped, pieces_of
from ndonnx.assemble.quantise_ranges import RULES
from ndonnx.assemble.verify_quantised import verify_quantised
from ndonnx.distill.whole import MODEL_FILE
from ndonnx.errors import ModelError, first_line
from ndonnx.flow.finish import Finish
from ndonnx.flow.quantise_trials import FEW_SAMPLES, REFUSED, Trials, calibration
from ndonnx.flow.run import Run
from ndonnx.flow.stages import Stage, Stages
from ndonnx.graph import load, save
from ndonnx.graph.save import serialise
from ndonnx.graph.shapes.declared import state_as_in_file
from ndonnx.report import QuantisationReport, QuantisationTrial
from ndonnx.runtime.fingerprints import fingerprint
from ndonnx.runtime.machine import usable_cores
from ndonnx.runtime.run_directory import Entry
from ndonnx.select.precision import Measured, Merit, give_back
from ndonnx.teacher.batches import probe

STAGE = "quantised"
_LOST = 0.02
"""Part of the float student's loss that 8 bits have to add before steps are spent on it."""
_MOST_PIECES = 16
"""Pieces that are measured one by one; of more, neighbours are taken together."""


def check_quantisable(run: Run) -> None:
    """Refuse to quantise a model that has nothing to quantise, before anything is trained.

    Raises:
        ModelError: it has nothing.
    """
    if not can_be_quantised(run.teacher.model):
        raise ModelError(
            f"{run.teacher.path}: nothing to quantise, as no Conv, Gemm, MatMul or Gather in it holds float weights; "
            "leave --bits out, and int8 out of the candidates"
        )


def best_way(trials: Trials) -> tuple[Scheme, Measured]:
    """The way to quantise the whole student of these trials that is best, and what it comes to.

    Raises:
        SliceError, ModelError, OrtError: nothing of what was tried can be had.
    """
    found = _Choosing(trials).way()
    return found.scheme, found.measured


@dataclass(frozen=True)
class _Found:
    """A quantised student, and how it was chosen."""

    scheme: Scheme
    kept: tuple[str, ...]
    measured: Measured
    trials: tuple[QuantisationTrial, ...] = ()
    changes: tuple[str, ...] = ()
    """What has changed its weights and biases, in words."""
    shifts: Shifts = field(default_factory=dict)
    """What is added to its biases."""

    @property
    def told(self) -> str:
        """How it is quantised, in words."""
        return ", ".join((str(self.scheme), *self.changes))

    def changed(self, how: str, loss: float) -> _Found:
        """The same with other weights or biases, its loss, and a line about it among the trials."""
        changes = (*self.changes, how)
        line = QuantisationTrial(
            ", ".join((str(self.scheme), *changes)), _finite(loss), self.measured.time, self.measured.size
        )
        measured = replace(self.measured, loss=loss)
        return replace(self, measured=measured, trials=(*self.trials, line), changes=changes)


@dataclass(frozen=True)
class Quantisation:
    """Quantises the best student so far, as one stage more."""

    run: Run
    stages: Stages
    finishing: Finish

    def quantise(self, best: Stage) -> QuantisationReport:
        """Let the best stage so far, quantised, be the last one and what is written.

        Where it is neither smaller nor faster than the student in float, this one stays, and the report says so.
        """
        with self.run.clock.measure("quantise"):
            self.run.progress.stage("quantise")
            entry = self.run.directory.entry("quantised", self._key(best.model))
            if not entry.done:
                report = self._made(best.model, entry)
                entry.commit(asdict(report))
            report = QuantisationReport.read(entry.meta())
        for note in notes_on(report):
            self.run.progress.note(note)
        if report.reason is None:
            student = load(entry.path / MODEL_FILE)
            self.stages.add(Stage(STAGE, state_as_in_file(student, student), {}), asked=True)
        return report

    def _key(self, student: ir.Model) -> str:
        run, recipe = self.run, self.run.recipe
        rows = calibration(run).fingerprint(), run.split.to_choose().fingerprint(), str(self.stages.samples)
        told = (str(recipe.bits), str(recipe.metric), *self._training_key(), *recipe.task)
        return fingerprint(
            serialise(student), *rows, *told, str(recipe.time_budget), platform.node(), str(usable_cores())
        )

    def _training_key(self) -> tuple[str, ...]:
        """What a training in 8 bits depends on; nothing where there is none."""
        schedule, recipe = self.run.schedule, self.run.recipe
        if not schedule.finetunes:
            return ()
        plan = replace(schedule.finetune_in_bits(), steps=schedule.finetune_steps, seconds=None).key()
        samples = recipe.finetune_samples, recipe.holdout, recipe.cache_budget, recipe.memory_budget, *recipe.augment
        return (str(plan), str(recipe.temperature), str(recipe.label_weight), *map(str, samples))

    def _made(self, student: ir.Model, entry: Entry) -> QuantisationReport:
        """Choose, check and write; the entry holds the model where there is one."""
        folder = entry.begin()
        trials = Trials(
            self.run, student, self.stages.evaluate, self.stages.found(self.stages.best), self.run.schedule.chosen()
        )
        try:
            found = _Choosing(trials).best()
            found = _with_biases(trials, found)
            model = trials.model(found.scheme, found.kept, found.shifts)
            model, found = self._trained(trials, model, found)
        except REFUSED as error:
            return QuantisationReport(bits=self.run.recipe.bits, reason=first_line(error))
        report = self._report(trials, found, model)
        if report.reason is None:
            interface = self.run.parts.interface
            verify_quantised(self.run.teacher.model, student, model, interface, probe(self.run.split.source))
            save(model, folder / MODEL_FILE)
        return report

    def _trained(self, trials: Trials, model: ir.Model, found: _Found) -> tuple[ir.Model, _Found]:
        """The student trained as it rounds, and what it comes to; as it was where that is not asked for or no better.

        Ranges of values stay as they were measured; weights and biases learn to live with them.
        """
        if trials.float_found is None or not self._is_worth_training(trials, found):
            return model, found
        how = found.scheme, found.kept, found.shifts
        rounding, grid = trials.rounded(*how)
        key = fingerprint(serialise(rounding)), *self._training_key()
        trained, tuned = self.finishing.finetune_in_bits(rounding, grid, key)
        if tuned.reason is not None:
            return model, found
        new = trials.with_weights(*how, trained)
        other = found.changed(f"{tuned.steps:,} steps of training in 8 bits", trials.loss(new))
        if other.measured.loss < found.measured.loss:
            return new, other
        return model, replace(found, trials=other.trials)

    def _is_worth_training(self, trials: Trials, found: _Found) -> bool:
        """Whether 8 bits have lost something that can be learned, or a time budget is there to be used."""
        if found.scheme.mode == "dynamic" or not self.run.schedule.finetunes:
            return False
        lost = found.measured.loss - trials.float_loss
        return self.run.recipe.time_budget is not None or lost > _LOST * trials.float_loss

    def _report(self, trials: Trials, found: _Found, model: ir.Model) -> QuantisationReport:
        useless = found.measured.size >= 1 and found.measured.time >= 1
        told = quantisation_report(trials, model, found.told, found.measured)
        return replace(
            told,
            kept=list(found.kept),
            trials=list(found.trials),
            reason="in 8 bits it is neither smaller nor faster on this machine" if useless else None,
        )


def _with_biases(trials: Trials, found: _Found) -> _Found:
    """The same with its biases corrected, where that lowers its loss."""
    correction = trials.correction(found.scheme, found.kept, trials.model(found.scheme, found.kept))
    if correction is None:
        return found
    shifts, loss = correction
    return replace(found.changed("biases corrected", loss), shifts=shifts)


def notes_on(report: QuantisationReport) -> Iterator[str]:
    """What is to be said of a quantised student while the run goes on."""
    if report.reason is not None:
        yield f"the student stays in float: {report.reason}"
    if report.opset is not None:
        yield f"the student has opset {report.opset}, which weights in 8 bits need; the teacher's is older"
    if report.float_nodes and report.quantised_nodes == 0:
        yield "onnxruntime computes nothing of it with integers here: the student is smaller, not faster"


def quantisation_report(trials: Trials, model: ir.Model, how: str, measured: Measured) -> QuantisationReport:
    """What there is to tell of a quantised student of these trials.

    Args:
        trials: of the float student.
        model: the quantised one.
        how: it is quantised, in words.
        measured: what it comes to.
    """
    counted, opset = executed(model), model.opset_imports.get("")
    return QuantisationReport(
        bits=8,
        scheme=how,
        loss=_finite(measured.loss),
        float_loss=_finite(trials.float_loss),
        time=measured.time,
        size=measured.size,
        quantised_nodes=counted.quantised_nodes,
        float_nodes=counted.float_nodes,
        qdq_left=counted.qdq_left,
        opset=opset if opset != trials.student.opset_imports.get("") else None,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class _Choosing:
    """Chooses how a student is quantised, and where not."""

    def __init__(self, trials: Trials) -> None:
        self._trials = trials
        self._told: list[QuantisationTrial] = []
        self._error: Exception | None = None

    def best(self) -> _Found:
        """The way to quantise the whole that is best, with pieces given back to float.

        Raises:
            SliceError, ModelError, OrtError: nothing of what was tried can be had.
        """
        found = self._in_pieces(self.way())
        return replace(found, trials=tuple(self._told))

    def way(self) -> _Found:
        """The way to quantise the whole that is best."""
        return self._narrowed(self._whole())

    def _whole(self) -> _Found:
        """The best way for all of it: of each kind the ranges with the least loss, then by loss and cost."""
        rivals = [rival for kind in _kinds() if (rival := self._least_loss(kind)) is not None]
        if not rivals:
            assert self._error is not None
            raise self._error
        times = self._trials.times({str(number): model for number, (_, _, model) in enumerate(rivals)})
        found = [
            _Found(scheme, (), Measured(self._trials.loss(model), times[str(number)], self._trials.size(model)))
            for number, (scheme, _, model) in enumerate(rivals)
        ]
        merit = self._merit(min((each.measured for each in found), key=lambda each: each.cost))
        best = found[0]
        for other in found[1:]:
            if merit.is_better(other.measured, best.measured):
                best = other
        for each in found:
            self._tell(str(each.scheme), each.measured)
        return best

    def _merit(self, cheapest: Measured) -> Merit:
        return Merit.between(self._trials.float_loss, cheapest)

    def _least_loss(self, kind: list[Scheme]) -> tuple[Scheme, float, ir.Model] | None:
        """The best of several ways that take the same time; None where none can be had."""
        best: tuple[Scheme, float, ir.Model] | None = None
        for scheme in kind:
            if best is not None and self._trials.is_late:
                break
            try:
                if not quantisable(self._trials.base(scheme.mode), scheme):
                    continue
                model = self._trials.model(scheme)
                loss = self._trials.loss(model, FEW_SAMPLES)
            except REFUSED as error:
                self._error = error
                continue
            if best is None or loss < best[1]:
                best = scheme, loss, model
        return best

    def _narrowed(self, found: _Found) -> _Found:
        """The same with weights in 7 bits, where that is clearly nearer to the teacher.

        Processors without instructions for products of 8 bits add them up in 16, which is too narrow for 8.
        """
        if self._trials.float_found is None or self._trials.is_late:
            return found
        scheme = replace(found.scheme, narrow=True)
        narrow = replace(found.measured, loss=self._trials.loss(self._trials.model(scheme)))
        self._tell(str(scheme), narrow)
        better = self._merit(found.measured).is_better(narrow, found.measured)
        return replace(found, scheme=scheme, measured=narrow) if better else found

    def _in_pieces(self, found: _Found) -> _Found:
        """With those pieces in float that are worth it, tried in the order of what they lose alone."""
        trials, scheme = self._trials, found.scheme
        base = trials.base(scheme.mode)
        heavy, order = quantisable(base, scheme), [n.name for n in trials.run.parts.neighbourhoods]
        pieces = grouped(pieces_of(base, trials.run.parts), heavy, order, _MOST_PIECES)
        merit = self._merit(found.measured)
        if trials.float_found is None or len(pieces) < 2 or merit.beside == 0:
            return found
        every = {name for piece in pieces for name in piece}
        losses: dict[int, float] = {}
        for number, piece in enumerate(pieces):
            if trials.is_late:
                break
            losses[number] = trials.loss(trials.model(scheme, every.difference(piece)), FEW_SAMPLES)

        def kept(numbers: tuple[int, ...]) -> list[str]:
            return [name for number in numbers for name in pieces[number]]

        known: dict[tuple[int, ...], float] = {(): found.measured.loss}

        def measure(new: tuple[int, ...], old: tuple[int, ...]) -> tuple[Measured, Measured] | None:
            if trials.is_late or len(new) == len(pieces):
                return None
            models = {"new": trials.model(scheme, kept(new)), "old": trials.model(scheme, kept(old))}
            known[new], times = trials.loss(models["new"]), trials.times(models)
            one, other = (
                Measured(known[which], times[name], trials.size(models[name]))
                for which, name in ((new, "new"), (old, "old"))
            )
            self._tell(f"{scheme}, in float: {', '.join(_named(pieces[n]) for n in new)}", one)
            return one, other

        most = sorted(losses, key=lambda number: (-losses[number], number))
        back = give_back(most, found.measured, merit, measure)
        return replace(found, kept=tuple(kept(back.pieces)), measured=back.found)

    def _tell(self, what: str, measured: Measured) -> None:
        self._told.append(QuantisationTrial(what, _finite(measured.loss), measured.time, measured.size))


def _named(piece: list[str]) -> str:
    return piece[-1] if len(piece) == 1 else f"{piece[0]} and {len(piece) - 1} nodes more"


def _kinds() -> list[list[Scheme]]:
    """Ways to quantise the whole; those in one list differ in nothing but their ranges."""
    return [
        [Scheme("static", "all", rule) for rule in RULES],
        [Scheme("static", "linear", rule) for rule in RULES],
        [Scheme("dynamic")],
    ]
