"""How good a model is: accuracy with labels; agreement and error against a teacher without.

One pass over the data. Nothing is kept but sums, so the memory needed does not grow with it; only a metric of the
user's own needs all answers at once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ndonnx.data import Batch, DataSource, input_specs
from ndonnx.data.inputs import interface_of
from ndonnx.distill.tasks.fidelity import Fidelity, Measure, OutputFidelity, ratio
from ndonnx.distill.tasks.outputs import class_scores, doubt, has_shape_of_scores, tasks_of
from ndonnx.distill.tasks.scores import are_probabilities, nats, top_class
from ndonnx.errors import DataError, ModelError, UsageError, first_line
from ndonnx.graph import load
from ndonnx.graph.interface import Interface
from ndonnx.graph.passes.branches import open_branches
from ndonnx.graph.working_copy import working_copy
from ndonnx.metrics.user_metric import UserMetric
from ndonnx.metrics.verdict import Verdict
from ndonnx.metrics.worst import Worst, WorstSample
from ndonnx.runtime.progress import Progress, Silent
from ndonnx.teacher.sessions import OrtError, make_session
from ndonnx.teacher.sizes import rows_at_once

Model = str | Path | ir.Model
Array = NDArray[np.generic]

_FEW = 2
"""Samples by which sizes are found."""
_COPIES = 8
"""Times that answers are in memory while they are compared: several in double precision."""
_UNKNOWN = 16
"""Samples run at a time where sizes cannot be found."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured; None where labels, a teacher or class scores were missing.

    Class scores are the first output that is known to hold any, see `ndonnx.distill.tasks.outputs`.
    """

    samples: int
    accuracy: float | None
    """Part of the samples whose largest class score is at the label (top-1)."""
    agreement: float | None
    """Part of the samples whose largest class score is where the teacher's is."""
    nmse: float | None
    """Squared error over the teacher's variance, pooled over all float outputs; inf where an output broke."""
    max_error: float | None
    """Largest absolute difference from a teacher's value, over all float outputs."""
    kl: float | None
    """Kullback-Leibler divergence of the class distribution from the teacher's, in nats, mean over samples."""
    worst_sample: int | None = None
    """Number of the sample with the largest squared error, from 0 in the order of the data."""
    worst_nmse: float | None = None
    """Squared error of each sample over the teacher's variance: `nmse` is the mean of this over all samples."""
    worst: tuple[WorstSample, ...] = ()
    """The samples with the largest squared error, at most eight, the worst first; the document has this key only where
    there are some."""
    outputs: Mapping[str, OutputFidelity] = field(default_factory=dict)
    """Each float output in the measure of its task, by name."""
    metric: float | None = None
    """The user's own, higher is better; without a teacher, of the model beside itself."""
    requirements: tuple[Verdict, ...] = ()
    """What became of each requirement; the document has this key only where there were some."""

    @property
    def missed(self) -> tuple[Verdict, ...]:
        """Requirements that were not kept."""
        return tuple(verdict for verdict in self.requirements if not verdict.kept)

    @property
    def loss(self) -> float:
        """One figure by which students of a teacher are compared, less is better: the outputs' own, added up."""
        return sum(found.loss for found in self.outputs.values()) if self.outputs else math.inf

    def beats(self, other: Evaluation) -> bool:
        """Whether this student of a teacher is better than another one: by the user's metric, else by `loss`."""
        if self.metric is not None and other.metric is not None:
            return self.metric > other.metric
        return not other.loss <= self.loss

    def to_json(self) -> dict[str, Any]:
        """As a mapping for JSON, which has no NaN or Inf: such values become None."""
        told = {"requirements": [verdict.to_json() for verdict in self.requirements]}
        told["worst"] = [sample.to_json() for sample in self.worst]
        document = finite(asdict(replace(self, requirements=(), worst=()))) | told
        return {name: value for name, value in document.items() if told.get(name, True)}


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same mapping with None in place of NaN and Inf, which JSON has not; also in mappings inside it."""
    return {
        key: finite(value)
        if isinstance(value, Mapping)
        else None
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for key, value in values.items()
    }


@dataclass(frozen=True)
class Batching:
    """How a model is run over data."""

    size: int = 256
    """Samples per run where the model leaves that open."""
    threads: int | None = None
    """Of onnxruntime. None: the cores of the process's affinity."""
    samples: int | None = None
    """Only so many, the first ones. None: all."""


