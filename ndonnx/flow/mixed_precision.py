"""Precision as a part of the search: slices in 8 bits, and whole students with some of their pieces in 8 bits.

A student in 8 bits needs no training of its own: it is made of the student in float, with the ranges that the slice has
on the teacher's activations, captured in one sweep over calibration rows. The way to quantise is chosen once, on the
whole teacher, and is the same for all.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from ndonnx.assemble.quantise import Scheme, prepared, quantisable, quantised
from ndonnx.assemble.quantise_pieces import pieces_of
from ndonnx.assemble.quantise_ranges import RULES, measure_ranges
from ndonnx.distill.job import STUDENT_FILE, load_student
from ndonnx.errors import ModelError, SliceError, first_line
from ndonnx.flow.measure import Loss, Measures
from ndonnx.flow.quantise import STAGE, best_way
from ndonnx.flow.quantise_trials import REFUSED, Trials, calibration
from ndonnx.flow.run import Run
from ndonnx.flow.stages import Stages
from ndonnx.graph import save
from ndonnx.graph.save import serialise
from ndonnx.graph.shapes.declared import copy_of
from ndonnx.graph.working_copy import slice_batch
from ndonnx.partition import Neighbourhood
from ndonnx.partition.parts import boundary
from ndonnx.runtime.fingerprints import fingerprint
from ndonnx.runtime.machine import usable_cores
from ndonnx.runtime.run_directory import Entry
from ndonnx.select.precision import Measured
from ndonnx.teacher import ActivationStore, CaptureSettings, capture
from ndonnx.teacher.batches import read_batch, value_bytes, whole_batches


@dataclass(frozen=True)
class Way:
    """How everything in 8 bits is quantised, and what the whole teacher comes to by it."""

    scheme: Scheme
    time: float
    """Latency of the teacher in 8 bits, as a part of that in float."""


@dataclass(frozen=True)
class PieceInBits:
    """What the teacher comes to with one of its kept pieces in 8 bits."""

    loss: Loss
    size: float
    """Bytes more than in float; mostly below 0."""
    time: float
    """Latency more than in float, as a part of the teacher's; mostly below 0."""


@dataclass(frozen=True)
class Finished:
    """A whole student with some of its pieces in 8 bits."""

    model: ir.Model
    scheme: Scheme
    measured: Measured
    """By the rows that choose, beside the same student in float."""
    trials: Trials
    """Of the student in float."""
    corrected: bool
    """Whether its biases were corrected."""


