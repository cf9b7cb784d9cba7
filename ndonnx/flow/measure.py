"""What candidates and whole students lose and cost, measured once and kept in the run directory."""

from __future__ import annotations

import math
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from ndonnx.assemble.splice import splice
from ndonnx.data.subset import Subset
from ndonnx.distill.job import load_student
from ndonnx.errors import ModelError, first_line
from ndonnx.flow.run import Run
from ndonnx.graph import load
from ndonnx.graph.dataflow import real_inputs
from ndonnx.graph.interface import samples_first
from ndonnx.metrics.latency import benchmark, ratio
from ndonnx.metrics.partial import Judged, Kind, Losses, PartialModels, Quality
from ndonnx.metrics.sensitivity import Draws, tolerances
from ndonnx.partition import Neighbourhood, Partition
from ndonnx.runtime.faults import Fault, tried
from ndonnx.runtime.fingerprints import Fingerprintable, fingerprint
from ndonnx.runtime.machine import usable_cores
from ndonnx.runtime.run_directory import Entry
from ndonnx.select import ERROR, TEACHER, first_confidence
from ndonnx.teacher import make_session
from ndonnx.teacher.batches import read_batch, whole_batches
from ndonnx.teacher.sessions import OrtError
from ndonnx.teacher.sizes import BoundedBatches

_ROOM = 2**28
"""Bytes of the teacher's answers that are kept."""
STUDENT_FILE = "student.onnx"
"""Of a whole student, in its entry."""
_AMPLITUDE = 0.1
"""Size of the error, in parts of the activation's deviation, by which a neighbourhood's sensitivity is measured."""
_ROUNDS = 30


@dataclass(frozen=True)
class Loss:
    """How much worse than the teacher's answers are."""

    drop: float
    """Loss of the metric against the teacher, see `ndonnx.metrics.partial.Quality`."""
    divergence: float

    def to_json(self) -> dict[str, float | None]:
        """For a document, which has no Inf: null stands for it."""
        return {name: finite(value) for name, value in asdict(self).items()}

    @classmethod
    def of_json(cls, found: Mapping[str, float | None]) -> Self:
        """What `to_json` has written."""
        values = (found[each.name] for each in fields(cls))
        return cls(*(math.inf if value is None else float(value) for value in values))


@dataclass(frozen=True)
class WholeLoss(Loss):
    """How much worse than the teacher's the answers of a whole student are."""

    bound: float
    """One-sided upper confidence bound of the drop."""
    metric: float


class Rows:
    """Some rows of the data, and how much worse than the teacher a whole model is on them.

    TeacherOutputs are compared batch by batch; the teacher's are kept where they are small.
    """

    def __init__(self, source: Subset, parts: Partition) -> None:
        """Take the samples of `source`; nothing is run yet."""
        self._source, self._parts = source, parts
        self.count = source.length
        self._kept: dict[int, Quality] = {}
        """The teacher's answers by the number of the batch, as far as there is room for them."""
        self._room = _ROOM

    @cached_property
    def kind(self) -> Kind:
        """What a drop is of, see `Quality`."""
        return next(self._measured(None))[0].kind

    @cached_property
    def labels(self) -> NDArray[np.int64] | None:
        """Classes, int64 (samples,); None where the data have none."""
        if not self._source.has_labels:
            return None
        found = [batch.labels for batch in self._source.batches(read_batch(self._source)) if batch.labels is not None]
        return np.concatenate(found)

    def batches(self) -> Iterator[Mapping[str, np.ndarray]]:
        """Inputs by name."""
        return whole_batches(self._source, read_batch(self._source))

    def fingerprint(self) -> str:
        """Fingerprint of what the rows hold."""
        return self._source.fingerprint()

    def loss_of(self, student: ir.Model, confidence: float, samples: int = 0) -> WholeLoss:
        """The loss of a whole student, with the bound that so many samples would give; 0 stands for these."""
        losses = Losses(self.kind)
        for quality, answers in self._measured(student):
            losses.add(quality, answers)
        return WholeLoss(losses.drop, losses.divergence, losses.bound(confidence, samples or None), losses.metric)

    def _measured(self, student: ir.Model | None) -> Iterator[tuple[Quality, dict[str, np.ndarray]]]:
        """The teacher's answers to every batch as a measure, and a student's; without one, the teacher's own."""
        session = None if student is None else self._session(student)
        begin = 0
        for number, batch in enumerate(self._bounded()):
            count = min(self._bounded.count(batch), self.count - begin)
            quality = self._kept.get(number)
            answers = {} if quality is not None else _answers(self._teacher, batch, count)
            if quality is None:
                labels = None if self.labels is None else self.labels[begin : begin + count]
                quality = Quality(answers, labels, count, like=self._kept.get(0))
                self._keep(number, quality, sum(array.nbytes for array in answers.values()))
            yield quality, answers if session is None else _answers(session, batch, count)
            begin += count

    def _keep(self, number: int, quality: Quality, size: int) -> None:
        if number == 0 or size <= self._room:  # the first says what the outputs hold
            self._kept[number] = quality
            self._room -= size

    @cached_property
    def _teacher(self) -> ort.InferenceSession:
        return self._session(self._parts.model)

    def _session(self, model: ir.Model) -> ort.InferenceSession:
        return make_session(self._parts.interface.applied(model))

    @cached_property
    def _bounded(self) -> BoundedBatches:
        names = [value.name or "" for value in self._parts.model.graph.outputs]
        return BoundedBatches.of(self._parts.model, names, self.batches)


