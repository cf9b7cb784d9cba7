"""The teacher with something else in one place: partial models, at the cost of what lies behind that place.

The paper measures a student by the metric of the teacher that has it in its neighbourhood's place
(section 5). One sweep of the teacher keeps what every neighbourhood reads and makes; then only
the student and the nodes that depend on its answer are run.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from ndonnx.distill.losses import nmse
from ndonnx.errors import ModelError, ParityError, TrainingError, first_line
from ndonnx.graph.working_copy import batch_size
from ndonnx.metrics.partial.cuts import Cuts, inputs_of
from ndonnx.metrics.partial.quality import Array, Quality, check_labels
from ndonnx.partition import Neighbourhood, Partition, extract, nodes_between
from ndonnx.teacher import CaptureSettings, capture, capture_bytes, make_session
from ndonnx.teacher.sessions import OrtError
from ndonnx.teacher.sizes import rows_at_once

Batches = Callable[[], Iterator[Mapping[str, Array]]]
Change = Callable[[Array, int], Array]
"""From rows of a value and the number of the first sample to what shall stand in their place."""

_BATCH = 64
_FEW = 2
"""Samples by which sizes are found."""
_SESSION_BYTES = 2**30
"""Weights that the sessions kept open may hold together."""


@dataclass(frozen=True)
class _Behind:
    """What depends on a neighbourhood's exit, as a session; None where nothing is left to compute."""

    session: ort.InferenceSession | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class Judged:
    """The samples on which outputs are compared."""

    batches: Batches
    """The data, by the names of the model's inputs; the same on every call. Where the model fixes its batch, of that
    size."""
    count: int
    labels: npt.NDArray[np.integer[Any]] | None = None
    """Classes of these samples, where they are known."""


