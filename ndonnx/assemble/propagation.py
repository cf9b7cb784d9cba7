"""Down the chain in order: what every neighbourhood gets when those before it are students.

Neighbourhoods are trained apart from each other, on the teacher's activations. Here the student
is walked through once, neighbourhood after neighbourhood, with only the values in hand that
something further on still reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ndonnx.errors import DataError, ModelError, ShrinkError, TrainingError
from ndonnx.graph.dataflow import real_inputs
from ndonnx.graph.precision import in_float32, in_own_types
from ndonnx.graph.working_copy import batch_size
from ndonnx.partition import Neighbourhood, Partition, extract, nodes_between
from ndonnx.runtime.faults import Fault, tried
from ndonnx.students.last_layer import reconstruct_last_layer
from ndonnx.teacher import ActivationStore, capture, input_type
from ndonnx.teacher.stored_rows import StoredRows

Batches = Callable[[], Iterator[Mapping[str, npt.NDArray[np.generic]]]]

_BATCH = 64


class Prefix:
    """The values in front of the next neighbourhood, in a teacher some of whose slices are replaced.

    Give every neighbourhood in the partition's order: `inputs_of` it, then `put` the slice that
    stands in its place, or `leave` it to the teacher. What nothing further on reads is dropped from the disk.
    """

    def __init__(
        self, parts: Partition, order: Sequence[Neighbourhood], batches: Batches, folder: Path, samples: int
    ) -> None:
        """Begin with the model's inputs.

        Args:
            parts: the teacher.
            order: neighbourhoods that will be put, in topological order.
            batches: the data, by the names of the model's inputs; the same on every call.
            folder: where values are kept meanwhile.
            samples: how many.
        """
        self._parts = parts
        self._folder = folder
        self._samples = samples
        self._stores: dict[str, ActivationStore] = {}
        self._count = 0
        inputs = real_inputs(parts.model.graph)
        names = [value.name or "" for value in inputs]
        self._batch = batch_size(parts.model.graph) or _BATCH
        self._keep(capture(parts.model, names, batches, self._next_folder(), samples=samples))
        self._values = ir.convenience.create_value_mapping(parts.model.graph, include_subgraphs=False)
        self._left = list(order)
        self._last_reader = _last_readers(parts, self._left, set(self._stores))

    def inputs_of(self, neighbourhood: Neighbourhood) -> dict[str, ActivationStore]:
        """The store of each of a neighbourhood's inputs: entry and context."""
        wanted = _inputs(neighbourhood)
        missing = [name for name in wanted if name not in self._stores]
        if missing:
            nodes, held = nodes_between([self._values[name] for name in missing], set(self._stores))
            model = extract(self._parts.model, nodes, held, [self._values[name] for name in missing])
            self._keep(self._run(model, missing))
        return {name: self._stores[name] for name in wanted}

    def put(self, neighbourhood: Neighbourhood, slice_: ir.Model) -> None:
        """Go on behind a neighbourhood in whose place this slice stands."""
        self.inputs_of(neighbourhood)
        assert neighbourhood.exit is not None
        self._keep(self._run(slice_, [neighbourhood.exit.name or ""]))
        self._pass(neighbourhood)

    def leave(self, neighbourhood: Neighbourhood) -> None:
        """Go on behind a neighbourhood that stays the teacher's: its nodes are run when something behind it is read."""
        position = self._left.index(neighbourhood)
        self._last_reader = _last_readers(self._parts, self._left[position + 1 :], set(self._stores))
        self._pass(neighbourhood)

    def _pass(self, neighbourhood: Neighbourhood) -> None:
        """Drop what only neighbourhoods up to this one read."""
        del self._left[: self._left.index(neighbourhood) + 1]
        ahead = {n.name for n in self._left}
        for name in [name for name in self._stores if self._last_reader.get(name) not in ahead]:
            self._stores.pop(name).drop(name)

    def close(self) -> None:
        """Drop everything."""
        for name, store in self._stores.items():
            store.drop(name)
        self._stores.clear()

    def _run(self, model: ir.Model, names: list[str]) -> ActivationStore:
        inputs = list(model.graph.inputs)

        def batches() -> Iterator[Mapping[str, npt.NDArray[np.generic]]]:
            for start in range(0, self._samples, self._batch):
                yield {value.name or "": self._rows(value, start) for value in inputs}

        try:
            store = capture(model, names, batches, self._next_folder(), samples=self._samples)
        except (DataError, ModelError) as error:
            raise TrainingError(f"'{names[0]}' cannot be computed behind the students before it: {error}") from error
        for name in names:
            if name in store.unstorable:
                reason = store.unstorable[name]
                store.remove()
                raise TrainingError(f"value '{name}' cannot be captured: {reason}")
        return store

    def _rows(self, value: ir.Value, start: int) -> npt.NDArray[np.generic]:
        """A whole batch, the last one filled up with its last sample; a constant as it is. In the model's type."""
        name = value.name or ""
        store = self._stores[name]
        if store.is_constant(name):
            array = store.array(name)
        else:
            array = store.rows(name)[np.minimum(np.arange(start, start + self._batch), self._samples - 1)]
        return np.array(array, dtype=input_type(value, array))

    def _keep(self, store: ActivationStore) -> None:
        self._stores.update(dict.fromkeys(store.names, store))

    def _next_folder(self) -> Path:
        self._count += 1
        return self._folder / f"{self._count:04}"


