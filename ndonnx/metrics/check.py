"""Look before a run which neighbourhoods would pass the gates of a distillation: `ndonnx inspect --check`.

Every neighbourhood goes through what a distil job does before it trains: its slice is converted
and compared with onnxruntime on the teacher's own activations, shrunk, held against the teacher's
slice with the same channels zeroed, converted and compared again. One that does not pass is kept,
with the operator and the reason.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from ndonnx.config.inputs import InputRecipe
from ndonnx.config.recipe import Recipe
from ndonnx.data import Data, DataSource, InputSpec, input_specs, open_source
from ndonnx.data.inputs import interface_of, settle
from ndonnx.data.preprocess import resolve
from ndonnx.data.synthetic import made_up_samples
from ndonnx.distill.gate import check_answer, open_slice, pass_gate
from ndonnx.distill.samples import SliceSamples
from ndonnx.errors import ConversionError, DataError, ModelError, ParityError
from ndonnx.graph.dataflow import reads
from ndonnx.graph.interface import Interface
from ndonnx.graph.precision import in_float32, in_own_types, rounding_error
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.partition import ChannelGroups, Neighbourhood, Partition, extract
from ndonnx.partition.parts import boundary
from ndonnx.partition.removable import kept_width
from ndonnx.runtime.faults import Fault, tried
from ndonnx.runtime.machine import usable_cores
from ndonnx.runtime.progress import Progress, Silent
from ndonnx.students import TeacherSlice
from ndonnx.students.cutting import shrink
from ndonnx.students.zeroing import check_by_zeroing
from ndonnx.teacher import ActivationStore, capture, make_session
from ndonnx.teacher.synthetic_inputs import settings_for
from ndonnx.teacher.trying import held, hold_if_mixed, mixes

SAMPLES = 4
"""Samples on which everything is compared."""
_WAVE = 16
"""Neighbourhoods captured in one sweep: their activations lie on disk together."""
_HALF = 0.5
"""Part of the units that is kept where the recipe keeps all of them, which would check nothing."""
_MOST_NODES = 150
"""Nodes of a slice in which the guilty operator is still looked for: one conversion for each."""

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Given:
    """What a check runs on."""

    inputs: Sequence[InputSpec]
    """Arrays by input name that have a sample axis."""
    arrays: Arrays
    """A few samples of them, samples first."""
    interface: Interface
    """How the model is fed."""


@dataclass(frozen=True)
class Checked:
    """A partition of which every distillable neighbourhood has passed the gates."""

    parts: Partition
    parity: Mapping[str, float]
    """By name of the neighbourhood: largest error of its converted slices, relative to their output's scale."""


def check(
    model: Path,
    parts: Partition,
    recipe: Recipe,
    *,
    data: Data | None = None,
    progress: Progress | None = None,
    given: Given | None = None,
) -> Checked:
    """Take every distillable neighbourhood through the gates of a distil job.

    Args:
        model: the teacher's file.
        parts: its partition.
        recipe: `keep`, `round_to`, `parity`, `data` and `seed` are used.
        data: a data source, of which a few samples are read. None: inputs are made up.
        progress: told of every neighbourhood.
        given: what `few_samples` has read already. None: read now.

    Raises:
        DataError: the data do not fit the model, or it does not take made-up inputs.
    """
    progress = progress or Silent()
    given = given or few_samples(model, parts.model.graph, recipe, data)
    specs, samples = given.inputs, given.arrays
    progress.stage("check", len(parts.distillable), "neighbourhoods")
    parity: dict[str, float] = {}
    reasons: dict[str, str] = {}
    try:
        for start in range(0, len(parts.distillable), _WAVE):
            sweep = parts.distillable[start : start + _WAVE]
            with tempfile.TemporaryDirectory(prefix="ndonnx-", ignore_cleanup_errors=True) as folder:
                store = _captured(parts, sweep, samples, specs, Path(folder) / "store")
                for neighbourhood in sweep:
                    found = tried(partial(check_neighbourhood, parts, neighbourhood, store, recipe))
                    if isinstance(found, Fault):
                        reasons[neighbourhood.name] = found.reason
                    else:
                        parity[neighbourhood.name] = found
                    progress.advance()
    except (DataError, ModelError) as error:
        if data is not None:
            raise
        raise DataError(f"{model}: does not take made-up inputs; give --data SRC ({error})") from error
    return Checked(_without(parts, reasons), parity)