def _answers(session: ort.InferenceSession, batch: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """Outputs by name for the first `count` samples of a batch, which may be filled up."""
    names = [output.name for output in session.get_outputs()]
    rows = len(next(iter(batch.values())))
    try:
        found = dict(zip(names, session.run(names, dict(batch)), strict=True))
    except OrtError as error:
        raise ModelError(f"onnxruntime failed on the held-out samples: {first_line(error)}") from error
    arrays = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
    return {name: value[:count] if value.ndim and len(value) == rows else value for name, value in arrays.items()}


@dataclass
class Measures:
    """Measures on rows that no training sees. Close it in the end."""

    run: Run
    _partials: PartialModels | None = None
    _tested: dict[str, float] = field(default_factory=dict)
    """Confidence of each student's last test, by the key of its entry."""

    @cached_property
    def choosing(self) -> Rows:
        """Rows by which candidates and students are chosen."""
        return Rows(self.run.split.to_choose(), self.run.parts)

    @cached_property
    def confirming(self) -> Rows:
        """Rows on which a promised drop is tested."""
        return Rows(self.run.split.to_confirm(), self.run.parts)

    @cached_property
    def comparing(self) -> Rows:
        """Rows of the comparison at the end."""
        return Rows(self.run.split.to_compare(), self.run.parts)

    def expected(self, student: ir.Model) -> WholeLoss:
        """The loss of a whole student by the rows that choose, with the bound that its test should give."""
        return self.choosing.loss_of(student, first_confidence(self.run.recipe.search.attempts), self.confirming.count)

    def confirmed(self, whole: Entry, confidence: float) -> WholeLoss:
        """The loss of a whole student on rows that no choice has seen: the test of a promise."""
        self._tested[whole.key] = confidence
        return self._loss(self.confirming, whole, confidence)

    def tested(self, whole: Entry) -> WholeLoss:
        """The loss that a student had in its last test."""
        return self.confirmed(whole, self._tested.get(whole.key, first_confidence(self.run.recipe.search.attempts)))

    def compared(self, whole: Entry) -> WholeLoss:
        """The loss of a whole student on the rows of the comparison."""
        return self._loss(self.comparing, whole, 1 - ERROR)

    def _loss(self, rows: Rows, whole: Entry, confidence: float) -> WholeLoss:
        entry = self._entry("losses", whole.key, rows.fingerprint(), confidence)
        if not entry.done:
            loss = rows.loss_of(load(whole.path / STUDENT_FILE), confidence)
            entry.begin()
            entry.commit(loss.to_json())
        return WholeLoss.of_json(entry.meta())

    def close(self) -> None:
        """Delete what was captured of the held-out rows."""
        if self._partials is not None:
            self._partials.close()
        shutil.rmtree(self.run.directory.path / "heldout", ignore_errors=True)

    def known(self, student: Entry) -> bool:
        """Whether a candidate was measured already."""
        return self._entry("qualities", student.key).done

    def of_candidate(self, neighbourhood: Neighbourhood, student: Entry) -> Loss:
        """The loss of the teacher with this student alone in it (section 5)."""
        entry = self._entry("qualities", student.key)
        if not entry.done:
            loss = tried(lambda: self._loss_of(neighbourhood, student))
            if isinstance(loss, Fault):
                self.run.directory.record(f"{neighbourhood.name} measured", loss)
                self.run.progress.note(f"{neighbourhood.name} cannot be measured: {loss.reason}")
                loss = Loss(math.inf, math.inf)
            entry.begin()
            entry.commit(loss.to_json())
        return Loss.of_json(entry.meta())

    def _loss_of(self, neighbourhood: Neighbourhood, student: Entry) -> Loss:
        return self._lost(self._replaced(neighbourhood, load_student(student)))

    def of_whole(self, model: ir.Model) -> Loss:
        """The loss of a whole model on the samples by which candidates are measured; nothing of it is kept.

        Raises:
            ModelError: onnxruntime refuses the model.
        """
        return self._lost(self.partials.whole(model))

    def _lost(self, answers: Mapping[str, np.ndarray]) -> Loss:
        return Loss(self.partials.quality.drop(answers), self.partials.quality.divergence(answers))

    def _replaced(self, neighbourhood: Neighbourhood, student: ir.Model) -> dict[str, np.ndarray]:
        """The teacher's answers with a student in all its places."""
        uses = self.run.parts.uses(neighbourhood)
        if len(uses) == 1:
            return self.partials.replaced(neighbourhood.name, student)
        students = {use.name: self.run.parts.as_in_teacher(self.run.parts.at(use, student)) for use in uses}
        return self.partials.whole(splice(self.run.parts.model, students, self.run.parts.shared))

    def sensitivity(self, neighbourhood: Neighbourhood, student: Entry) -> float:
        """The divergence that a student's error at a neighbourhood's exit causes, per NMSE.

        Of a student's own error, made small: independent noise says less, because layers behind average it away.
        """
        entry = self._entry("sensitivities", student.key)
        if not entry.done:
            model = load_student(student)
            # Small errors add up: those of a student in several places as those of several students.
            found = sum(self._sensitivity(use, model) for use in self.run.parts.uses(neighbourhood))
            entry.begin()
            entry.commit({"sensitivity": finite(found)})
        found = entry.meta()["sensitivity"]
        return math.inf if found is None else float(found)

    def _sensitivity(self, use: Neighbourhood, student: ir.Model) -> float:
        found = tolerances(
            self.partials,
            self.partials.quality,
            math.inf,
            names=[use.name],
            draws=Draws([_AMPLITUDE]),
            students={use.name: self.run.parts.at(use, student)},
        )
        return found[use.name].sensitivity or 0.0

    def times_of(self, neighbourhood: Neighbourhood, students: Mapping[str, Entry]) -> dict[str, float]:
        """Milliseconds of each slice for one sample, in turn with each other, the teacher's among them.

        Of a student with several places, in all of them.
        """
        where = (platform.node(), usable_cores())
        entry = self._entry("latencies", neighbourhood.name, *where, {name: e.key for name, e in students.items()})
        if not entry.done:
            loaded = {name: load_student(student) for name, student in students.items()}
            times: dict[str, float] = {}
            for use in self.run.parts.uses(neighbourhood):
                teacher = self.run.parts.slice_of(use)
                slices = {TEACHER: teacher} | {name: self.run.parts.at(use, model) for name, model in loaded.items()}
                feeds = self._one_sample([value.name or "" for value in teacher.graph.inputs])
                for name, found in benchmark(slices, feeds, rounds=_ROUNDS).items():
                    times[name] = times.get(name, 0.0) + found.p50_ms
            entry.begin()
            entry.commit({"times": times})
        return {str(name): float(time) for name, time in entry.meta()["times"].items()}

    def time_of_whole(self, student: ir.Model | None = None) -> tuple[float, float]:
        """Milliseconds of the teacher for one sample, and the part of it that a student takes."""
        feeds = self._one_sample([value.name or "" for value in real_inputs(self.run.parts.model.graph)])
        models: dict[str, str | Path | ir.Model] = {TEACHER: self.run.teacher.path}
        if student is not None:
            models["student"] = student
        times = benchmark(models, self.run.parts.interface.feeds(feeds), rounds=2 * _ROUNDS)
        return times[TEACHER].p50_ms, 1.0 if student is None else ratio(times["student"], times[TEACHER]).median

    @property
    def partials(self) -> PartialModels:
        """The partial models, captured when first asked for."""
        if self._partials is None:
            samples = min(self.choosing.count, self.run.recipe.search.samples)
            self.run.progress.stage("held-out", samples, "samples")
            self._partials = PartialModels(
                self.run.parts,
                Judged(self.choosing.batches, samples, self.choosing.labels),
                self.run.directory.path / "heldout",
                threads=usable_cores(),
                budget=self.run.recipe.cache_budget,
                on_batch=self.run.progress.advance,
            )
        return self._partials

    def _one_sample(self, names: list[str]) -> dict[str, np.ndarray]:
        """Values of the teacher for one sample, or for one batch of the size that the model fixes."""
        batch = dict(next(whole_batches(self.run.split.source, 1, samples=1)))
        inner = [name for name in names if name not in batch]
        if inner:
            model = self.run.parts.model.clone()
            values = ir.convenience.create_value_mapping(model.graph)
            present = {value.name for value in model.graph.outputs}
            model.graph.outputs.extend(values[name] for name in inner if name not in present)
            session = make_session(samples_first(model))
            batch |= dict(zip(inner, session.run(inner, batch), strict=True))
        return {name: batch[name] for name in names}

    def entry_here(self, kind: str, *parts: Fingerprintable) -> Entry:
        """Where a measurement on these rows and on this machine is kept."""
        return self._entry(kind, platform.node(), usable_cores(), *parts)

    def _entry(self, kind: str, *parts: Fingerprintable) -> Entry:
        return self.run.directory.entry(
            kind, fingerprint(self.run.model_key, self._rows, self.run.recipe.search.samples, *parts)
        )

    @cached_property
    def _rows(self) -> str:
        return self.run.split.key()


def finite(value: float) -> float | None:
    """The value, or None where it is Inf or NaN."""
    return value if math.isfinite(value) else None