ALL = Batching()


def evaluate(
    model: Model,
    data: DataSource,
    *,
    teacher: Model | Reference | None = None,
    batching: Batching = ALL,
    tasks: Sequence[str] = (),
    metric: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Run the model over all of the data, and beside it the teacher if there is one.

    A model with a fixed batch dimension is run at that size, the last samples padded.

    Args:
        model: path or IR model.
        data: opened for the inputs of this model (`input_specs`).
        teacher: what to compare with, several times as a `Reference`; needs the same inputs and outputs.
        batching: how many samples, how many at a time, in how many threads.
        tasks: what the user says of the outputs, as `--task` takes it.
        metric: of the user's own, as `--metric` takes it. None: none.
        progress: told how far it is.

    Raises:
        ModelError: a model cannot be opened or run, or the two do not match.
        DataError: a sample is corrupt or does not fit, or a label is no class of the model.
        UsageError: the user's metric is not there, raises, or gives no finite number.
    """
    progress = Silent() if progress is None else progress
    student = _Runner(model, data, batching.threads)
    if isinstance(teacher, Reference):
        reference: _Runner | None = teacher
        teacher = teacher.model
    else:
        reference = None if teacher is None else _Runner(teacher, data, batching.threads)
    if reference is not None:
        _check_match(student, reference)
    tally = _Tally(student.name, tasks, None if metric is None else UserMetric(metric))
    samples = batching.samples
    total = data.length if samples is None or data.length is None else min(samples, data.length)
    progress.stage("evaluate", total=total, unit="samples")
    fixed = data.fixed_batch or student.batch_size or (reference.batch_size if reference is not None else None)
    size = fixed or _rows_at_once(model if teacher is None else teacher, student.outputs, data, batching.size)
    for batch in data.batches(size, samples=samples):
        for part in _parts(batch, size):
            expected = None if reference is None else reference.run(part, fixed)
            tally.add(student.run(part, fixed), expected, part)
        progress.advance(len(batch))
    found = tally.result()
    if reference is not None and tally.doubt is not None:
        progress.note(tally.doubt)
    worst = tuple(replace(each, sample=data.row_number(each.sample)) for each in found.worst)
    return replace(found, worst=worst, worst_sample=worst[0].sample if worst else None)


def _rows_at_once(model: Model, outputs: list[str], data: DataSource, most: int) -> int:
    """Samples that are run at a time: as many as bounded memory holds, and what is made of their answers."""
    few = next(iter(data.batches(_FEW, samples=_FEW)), None)
    if few is None:
        return most
    try:
        fed = _fed(model, interface_of(data.inputs, data.fixed))
        graph = fed if isinstance(fed, ir.Model) else load(fed)
        return rows_at_once(graph, outputs, few.inputs, most, copies=_COPIES)
    except UsageError:  # onnxruntime runs it all the same, or says what is wrong
        return min(most, _UNKNOWN)


class _Runner:
    """A session that knows its name for messages, its outputs and its batch size."""

    def __init__(self, model: Model, data: DataSource, threads: int | None) -> None:
        self.name = f"graph '{model.graph.name or ''}'" if isinstance(model, ir.Model) else str(model)
        self._session = make_session(_fed(model, interface_of(data.inputs, data.fixed)), threads=threads)
        self.inputs = input_specs(self._session)
        self.outputs = [output.name for output in self._session.get_outputs()]
        sizes = {spec.shape[0] for spec in self.inputs if spec.shape and isinstance(spec.shape[0], int)}
        if len(sizes) > 1:
            raise ModelError(f"{self.name}: expected one batch size, found {sorted(map(str, sizes))} in its inputs")
        size = next(iter(sizes), None)
        self.batch_size = size if isinstance(size, int) else None
        """The fixed first dimension of the inputs; None where it is dynamic."""

    def run(self, batch: Batch, size: int | None) -> dict[str, Array]:
        """The outputs for these samples, run as a batch of `size` if it is fixed."""
        count = len(batch)
        feeds = {spec.name: _pad(batch.inputs[spec.name], size or count) for spec in self.inputs}
        try:
            values = self._session.run(self.outputs, feeds)
        except OrtError as error:
            raise ModelError(f"{self.name}: onnxruntime failed on a batch of {count}: {first_line(error)}") from error
        # Only an output with one row per sample can be cut back to the samples that are not padding.
        return {
            name: value[:count] if value.ndim and len(value) == size else value
            for name, value in zip(self.outputs, values, strict=True)
            if isinstance(value, np.ndarray)
        }


class Reference(_Runner):
    """A teacher that several students are compared with: it answers a batch once, as far as memory is given."""

    def __init__(self, model: Model, data: DataSource, most: int) -> None:
        """Open it.

        Args:
            model: path or IR model.
            data: opened for its inputs.
            most: bytes of answers that stay in memory.
        """
        super().__init__(model, data, None)
        self.model = model
        self._room = most
        self._known: dict[str, dict[str, Array]] = {}

    def run(self, batch: Batch, size: int | None) -> dict[str, Array]:
        digest = hashlib.blake2b(str(size).encode())
        for name in sorted(batch.inputs):
            digest.update(np.ascontiguousarray(batch.inputs[name]).view(np.uint8).data)
        key = digest.hexdigest()
        if key in self._known:
            return self._known[key]
        found = super().run(batch, size)
        self._room -= sum(value.nbytes for value in found.values())
        if self._room >= 0:
            self._known[key] = found
        return found


def _fed(model: Model, interface: Interface) -> Model:
    if interface.is_plain:
        return model
    return samples_first(model if isinstance(model, ir.Model) else load(model), interface)


def samples_first(model: ir.Model, interface: Interface) -> ir.Model:
    """A loaded model as something that takes and gives arrays with the samples first; not changed itself."""
    return Interface.of(working_copy(open_branches(model, interface.fixed), interface)).applied(model)


class _Tally:
    """Running sums of everything that an `Evaluation` tells."""

    def __init__(self, name: str, told: Sequence[str], metric: UserMetric | None) -> None:
        self._name, self._told, self._metric = name, told, metric
        self._measures: dict[str, Measure] = {}
        self._samples = 0
        self._labelled = 0
        self._right = 0
        self._compared = 0
        self._agreed = 0
        self._divergence = 0.0
        self._probabilities: bool | None = None
        self._scores: str | None = None
        self.doubt: str | None = None
        """One line about an output that might hold class scores."""
        self._fidelity: dict[str, Fidelity] = {}
        self._worst = Worst()

    def add(self, outputs: Mapping[str, Array], expected: Mapping[str, Array] | None, batch: Batch) -> None:
        """Take in the outputs for the samples of a batch."""
        labels, count, errors = batch.labels, len(batch), None
        classes: tuple[Array, Array] | None = None
        if expected is not None:
            if not self._samples:
                tasks = tasks_of(expected, count, labelled=labels is not None, told=self._told)
                self._measures = {name: task.measure for name, task in tasks.items()}
            errors = self._compare(outputs, expected, count)
        scores = self._class_scores(outputs if expected is None else expected, labels, count)
        if scores is not None and has_shape_of_scores(outputs[scores], count):
            predicted = top_class(outputs[scores])
            if labels is not None:
                self._check(labels, outputs[scores].shape[1])
                self._labelled += count
                self._right += int(np.sum(predicted == labels))
            if expected is not None:
                self._compared += count
                classes = predicted, top_class(expected[scores])
                self._agreed += int(np.sum(predicted == classes[1]))
                self._divergence += self._kl(outputs[scores], expected[scores])
        if errors is not None:
            self._worst.add(self._samples, errors, batch.inputs, classes)
        if self._metric is not None:
            self._metric.add(outputs, outputs if expected is None else expected, labels)
        self._samples += count

    def _class_scores(self, answers: Mapping[str, Array], labels: NDArray[np.int64] | None, count: int) -> str | None:
        """The output with class scores; the first batch decides which it is, and whether there is one."""
        if not self._samples:
            self._scores = class_scores(answers, count, labelled=labels is not None, told=self._told)
            self.doubt = doubt(answers, count, labelled=labels is not None, told=self._told)
        return self._scores

    def result(self) -> Evaluation:
        """Everything so far."""
        if not self._samples:
            raise DataError(f"{self._name}: nothing to evaluate, the data source gave no samples")
        parts = list(self._fidelity.values())
        spread = sum(part.spread for part in parts)
        worst = self._worst.result(lambda error: ratio(error * self._samples, spread))
        return Evaluation(
            samples=self._samples,
            accuracy=self._right / self._labelled if self._labelled else None,
            agreement=self._agreed / self._compared if self._compared else None,
            nmse=ratio(sum(part.error for part in parts), spread) if parts else None,
            max_error=max(part.largest for part in parts) if parts else None,
            kl=self._divergence / self._compared if self._compared else None,
            worst_sample=worst[0].sample if worst else None,
            worst_nmse=worst[0].nmse if worst else None,
            worst=worst,
            outputs={name: each.result(self._fidelity[name]) for name, each in self._measures.items()},
            metric=None if self._metric is None else self._metric.result(),
        )

    def _compare(self, outputs: Mapping[str, Array], expected: Mapping[str, Array], count: int) -> Array | None:
        """The squared error of each sample; None where no output has a row for each."""
        errors = []
        for name, value in expected.items():
            if outputs[name].shape != value.shape:
                raise ModelError(
                    f"{self._name}: output '{name}': expected the teacher's shape {list(value.shape)}, "
                    f"found {list(outputs[name].shape)}"
                )
            if value.dtype.kind == "f":
                error = self._fidelity.setdefault(name, Fidelity()).add(outputs[name], value)
                if name in self._measures:
                    self._measures[name].add(outputs[name], value)
                if error.ndim and len(error) == count:
                    errors.append(error)
        return np.sum(errors, axis=0) if errors else None

    def _kl(self, student: Array, teacher: Array) -> float:
        if self._probabilities is None:  # the first batch tells whether the model ends in a softmax
            self._probabilities = are_probabilities(teacher)
        value = nats(student, teacher, probabilities=self._probabilities)
        return math.inf if math.isnan(value) else value

    def _check(self, labels: NDArray[np.int64], classes: int) -> None:
        wrong = np.flatnonzero((labels < 0) | (labels >= classes))
        if len(wrong):
            raise DataError(
                f"sample {self._samples + wrong[0]}: label {labels[wrong[0]]} is no class of {self._name}, "
                f"expected 0 to {classes - 1}; mend the labels"
            )


def _parts(batch: Batch, size: int | None) -> Iterator[Batch]:
    for start in range(0, len(batch), size or len(batch)):
        part = slice(start, start + (size or len(batch)))
        inputs = {name: value[part] for name, value in batch.inputs.items()}
        yield Batch(inputs, None if batch.labels is None else batch.labels[part])


def _pad(value: Array, size: int) -> Array:
    missing = size - len(value)
    return np.concatenate([value, np.repeat(value[-1:], missing, axis=0)]) if missing else value


def _check_match(student: _Runner, teacher: _Runner) -> None:
    for what, found, expected in (
        ("inputs", [spec.name for spec in student.inputs], [spec.name for spec in teacher.inputs]),
        ("outputs", student.outputs, teacher.outputs),
    ):
        if sorted(found) != sorted(expected):
            raise ModelError(f"{student.name}: expected the {what} of {teacher.name}, {expected}, found {found}")
    if student.batch_size and teacher.batch_size and student.batch_size != teacher.batch_size:
        raise ModelError(
            f"{student.name}: expected the batch size {teacher.batch_size} of {teacher.name}, "
            f"found {student.batch_size}"
        )