def check_neighbourhood(
    parts: Partition, neighbourhood: Neighbourhood, store: ActivationStore, recipe: Recipe
) -> float:
    """The largest relative error of the converted slice and of a shrunk one.

    Raises:
        SliceError: with the operator, where it can be told, and what is wrong.
    """
    assert neighbourhood.exit is not None
    own = infer_shapes(parts.slice_of(neighbourhood))
    model = in_float32(own)
    names = [value.name or "" for value in model.graph.inputs]
    target = neighbourhood.exit.name or ""
    samples = SliceSamples.of(store, names, [target], 0.5)
    constants = frozenset(name for name in names if samples.is_constant(name))
    captured = samples.arrays(0, store.samples)
    probe = {name: captured[name] for name in names}
    threads = usable_cores()
    sampled = [name for name in names if name not in constants]
    model = open_slice(model, sampled, probe, threads)
    try:
        _, error = pass_gate(model, probe, recipe.parity, threads, captured[target].shape, sampled)
    except (ConversionError, ParityError) as refused:
        where = guilty_operator(model, probe, recipe.parity)
        raise type(refused)(f"{where}: {refused}" if where else str(refused)) from refused
    groups = neighbourhood.groups
    if groups is None or not groups.groups:
        return error
    kept = any_units(groups, recipe.part_kept if recipe.part_kept < 1 else _HALF, recipe.round_to, recipe.seed)
    student = shrink(model, groups, kept)
    check_by_zeroing(TeacherSlice(neighbourhood.name, model, groups, probe, threads, constants), student, kept)
    module, shrunk = pass_gate(student, probe, recipe.parity, threads)
    again = in_own_types(student, own)
    check_answer(module, again, probe, max(recipe.parity, rounding_error(again)), threads)
    return max(error, shrunk)


def any_units(groups: ChannelGroups, keep: float, round_to: int | None, seed: int = 0) -> NDArray[np.bool_]:
    """Units to keep, drawn at random: ranking them takes longest, and any choice must pass."""
    rng = np.random.default_rng(seed)
    kept = np.zeros(groups.units, dtype=bool)
    for group in groups.groups:
        kept[group.start + rng.permutation(group.width)[: kept_width(group.width, keep, round_to)]] = True
    return kept


def guilty_operator(model: ir.Model, probe: Arrays, tolerance: float) -> str | None:
    """The first operator of a slice behind which torch and onnxruntime disagree; None where there is none alone."""
    nodes = list(model.graph)
    if len(nodes) > _MOST_NODES:
        return None
    for node in nodes:
        value = node.outputs[0]
        if value.dtype is not None and not value.dtype.is_floating_point():
            continue
        before = _needed(value)
        part = extract(model, [n for n in nodes if n in before], model.graph.inputs, [value])
        try:
            pass_gate(part, probe, tolerance)
        except (ConversionError, ParityError):
            return f"{node.op_type} '{value.name}'"
    return None


def _needed(value: ir.Value) -> set[ir.Node]:
    """The nodes that a value is computed by."""
    found: set[ir.Node] = set()
    stack = [value]
    while stack:
        node = stack.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            stack += reads(node)
    return found


