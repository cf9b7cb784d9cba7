"""One sweep of the teacher: the wanted values of every sample go into an activation store.

The model is cut down to what the wanted values need, float32 values are halved by a `Cast`
inside the graph (numpy's own cast would cost more than the forward pass), and a second
thread checks, sums and writes a batch while onnxruntime computes the next one.

Three things are only known once the data have been through: that a value overflows half
precision, that rounding to it would take too much, and that a value has no sample axis. What the first
batch shows is mended at once; what shows later costs a further sweep for those values alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from ndonnx.errors import DataError, ModelError, first_line
from ndonnx.graph.interface import sample_axis, samples_first, set_sample_axis
from ndonnx.runtime.machine import usable_cores
from ndonnx.teacher.blocks import Array, is_finite
from ndonnx.teacher.sessions import OrtError, make_session
from ndonnx.teacher.sizes import Batch, BoundedBatches, find_values
from ndonnx.teacher.store import STORABLE, ActivationStore, StoreWriter

QUEUE_DEPTH = 1
"""Batches that may wait for the writer. A second one was 3% slower: its memory is cold again when written."""

_CAST_OPSET = 13
_PART_BYTES = 2**18
"""Bytes of a value that are looked at in one go."""
_HALVING_LOSS = 1e-5
"""Most that rounding to float16 may add to the NMSE of a value: far below what any student comes to. Values that vary
about as much as they are large lose 1e-7."""


@dataclass(frozen=True)
class CaptureSettings:
    """How a sweep computes and stores."""

    threads: int | None = None
    """Number of batches computed at a time, each by one thread; None takes all cores."""
    device: str = "cpu"
    """`cpu` or `cuda`."""
    half: bool = True
    """Whether float32 values are stored as float16 where they lose nothing that matters."""


def capture(
    model: ir.Model,
    values: Sequence[str],
    batches: Callable[[], Iterable[Batch]],
    directory: Path,
    *,
    samples: int,
    settings: CaptureSettings | None = None,
    on_batch: Callable[[int], None] = lambda count: None,
) -> ActivationStore:
    """Run the teacher over `samples` samples and store the wanted values.

    float32 values are stored as float16 where they lose nothing that matters, everything else in its own type, and
    graph inputs as they come. A value without a sample axis that is the same in all batches
    is stored once (`store.is_constant`). What cannot be stored is named in `store.unstorable`
    and does not stop the sweep; nor does an Inf or a NaN, which `store.nonfinite` records.

    Args:
        model: the teacher; not changed.
        values: names of graph inputs, inner values or outputs of the main graph.
        batches: called for each sweep, must give the same batches again: arrays by input
            name, the first axis the sample, wherever the model has it (`ndonnx.graph.interface`).
            Batches of 64 are fastest for small images; larger ones are split where their activations would
            take much memory and the model takes any number. Rows beyond `samples` are not stored, so a fixed
            batch size may overshoot.
        directory: where the store goes; an older store there is replaced.
        samples: how many samples are stored.
        settings: how the sweep computes and stores; None: all cores, halves.
        on_batch: told the number of samples of every batch of the first sweep.

    Raises:
        ModelError: a value is not in the graph, or onnxruntime refuses the model.
        DataError: the batches do not fit the model's inputs, or end too early.
        RunDirError: the disk is full or cannot be written.
    """
    names = tuple(dict.fromkeys(values))
    settings = settings or CaptureSettings()
    halved = _float_values(model, names) if settings.half else set()
    split = BoundedBatches.of(model, names, batches)
    writer = StoreWriter(directory, samples)
    sweep = _Sweep(writer, samples)
    try:
        while names:
            if halved.intersection(names):
                halved -= _spoilt(
                    _Tap(model, names, (), threads=settings.threads, device=settings.device), halved, split()
                )
            tap = _Tap(model, names, halved, threads=settings.threads, device=settings.device)
            again = sweep.run(tap, split(), on_batch)
            halved -= sweep.wide
            names = tuple(name for name in names if name in again)
            on_batch = _silent
        return writer.finish(sweep.unstorable)
    except BaseException:
        writer.discard()
        raise


def input_type(value: ir.Value, stored: Array) -> np.dtype[Any]:
    """The element type in which a stored value is fed to a model.

    Args:
        value: the model's input; where its type is unknown, halves stand for float32.
        stored: the value as a store holds it.
    """
    if value.dtype is not None and value.dtype.is_floating_point():
        return np.dtype(value.dtype.numpy())
    return np.dtype(np.float32) if stored.dtype == np.float16 else stored.dtype


class _Tap:
    """The model cut down to the wanted values: one batch in, the values by name out."""

    def __init__(
        self, model: ir.Model, names: Collection[str], halved: Collection[str], *, threads: int | None, device: str
    ) -> None:
        inputs = [value.name or "" for value in model.graph.inputs if value.name not in model.graph.initializers]
        self.halved = frozenset(halved).intersection(names)
        self._graph = model.graph.name or ""
        self._inputs = inputs
        self._copied = [name for name in names if name in inputs]
        self._computed = [name for name in names if name not in inputs]
        # On a CPU one batch a core, each by one thread, keeps the cores busy without their waiting
        # for each other inside every operator, as the threads of one session do beside a writer.
        self.pool = 1 if device != "cpu" else threads or usable_cores()
        inside = 1 if device == "cpu" else threads
        self.session = (
            make_session(_cut(model, self._computed, self.halved), threads=inside, device=device, spin=False)
            if self._computed
            else None
        )

    def count(self, batch: Batch) -> int:
        """Samples in the batch: the first axis of the first input that has one."""
        for name in self._inputs:
            if name not in batch:
                raise DataError(f"a batch has no array for the model's input '{name}', only {', '.join(batch)}")
        for name in self._inputs:
            if batch[name].ndim:
                return len(batch[name])
        raise DataError("no input of the model has an axis, so samples cannot be counted")

    def run(self, batch: Batch, at: int) -> dict[str, object]:
        """The wanted values of a batch whose first sample is number `at`."""
        values: dict[str, object] = {name: batch[name] for name in self._copied}
        if self.session is not None:
            try:
                outputs = self.session.run(None, {name: batch[name] for name in self._inputs})
            except ort_errors.InvalidArgument as error:
                raise DataError(
                    f"the batch at sample {at} does not fit the model's inputs: {first_line(error)}"
                ) from error
            except OrtError as error:
                raise ModelError(
                    f"graph '{self._graph}': onnxruntime failed on the batch at sample {at}: {first_line(error)}"
                ) from error
            values |= dict(zip(self._computed, outputs, strict=True))
        return values


@dataclass(frozen=True)
class _Running:
    """A batch on its way through the teacher."""

    values: Future[dict[str, object]]
    rows: int
    taken: int


class _Sweep:
    """Runs a tap over the batches, as many at a time as it has pool, and stores what comes out in order.

    Attributes:
        unstorable: values given up, with the reason.
        wide: values that overflowed float16 and have to be captured once more as float32.
        fixed: values that turned out to have no sample axis after some batches were stored.
    """

    def __init__(self, writer: StoreWriter, samples: int) -> None:
        self.unstorable: dict[str, str] = {}
        self.wide: set[str] = set()
        self.fixed: set[str] = set()
        self._writer = writer
        self._samples = samples
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._constants: dict[str, Array] = {}

    def run(self, tap: _Tap, batches: Iterable[Batch], on_batch: Callable[[int], None]) -> set[str]:
        """One pass over the batches; returns the values that need another one."""
        again: set[str] = set()
        waiting: deque[Future[None]] = deque()
        done = 0
        with (
            ThreadPoolExecutor(tap.pool, thread_name_prefix="teacher") as teacher,
            ThreadPoolExecutor(1, thread_name_prefix="store") as store,
        ):

            def keep(running: _Running) -> None:
                values = running.values.result()
                while len(waiting) >= QUEUE_DEPTH:
                    waiting.popleft().result()
                waiting.append(store.submit(self._store_batch, values, running.rows, running.taken, tap.halved, again))
                on_batch(running.taken)

            ahead: deque[_Running] = deque()
            for given in batches:
                # A source may fill the same arrays again while they are still read.
                batch = {name: np.array(array) for name, array in given.items()}
                rows = tap.count(batch)
                taken = min(rows, self._samples - done)
                ahead.append(_Running(teacher.submit(tap.run, batch, done), rows, taken))
                done += taken
                if done == self._samples:
                    break
                if len(ahead) > tap.pool:
                    keep(ahead.popleft())
            while ahead:
                keep(ahead.popleft())
            for future in waiting:
                future.result()
        if done < self._samples:
            raise DataError(f"the data source ended after {done} of {self._samples} samples")
        return again

    def _store_batch(
        self, values: dict[str, object], rows: int, taken: int, halved: frozenset[str], again: set[str]
    ) -> None:
        for name, value in values.items():
            if name in again or name in self.unstorable:
                continue
            if not isinstance(value, np.ndarray) or value.dtype.name not in STORABLE or not value.size:
                self._give_up(name, f"it is {_describe(value)}, not an array of numbers")
            elif name in self._constants or name in self.fixed or not _has_rows(value, rows):
                self._store_constant(name, value, again)
            else:
                self._store_rows(name, value, taken, halved, again)

    def _store_constant(self, name: str, value: Array, again: set[str]) -> None:
        if name in self._shapes:
            # Its first axis was as long as the first batches only by chance.
            self._forget(name)
            self.fixed.add(name)
            again.add(name)
        elif name not in self._constants:
            self._constants[name] = value
            self._writer.add_constant(name, value)
        elif not _same(self._constants[name], value):
            del self._constants[name]
            self._writer.drop(name)
            self.unstorable[name] = f"its shape {value.shape} has no sample axis, and it differs between batches"

    def _store_rows(self, name: str, value: Array, taken: int, halved: frozenset[str], again: set[str]) -> None:
        if name not in self._shapes:
            self._shapes[name] = value.shape[1:]
            self._writer.add(name, value.dtype, value.shape[1:])
        elif self._shapes[name] != value.shape[1:]:
            before = self._shapes[name]
            self._give_up(name, f"its shape per sample changes between batches: {before}, then {value.shape[1:]}")
            return
        finite = self._writer.append(name, value[:taken])
        if not finite and name in halved:
            self._forget(name)
            self.wide.add(name)
            again.add(name)

    def _give_up(self, name: str, reason: str) -> None:
        if name in self._shapes or name in self._constants:
            self._forget(name)
        self.unstorable[name] = reason

    def _forget(self, name: str) -> None:
        self._shapes.pop(name, None)
        self._constants.pop(name, None)
        self._writer.drop(name)


def _silent(count: int) -> None:
    """Tells nothing: a further sweep does not advance the count of samples."""


def _spoilt(tap: _Tap, names: Collection[str], batches: Iterable[Batch]) -> set[str]:
    """Which float32 values of a tap would lose too much as float16, by the first batch."""
    for batch in batches:
        tap.count(batch)
        values = tap.run(batch, 0).items()
        return {
            name
            for name, value in values
            if name in names and isinstance(value, np.ndarray) and not _bears_halving(value)
        }
    return set()


def _bears_halving(values: Array) -> bool:
    """Whether rounding to float16 takes little of what float32 values tell: of how they vary over the samples.

    None overflows, and they are neither so small nor so much alike that their differences are rounded away. What does
    not vary at all in these samples is no evidence.
    """
    if not values.size:
        return True
    rows = values if values.ndim > 1 else values.reshape(1, -1)
    mean = rows.mean(axis=0, dtype=np.float64) if len(rows) > 1 else rows.mean(dtype=np.float64)
    step = max(1, _PART_BYTES // max(1, rows[0].nbytes))
    error = spread = 0.0
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        with np.errstate(over="ignore", invalid="ignore"):
            halves = part.astype(np.float16)
        if not is_finite(halves):
            return False
        error += float(np.square(part - halves, dtype=np.float64).sum())
        spread += float(np.square(part - mean).sum())
    return spread > 0 and error <= _HALVING_LOSS * spread


def _cut(model: ir.Model, names: Sequence[str], halved: Collection[str]) -> ir.Model:
    """A copy of the model whose outputs are exactly the named values, samples first, some cast to float16."""
    copy = model.clone()
    values = find_values(copy, names)
    taken = {value.name for node in copy.graph.all_nodes() for value in node.outputs}
    taken.update(copy.graph.initializers, (value.name for value in copy.graph.inputs))
    outputs = []
    for name, value in values.items():
        if name not in halved:
            outputs.append(value)
            continue
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT16})
        cast.outputs[0].name = _fresh(f"{name}/half", taken)
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT16), value.shape
        set_sample_axis(cast.outputs[0], sample_axis(value))
        copy.graph.append(cast)
        outputs.append(cast.outputs[0])
    copy.graph.outputs[:] = outputs
    copy.graph.opset_imports.setdefault("", _CAST_OPSET)
    RemoveUnusedNodesPass()(copy)
    return samples_first(copy)


def _fresh(name: str, taken: set[str | None]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _float_values(model: ir.Model, names: Collection[str]) -> set[str]:
    """The wanted float32 values that are computed; where the graph tells no type, onnxruntime does."""
    found = find_values(model, names)
    computed = {name: value for name, value in found.items() if value not in model.graph.inputs}
    floats = {name for name, value in computed.items() if value.type == ir.TensorType(ir.DataType.FLOAT)}
    untyped = [name for name, value in computed.items() if value.type is None]
    if untyped:
        session = make_session(_cut(model, untyped, ()), threads=1, optimise=False)
        floats |= {node.name for node in session.get_outputs() if node.type == "tensor(float)"}
    return floats


def _has_rows(value: Array, rows: int) -> bool:
    return value.ndim > 0 and len(value) == rows


def _same(one: Array, other: Array) -> bool:
    return one.shape == other.shape and np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(other).tobytes()


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype.name}{value.shape}"
    return type(value).__name__