class PartialModels:
    """The teacher's answers when one neighbourhood is replaced, on a fixed set of samples.

    Attributes:
        parts: the teacher.
        samples: how many; fewer than asked for where a budget does not allow more.
        labels: int64 (samples,), or None.
        outputs: the teacher's own answers.
    """

    def __init__(
        self,
        parts: Partition,
        given: Judged,
        folder: Path,
        *,
        threads: int,
        budget: int | None = None,
        on_batch: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Sweep the teacher once and keep, in full precision, what lies at the neighbourhoods' ends.

        Args:
            parts: the teacher; its distillable neighbourhoods can be replaced.
            given: the samples.
            folder: where the values are kept until `close`.
            threads: batches that are run side by side.
            budget: most bytes on disk; fewer samples are kept where they would take more. None: no limit.
            on_batch: told the number of samples of every batch of the sweep.

        Raises:
            DataError: the data end too early, or there are not as many labels as samples.
            ModelError: onnxruntime refuses the model.
            RunDirError: the disk is full.
        """
        batches, samples, labels = given.batches, given.count, given.labels
        self.parts = parts
        self._threads = threads
        self._values = ir.convenience.create_value_mapping(parts.model.graph, include_subgraphs=False)
        self._outputs = [value.name or "" for value in parts.model.graph.outputs if not value.is_initializer()]
        self._by_name = {n.name: n for n in parts.distillable}
        self._cuts = Cuts(parts)
        names = self._cuts.wanted(self._outputs)
        if budget is not None:
            samples = max(1, min(samples, budget // max(1, self._sample_bytes(names, batches))))
        self.labels = None if labels is None else check_labels(labels, samples)
        how = CaptureSettings(threads=threads, half=False)
        self._store = capture(parts.model, names, batches, folder, samples=samples, settings=how, on_batch=on_batch)
        self.samples = samples
        fixed = batch_size(parts.model.graph)
        self._batch = fixed or self._rows_at_once(names, batches)
        self._padded = fixed is not None
        self._variances: dict[str, float] = {}
        self._sessions: OrderedDict[str, _Behind] = OrderedDict()
        self._outputs = [name for name in self._outputs if name not in self._store.unstorable]
        if not self._outputs:
            name, reason = next(iter(self._store.unstorable.items()))
            raise ModelError(f"output '{name}' cannot be compared: {reason}")
        self.outputs: dict[str, Array] = {name: np.array(self.value(name)) for name in self._outputs}

    @cached_property
    def quality(self) -> Quality:
        """How outputs are compared: by the labels where there are any, else by the teacher's answers."""
        return Quality(self.outputs, self.labels, self.samples)

    @property
    def names(self) -> list[str]:
        """The neighbourhoods that can be replaced, in order."""
        return list(self._by_name)

    def value(self, name: str) -> Array:
        """The teacher's value at one of its neighbourhoods' ends, (samples, ...), mapped read-only.

        Raises:
            TrainingError: it could not be kept.
        """
        if name in self._store.unstorable:
            raise TrainingError(f"value '{name}' cannot be captured: {self._store.unstorable[name]}")
        return self._store.array(name)

    def exit(self, name: str) -> Array:
        """The teacher's value at the exit of the named neighbourhood, (samples, ...), mapped read-only."""
        return self.value(self._exit_of(name))

    def is_constant(self, name: str) -> bool:
        """Whether a value has no sample axis: one array for all samples."""
        return self._store.is_constant(name)

    def inputs_of(self, name: str, samples: int | None = None) -> dict[str, Array]:
        """What the named neighbourhood reads, entry and context: the first samples of it, a constant as it is."""
        found = {}
        for value in inputs_of(self._by_name[name]):
            array = self.value(value)
            found[value] = np.array(array if self.is_constant(value) else array[:samples])
        return found

    def replaced(self, name: str, student: ir.Model) -> dict[str, Array]:
        """The model's answers when this slice stands in the place of the named neighbourhood.

        Args:
            name: of a distillable neighbourhood.
            student: reads values that the neighbourhood reads, and makes its exit.

        Raises:
            SliceError: onnxruntime does not run the slice, or its answer does not fit the teacher.
        """
        return self.altered(name, self.answer_of(name, student))

    def answer_of(self, name: str, student: ir.Model) -> Change:
        """A change that puts the slice's answer in the place of the teacher's, for `altered` and `measured`."""
        try:
            session = make_session(student, threads=1, spin=False)
        except ModelError as error:
            raise ParityError(f"{name}: {error}") from error
        inputs = [value.name or "" for value in student.graph.inputs]

        def run(rows: Array, start: int) -> Array:
            feeds = {value: self._rows(value, start) for value in inputs}
            return _run(session, [student.graph.outputs[0].name or ""], feeds, name)[0]

        return run

    def behind(self, name: str, exit_: Array) -> dict[str, Array]:
        """The model's answers when the named neighbourhood's exit has these values, (samples, ...)."""
        if self.is_constant(self._exit_of(name)):
            return self.altered(name, lambda rows, start: exit_.astype(rows.dtype))
        return self.altered(name, lambda rows, start: exit_[self._numbers(start)].astype(rows.dtype))

    def altered(self, name: str, change: Change) -> dict[str, Array]:
        """The model's answers when the values at the named neighbourhood's exit are changed, batch by batch.

        Args:
            name: of a distillable neighbourhood.
            change: given the teacher's rows at the exit and the number of the first sample; called from several
                threads, in any order. Where the model fixes its batch, rows beyond the last sample repeat it.

        Raises:
            SliceError: what `change` raises, or the changed rows do not fit the rest of the model.
        """
        behind, exit_ = self._session_behind(name), self._exit_of(name)

        def run(start: int) -> dict[str, Array]:
            given = self._rows(exit_, start)
            rows = change(given, start)
            if rows.shape != given.shape:
                raise ParityError(f"{name}: expected {list(given.shape)} at its exit, found {list(rows.shape)}")
            found = {exit_: rows} if exit_ in self._outputs else {}
            if behind.session is not None:
                feeds = {value: rows if value == exit_ else self._rows(value, start) for value in behind.inputs}
                answers = _run(behind.session, behind.outputs, feeds, name)
                found |= dict(zip(behind.outputs, answers, strict=True))
            return found

        return self._gather(run)

    def measured(self, name: str, change: Change) -> tuple[dict[str, Array], float]:
        """As `altered`, and the NMSE that the change makes at the neighbourhood's exit.

        It is the one of trainings: squared error over the teacher's variance there (`ndonnx.distill.losses.nmse`).

        Raises:
            SliceError: as `altered`, or the exit has no sample axis.
        """
        variance = self.variance(name)
        errors: dict[int, float] = {}

        def run(rows: Array, start: int) -> Array:
            changed = change(rows.copy(), start)
            if changed.shape == rows.shape:
                count = min(len(rows), self.samples - start)
                errors[start] = float(np.sum(np.square(changed[:count].astype(np.float64) - rows[:count])))
            return changed

        outputs = self.altered(name, run)
        # Summed in the order of the samples, so that the pool' order leaves no trace in the last bits.
        error = sum(errors[start] for start in sorted(errors)) / max(1, self.exit(name).size)
        return outputs, nmse(error, variance)

    def variance(self, name: str) -> float:
        """Variance over samples at the named neighbourhood's exit, mean over its elements: the scale of the NMSE.

        Raises:
            TrainingError: the exit has no sample axis, or holds NaN or Inf.
        """
        if name not in self._variances:
            rows, exit_ = self.exit(name), self._exit_of(name)
            if self.is_constant(exit_):
                raise TrainingError(f"the teacher's activation '{exit_}' has no sample axis")
            if exit_ in self._store.nonfinite:
                raise TrainingError(f"the teacher's activation '{exit_}' holds NaN or Inf on this data")
            counts = [(start, min(self._batch, self.samples - start)) for start in self.starts()]
            mean = sum(self._rows(exit_, s)[:n].sum(axis=0, dtype=np.float64) for s, n in counts) / self.samples
            squares = sum(np.sum(np.square(self._rows(exit_, s)[:n] - mean)) for s, n in counts)
            self._variances[name] = float(squares / rows.size)
        return self._variances[name]

    def whole(
        self,
        model: ir.Model | ort.InferenceSession,
        more: Callable[[int, int], Mapping[str, Array]] = lambda start, count: {},
    ) -> dict[str, Array]:
        """TeacherOutputs of another whole model with the teacher's inputs and outputs, on the same samples.

        Args:
            model: a spliced student, or the teacher with further inputs; as a session where it is run often.
            more: given the number of a batch's first sample and of its rows, what goes into the further inputs.

        Raises:
            ModelError: onnxruntime refuses the model.
        """
        if isinstance(model, ir.Model):
            session = make_session(self.parts.interface.applied(model), threads=1, spin=False)
        else:
            session = model

        def run(start: int) -> dict[str, Array]:
            feeds = {name: self._rows(name, start) for name in self._cuts.inputs}
            feeds |= more(start, len(self._numbers(start)))
            try:
                return dict(zip(self._outputs, session.run(self._outputs, feeds), strict=True))
            except OrtError as error:
                raise ModelError(f"onnxruntime failed on the changed model: {first_line(error)}") from error

        return self._gather(run)

    def close(self) -> None:
        """Close the sessions and delete what was captured."""
        self._sessions.clear()
        self._store.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def starts(self) -> range:
        """Numbers of the first samples of the batches in which everything is run."""
        return range(0, self.samples, self._batch)

    def _exit_of(self, name: str) -> str:
        exit_ = self._by_name[name].exit
        assert exit_ is not None
        return exit_.name or ""

    def _rows_at_once(self, names: Sequence[str], batches: Batches) -> int:
        few = {name: rows[:_FEW] for name, rows in next(iter(batches())).items()}
        return rows_at_once(self.parts.model, names, few, _BATCH)

    def _sample_bytes(self, names: Sequence[str], batches: Batches) -> int:
        try:
            return capture_bytes(self.parts.model, names, 1, np.float32)
        except ModelError:  # a shape is not in the graph: run one batch and look
            return capture_bytes(self.parts.model, names, 1, np.float32, batch=next(iter(batches())))

    def _session_behind(self, name: str) -> _Behind:
        if name in self._sessions:
            self._sessions.move_to_end(name)
            return self._sessions[name]
        made = self._make_behind(self._by_name[name])
        while self._sessions and sum(b.nbytes for b in self._sessions.values()) + made.nbytes > _SESSION_BYTES:
            self._sessions.popitem(last=False)
        self._sessions[name] = made
        return made

    def _make_behind(self, n: Neighbourhood) -> _Behind:
        after = self._cuts.after(n)
        wanted = [self._values[name] for name in self._outputs if self._values[name] in after]
        if not wanted:
            return _Behind(None, (), (), 0)
        assert n.exit is not None
        held = {
            name
            for name in self._store.names
            if self._values[name] not in after and self._values[name].type is not None
        }
        nodes, read = nodes_between(wanted, held | {n.exit.name or ""})
        model = extract(self.parts.model, nodes, read, wanted)
        inputs, outputs = (tuple(value.name or "" for value in values) for values in (read, wanted))
        tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
        nbytes = sum(tensor.nbytes for tensor in tensors)
        return _Behind(make_session(model, threads=1, spin=False), inputs, outputs, nbytes)

    def _numbers(self, start: int) -> npt.NDArray[np.int64]:
        """Numbers of the samples in a batch; where the model fixes its size, the last one comes several times."""
        stop = start + self._batch
        return np.minimum(np.arange(start, stop if self._padded else min(stop, self.samples)), self.samples - 1)

    def _rows(self, name: str, start: int) -> Array:
        if self.is_constant(name):
            return np.array(self.value(name))
        if name in self._store.unstorable:
            raise TrainingError(f"value '{name}' cannot be captured: {self._store.unstorable[name]}")
        # Opened for each batch: a graph may have more values than a process may have open files.
        return self._store.rows(name)[self._numbers(start)]

    def _gather(self, run: Callable[[int], dict[str, Array]]) -> dict[str, Array]:
        """All samples' answers; outputs that the run does not give are the teacher's."""
        with ThreadPoolExecutor(self._threads, thread_name_prefix="partial") as pool:
            parts = list(pool.map(run, self.starts()))
        answers = dict(self.outputs)
        for name in parts[0]:
            pieces = [part[name] for part in parts]
            answers[name] = pieces[0] if self.is_constant(name) else np.concatenate(pieces)[: self.samples]
        return answers


def _run(session: ort.InferenceSession, outputs: Sequence[str], feeds: Mapping[str, Array], name: str) -> list[Array]:
    try:
        answers: list[Array] = session.run(list(outputs), dict(feeds))
    except OrtError as error:
        raise ParityError(f"{name}: onnxruntime does not run the slice: {first_line(error)}") from error
    return answers