def _without(parts: Partition, reasons: Mapping[str, str]) -> Partition:
    """The partition with these neighbourhoods kept, and those that would have the same student."""
    shared = {use.name: reasons[n.name] for n in parts.distillable if n.name in reasons for use in parts.uses(n)}
    reasons = shared | dict(reasons)
    return replace(
        parts,
        neighbourhoods=tuple(
            replace(n, reason=reasons[n.name]) if n.name in reasons else n for n in parts.neighbourhoods
        ),
    )


def few_samples(model: Path, graph: ir.Graph, recipe: Recipe, data: Data | None = None) -> Given:
    """A few samples for a model, as many as fill whole batches where it fixes their size.

    Args:
        model: its file.
        graph: of the same model.
        recipe: `[inputs]`, `[data]` and the seed.
        data: a data source. None: inputs are made up.

    Raises:
        DataError: the data do not fit the model, or no inputs could be made up.
    """
    if data is None:
        return _made_up(model, graph, recipe)
    source = source_for(model, graph, recipe, data)
    rows = _first(source, _count(source.inputs))
    return Given(source.inputs, rows, interface_of(source.inputs, source.fixed))


def _made_up(model: Path, graph: ir.Graph, recipe: Recipe) -> Given:
    session = make_session(model)
    settled, fixed = settle(input_specs(session), _settings(model, session, graph, recipe, None))
    inputs = tuple(resolve(settled, recipe.data))
    pair = made_up_samples(inputs, graph, recipe.data, 2, seed=recipe.seed)
    if _batch_size(inputs) is None and mixes(session, interface_of(inputs, fixed), pair):
        inputs = held(inputs)
    arrays = made_up_samples(inputs, graph, recipe.data, _count(inputs), seed=recipe.seed)
    return Given(inputs, arrays, interface_of(inputs, fixed))


def source_for(model: Path, graph: ir.Graph, recipe: Recipe, data: Data) -> DataSource:
    """The user's data, opened for a model; one sample at a time where the model mixes those of a batch.

    Args:
        model: its file.
        graph: of the same model.
        recipe: `[inputs]`, `[data]` and the seed.
        data: a data source.

    Raises:
        DataError: the data do not fit the model.
    """
    session = make_session(model)
    settings, specs = _settings(model, session, graph, recipe, data), input_specs(session)
    source = open_source(data, specs, recipe.data, seed=recipe.seed, graph=graph, settings=settings)
    hold_if_mixed(session, source)
    return source


def _settings(
    model: Path, session: ort.InferenceSession, graph: ir.Graph, recipe: Recipe, data: Data | None
) -> dict[str, InputRecipe]:
    try:
        return settings_for(data, session, graph, recipe)
    except DataError as error:
        raise DataError(f"{model}: does not take made-up inputs: {error}") from error


def _count(inputs: Sequence[InputSpec]) -> int:
    count = _batch_size(inputs) or SAMPLES
    return count * -(-SAMPLES // count)


def _first(source: DataSource, count: int) -> Arrays:
    """The first samples of a source, the last one repeated where there are too few."""
    batches = [batch.inputs for batch in source.batches(count, samples=count)]
    if not batches:
        raise DataError(f"{source.spec}: holds no samples")
    rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    return {
        name: np.concatenate([found, np.repeat(found[-1:], count - len(found), axis=0)]) for name, found in rows.items()
    }


def _batch_size(specs: Sequence[InputSpec]) -> int | None:
    return next((spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], int)), None)


def _batches(samples: Arrays, specs: Sequence[InputSpec]) -> Iterator[Arrays]:
    count = len(next(iter(samples.values())))
    size = _batch_size(specs) or count
    for start in range(0, count, size):
        yield {name: rows[start : start + size] for name, rows in samples.items()}


def _captured(
    parts: Partition, sweep: Sequence[Neighbourhood], samples: Arrays, specs: Sequence[InputSpec], folder: Path
) -> ActivationStore:
    count = len(next(iter(samples.values())))
    return capture(parts.model, boundary(sweep), lambda: _batches(samples, specs), folder, samples=count)