@dataclass
class MixedPrecision:
    """Makes what is in 8 bits, slices and whole students, and finds it again in the run directory."""

    run: Run
    measures: Measures

    @cached_property
    def way(self) -> Way:
        """The way that is best for the whole teacher.

        Raises:
            ModelError: the teacher cannot be quantised.
        """
        entry = self.run.directory.entry("ways", fingerprint(*self._told))
        if not entry.done:
            with self.run.clock.measure("quantise"):
                self.run.progress.stage("quantise")
                scheme, found = self._best_way()
            entry.begin()
            entry.commit({"scheme": asdict(scheme), "time": found.time})
        found_way = entry.meta()
        return Way(Scheme(**found_way["scheme"]), float(found_way["time"]))

    def _best_way(self) -> tuple[Scheme, Measured]:
        try:
            return best_way(self._trials(self._teacher, measured=bool(self.run.float_outputs)))
        except REFUSED as error:
            raise ModelError(
                f"{self.run.teacher.path}: cannot be quantised: {first_line(error)}; leave --bits out, and int8 out of "
                "the candidates"
            ) from error

    @property
    def scheme(self) -> Scheme:
        """How everything in 8 bits is quantised."""
        return self.way.scheme

    @cached_property
    def key(self) -> str:
        """What depends on how things are quantised depends on this."""
        return fingerprint(asdict(self.scheme), self._rows)

    @property
    def _rows(self) -> str:
        return calibration(self.run).fingerprint()

    @property
    def _told(self) -> tuple[str, ...]:
        rows = self._rows, self.run.split.to_choose().fingerprint()
        where = platform.node(), str(usable_cores())
        return self.run.model_key, *rows, str(self.run.recipe.metric), *self.run.recipe.task, *where

    @property
    def _teacher(self) -> ir.Model:
        return copy_of(self.run.teacher.model)

    def _trials(self, student: ir.Model, *, measured: bool = False, stages: Stages | None = None) -> Trials:
        stages = Stages(self.run) if stages is None else stages
        return Trials(self.run, student, stages.evaluate, stages.evaluate(student) if measured else None)

    # Slices

    def of_slice(self, neighbourhood: Neighbourhood, student: Entry | None) -> Entry | None:
        """A slice in 8 bits, as an entry that holds it as those of students do; None where it cannot be had.

        Args:
            neighbourhood: where it belongs.
            student: in float; None for the teacher's own slice.
        """
        told = (self.run.model_key, boundary([neighbourhood]), None if student is None else student.key, self.key)
        entry = self.run.directory.entry("slices-in-bits", f"{neighbourhood.name}-{fingerprint(*told)}")
        if not entry.done:
            self._make_slice(neighbourhood, student, entry)
        return entry if entry.meta()["reason"] is None else None

    def _make_slice(self, n: Neighbourhood, student: Entry | None, entry: Entry) -> None:
        folder, reason = entry.begin(), None
        try:
            model = self.run.parts.slice_of(n) if student is None else load_student(student)
            save(self._slice_in_bits(model), folder / STUDENT_FILE)
        except REFUSED as error:
            reason = first_line(error)
        entry.commit({"reason": reason})

    def _slice_in_bits(self, model: ir.Model) -> ir.Model:
        base = prepared(model, self.scheme.mode)
        if not quantisable(base, self.scheme):
            raise SliceError("nothing in it is quantised")
        if self.scheme.mode == "dynamic":
            return quantised(base, self.scheme)
        names = [value.name or "" for value in base.graph.inputs]
        if missing := [name for name in names if name in self._store.unstorable]:
            raise SliceError(f"'{missing[0]}' cannot be captured: {self._store.unstorable[missing[0]]}")
        constants = {name for name in names if self._store.is_constant(name)}
        ranges = measure_ranges(base, self._fed(base, names, constants), threads=usable_cores(), constants=constants)
        return quantised(base, self.scheme, ranges)

    def _fed(
        self, model: ir.Model, names: list[str], constants: Collection[str]
    ) -> Iterator[Mapping[str, np.ndarray[Any, Any]]]:
        """The captured inputs of a slice, in batches of the size that it fixes, or all at once."""
        arrays = {name: self._store.array(name) for name in names}
        samples = min((len(array) for name, array in arrays.items() if name not in constants), default=0)
        size = slice_batch(model) or samples
        for start in range(0, samples - size + 1, max(1, size)):
            rows = slice(start, start + size)
            yield {name: array if name in constants else array[rows] for name, array in arrays.items()}

    @cached_property
    def _store(self) -> ActivationStore:
        """What every slice reads of the teacher on the calibration rows: one sweep."""
        source, parts = calibration(self.run), self.run.parts
        names = list(dict.fromkeys(v.name or "" for n in parts.trained for v in (n.entry, *n.context) if v is not None))
        each = sum(value_bytes(parts.model, names, source, np.float32).values())
        samples = max(1, min(source.length, self.run.recipe.cache_budget // max(1, each)))
        self.run.progress.stage("calibrate", samples, "samples")
        return capture(
            parts.model,
            names,
            lambda: whole_batches(source, read_batch(source)),
            self.run.directory.path / "calibration",
            samples=samples,
            settings=CaptureSettings(threads=usable_cores(), half=False),
            on_batch=self.run.progress.advance,
        )

    def close(self) -> None:
        """Delete what was captured of the calibration rows."""
        shutil.rmtree(self.run.directory.path / "calibration", ignore_errors=True)

    # Whole students

    def whole(self, student: ir.Model, pieces: Collection[str]) -> ir.Model:
        """A student in float with these pieces of it in 8 bits, ranges from its own values on the calibration rows.

        Raises:
            SliceError, ModelError, OrtError: it cannot be had.
        """
        return self._with(self._trials(student), pieces, self.scheme)

    def _with(self, trials: Trials, pieces: Collection[str], scheme: Scheme) -> ir.Model:
        return trials.model(scheme, self._in_float(trials.base(scheme.mode), pieces))

    def _in_float(self, base: ir.Model, pieces: Collection[str]) -> list[str]:
        """Names of the nodes of a prepared student that are in none of these pieces."""
        inside = pieces_of(base, self.run.parts)
        return [name for node in base.graph if inside.get(name := node.name or "") not in pieces]

    def finished(self, student: ir.Model, pieces: Collection[str], stages: Stages) -> Finished:
        """As `whole`, with the ranges that lose least on the rows that choose, and measured beside the float student.

        Raises:
            SliceError, ModelError, OrtError: it cannot be had.
        """
        trials = self._trials(student, measured=bool(self.run.float_outputs), stages=stages)
        rivals = {self.scheme: self._with(trials, pieces, self.scheme)}
        if self.scheme.mode == "static" and trials.float_found is not None:
            others = (replace(self.scheme, rule=rule) for rule in RULES if rule != self.scheme.rule)
            rivals |= {scheme: self._with(trials, pieces, scheme) for scheme in others}
        losses = {scheme: trials.loss(model) for scheme, model in rivals.items()}
        best = min(losses, key=lambda scheme: losses[scheme])
        kept = self._in_float(trials.base(best.mode), pieces)
        correction = trials.correction(best, kept, rivals[best])
        shifts, loss = ({}, losses[best]) if correction is None else correction
        model = trials.model(best, kept, shifts) if shifts else rivals[best]
        measured = Measured(loss, trials.times({STAGE: model})[STAGE], trials.size(model))
        return Finished(model, best, measured, trials, corrected=bool(shifts))

    def bytes_more(self, student: ir.Model, model: ir.Model) -> int:
        """What a slice takes more in a file in 8 bits than in float, shapes of inner values aside."""
        return len(serialise(_bare(model))) - len(serialise(_bare(student)))

    # Pieces of the teacher that are kept

    @cached_property
    def kept_pieces(self) -> list[str]:
        """Names of the kept pieces of the teacher that hold something to quantise."""
        base = self._teacher_trials.base(self.scheme.mode)
        inside, heavy = pieces_of(base, self.run.parts), quantisable(base, self.scheme)
        held = {inside[name] for name in heavy if name in inside}
        return [n.name for n in self.run.parts.neighbourhoods if not n.distillable and n.name in held]

    @cached_property
    def _teacher_trials(self) -> Trials:
        return self._trials(self._teacher)

    def of_kept(self, name: str, *, timed: bool) -> PieceInBits:
        """The teacher with one kept piece in 8 bits; its time is 0 where it is not `timed`.

        Raises:
            SliceError, ModelError, OrtError: it cannot be had.
        """
        told = (*self._told, self.key, name, str(timed))
        entry = self.run.directory.entry("pieces-in-bits", fingerprint(*told))
        if not entry.done:
            trials = self._teacher_trials
            model = self._with(trials, [name], self.scheme)
            loss, more = self.measures.of_whole(model), 0.0
            if timed:
                more = trials.times({name: model})[name] - 1
            entry.begin()
            size = self.bytes_more(trials.base(self.scheme.mode), model)
            entry.commit({"loss": loss.to_json(), "size": size, "time": more})
        found = entry.meta()
        return PieceInBits(Loss.of_json(found["loss"]), float(found["size"]), float(found["time"]))


def _bare(model: ir.Model) -> ir.Model:
    """A copy that states nothing of its inner values."""
    bare = model.clone()
    for node in bare.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None
    return bare