def reconstruct_in_order(
    parts: Partition,
    students: Mapping[str, ir.Model],
    batches: Batches,
    folder: Path,
    samples: int,
    *,
    threads: int,
    on_end: Callable[[str, bool | Fault], None] = lambda name, refitted: None,
) -> dict[str, ir.Model]:
    """Walk down the student once and refit the last linear operator of each slice on what it really gets.

    Args:
        parts: the teacher.
        students: by the name of the neighbourhood; not changed.
        batches: unlabelled inputs by name; the same on every call.
        folder: for values in between.
        samples: how many of them.
        threads: for onnxruntime.
        on_end: told the name of each, and whether its student was refitted; before that, where there is one, the fault
            for which it stays as it was trained, or for which those behind it see the teacher's slice instead.

    Returns:
        All students, refitted where that lowers the error at the neighbourhood's exit.

    """
    order = [n for n in parts.neighbourhoods if n.name in students]
    theirs = Prefix(parts, order, batches, folder / "teacher", samples)
    ours = Prefix(parts, order, batches, folder / "student", samples)
    done: dict[str, ir.Model] = {}
    for neighbourhood in order:
        name, slice_, student = neighbourhood.name, parts.slice_of(neighbourhood), students[neighbourhood.name]
        refitted = None
        if len(parts.uses(neighbourhood)) == 1:  # one student of several places would become several
            found = tried(partial(_refitted, neighbourhood, slice_, student, theirs, ours, threads))
            if isinstance(found, Fault):  # the student then stays as it was trained, which is no worse than before
                on_end(name, found)
            else:
                refitted = found
        done[name] = refitted or student
        for prefix, model in ((theirs, slice_), (ours, done[name])):
            fault = tried(partial(prefix.put, neighbourhood, model))
            if fault is not None:
                on_end(name, fault)
                prefix.leave(neighbourhood)
        on_end(name, refitted is not None)
    theirs.close()
    ours.close()
    return done


def _refitted(
    neighbourhood: Neighbourhood, slice_: ir.Model, student: ir.Model, theirs: Prefix, ours: Prefix, threads: int
) -> ir.Model | None:
    """The student, fitted to what the teacher makes of its own values; None where that does not lower its error."""
    given, found = (_arrays(prefix.inputs_of(neighbourhood)) for prefix in (theirs, ours))
    constants = frozenset(name for name, store in ours.inputs_of(neighbourhood).items() if store.is_constant(name))
    theirs32, ours32 = in_float32(slice_), in_float32(student)
    held = neighbourhood.held
    try:
        refitted = reconstruct_last_layer(
            theirs32, ours32, given, found, constants=constants, threads=threads, held=held
        )
    except ShrinkError:  # there is nothing to refit
        return None
    return None if refitted is None else in_own_types(refitted, slice_)


def _arrays(stores: Mapping[str, ActivationStore]) -> dict[str, npt.NDArray[np.generic] | StoredRows]:
    return {name: store.array(name) if store.is_constant(name) else store.rows(name) for name, store in stores.items()}


def _inputs(neighbourhood: Neighbourhood) -> list[str]:
    assert neighbourhood.entry is not None
    return [value.name or "" for value in (neighbourhood.entry, *neighbourhood.context)]


def held_values(parts: Partition, order: Sequence[Neighbourhood]) -> list[set[str]]:
    """Names of the values that a `Prefix` holds while it goes past each neighbourhood."""
    held = {value.name or "" for value in real_inputs(parts.model.graph)}
    last, position = _last_readers(parts, order, set(held)), {n.name: at for at, n in enumerate(order)}
    found = []
    for at, neighbourhood in enumerate(order):
        assert neighbourhood.exit is not None
        found.append(held | {*_inputs(neighbourhood), neighbourhood.exit.name or ""})
        held = {name for name in found[-1] if name in last and position[last[name]] > at}
    return found


def _last_readers(parts: Partition, order: Sequence[Neighbourhood], held: set[str]) -> dict[str, str]:
    """By value, the last neighbourhood of an order that reads it, when these values are held in front of the first."""
    values = ir.convenience.create_value_mapping(parts.model.graph, include_subgraphs=False)
    last: dict[str, str] = {}
    for neighbourhood in order:
        wanted = _inputs(neighbourhood)
        _, read = nodes_between([values[name] for name in wanted if name not in held], held)
        last.update(dict.fromkeys((*wanted, *(value.name or "" for value in read)), neighbourhood.name))
        held.update(wanted)
        assert neighbourhood.exit is not None
        held.add(neighbourhood.exit.name or "")
    return last
