"""No data at all: noise at each neighbourhood's input, and the slice's own answer to it (the paper's section 6).

A store filled here takes the place of captured activations. What is drawn can be more than
plain Gaussian noise: rectified where a ReLU makes the entry, and with a mean and a deviation of
its own in every channel, which `moments.entry_noise` finds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ndonnx.errors import SliceError
from ndonnx.teacher.capture import CaptureSettings, capture
from ndonnx.teacher.rectified import rectified_parameters
from ndonnx.teacher.store import ActivationStore

NoiseKind = Literal["white", "rectified"]
Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float32]
Draw = Callable[[np.random.Generator, int], Array]

BATCH = 64
"""Samples drawn at a time, where the model leaves that open."""
_MOST_VALUES = 2**28
"""Values in one sample of an entry; more is a damaged or hostile model."""


@dataclass(frozen=True, eq=False)
class ChannelMoments:
    """What noise at a value has to look like, channel by channel; after the ReLU where there is one."""

    mean: Vector
    """(channels,)."""
    std: Vector
    """(channels,), not negative."""
    axis: int = 1
    """Where the value has its channels."""


@dataclass(frozen=True)
class EntryNoise:
    """How one neighbourhood's noise is drawn."""

    kind: NoiseKind
    moments: ChannelMoments | None
    """None: standard normal, which is rectified afterwards where `kind` says so."""


def noise_store(
    slice_model: ir.Model,
    directory: Path,
    samples: int,
    seed: int,
    kind: NoiseKind = "white",
    moments: ChannelMoments | None = None,
    *,
    threads: int | None = None,
) -> ActivationStore:
    """Fill an activation store for one neighbourhood without any data.

    The store holds the slice's input and output under their names, as `capture` would: float32 as
    float16 where that is enough. The output is what onnxruntime answers to exactly the input that is stored.

    Args:
        slice_model: the neighbourhood as `Partition.slice_of` gives it: one floating input, one output.
        directory: where the store goes; an older store there is replaced.
        samples: how many.
        seed: equal seeds draw equal noise.
        kind: `white`, or `rectified` where a ReLU makes the input in the teacher (`noise_kind`).
        moments: of the input in every channel. None: standard normal.
        threads: batches computed at a time; None takes all cores.

    Raises:
        SliceError: the slice reads context beside its input, or its input is no float of known size.
        ModelError: onnxruntime refuses the slice.
        RunDirError: the disk is full or cannot be written.
    """
    entry = _only_input(slice_model)
    draw = drawer(entry, EntryNoise(kind, moments))
    model, fed = _fed_in_half(slice_model) if entry.dtype == ir.DataType.FLOAT else (slice_model, entry)
    dtype, size = numpy_type(fed), fixed_batch(entry) or BATCH

    def batches() -> Iterator[dict[str, Array]]:
        for start in range(0, samples, size):
            yield {fed.name or "": draw(np.random.default_rng((seed, start)), size).astype(dtype)}

    names = [entry.name or "", slice_model.graph.outputs[0].name or ""]
    return capture(model, names, batches, directory, samples=samples, settings=CaptureSettings(threads=threads))


def drawer(entry: ir.Value, noise: EntryNoise) -> Draw:
    """A function that draws so many samples of a value: float32 (n, ...).

    Raises:
        SliceError: the value is no float of known size, or the moments are not for its channels.
    """
    shape = _sample_shape(entry)
    mean, std = np.zeros((), np.float32), np.ones((), np.float32)
    if noise.moments is not None:
        mean, std = _along(entry, (1, *shape), noise.moments, noise.kind)

    def draw(rng: np.random.Generator, count: int) -> Array:
        values = rng.standard_normal((count, *shape), dtype=np.float32) * std + mean
        return np.maximum(values, 0, out=values) if noise.kind == "rectified" else values

    return draw


def _along(entry: ir.Value, shape: tuple[int, ...], moments: ChannelMoments, kind: NoiseKind) -> tuple[Array, Array]:
    """Mean and deviation of the normal to draw from, shaped to meet a value with one sample of this shape."""
    channels = shape[moments.axis] if 0 < moments.axis < len(shape) else 0
    if len(moments.mean) != channels or len(moments.std) != channels:
        raise SliceError(f"input '{entry.name}': {len(moments.mean)} moments given for {channels} channels")
    found: tuple[Array, Array] = (moments.mean, moments.std)
    if kind == "rectified":
        found = rectified_parameters(*found)
    along = [1] * len(shape)
    along[moments.axis] = channels
    mean, std = (array.astype(np.float32).reshape(along) for array in found)
    return mean, std


def _only_input(slice_model: ir.Model) -> ir.Value:
    inputs = slice_model.graph.inputs
    if len(inputs) != 1:
        others = ", ".join(f"'{value.name}'" for value in inputs[1:])
        raise SliceError(f"reads {others} beside its input '{inputs[0].name}', for which noise cannot stand; give data")
    return inputs[0]


def _sample_shape(entry: ir.Value) -> tuple[int, ...]:
    """Sizes without the sample axis.

    Raises:
        SliceError: it is no float, has no sample axis, or a size is open or absurd.
    """
    if entry.dtype is None or not entry.dtype.is_floating_point():
        raise SliceError(f"input '{entry.name}' is {entry.dtype}, for which noise cannot stand; give data")
    if entry.shape is None or not len(entry.shape):
        raise SliceError(f"input '{entry.name}': its shape is not known, so noise cannot stand for it; give data")
    sizes: list[int] = []
    for axis, size in enumerate(list(entry.shape)[1:], start=1):
        if not isinstance(size, int):
            raise SliceError(f"input '{entry.name}': dimension {axis} ({size}) is open; give data")
        sizes.append(size)
    if not 0 < math.prod(sizes) <= _MOST_VALUES:
        raise SliceError(f"input '{entry.name}': {math.prod(sizes):,} values a sample; expected 1 to {_MOST_VALUES:,}")
    return tuple(sizes)


def fixed_batch(entry: ir.Value) -> int | None:
    first = entry.shape[0] if entry.shape is not None and len(entry.shape) else None
    return first if isinstance(first, int) else None


def numpy_type(value: ir.Value) -> np.dtype[Any]:
    assert value.dtype is not None
    return np.dtype(value.dtype.numpy())


def _fed_in_half(slice_model: ir.Model) -> tuple[ir.Model, ir.Value]:
    """A copy that is fed float16, so that the input is stored at half its size and is still exactly what was run."""
    copy = slice_model.clone()
    graph = copy.graph
    old = graph.inputs[0]
    name = old.name or ""
    fed = ir.Value(name=f"{name}/half", type=ir.TensorType(ir.DataType.FLOAT16), shape=old.shape)
    cast = ir.node("Cast", [fed], {"to": ir.DataType.FLOAT})
    widened = cast.outputs[0]
    widened.type, widened.shape = old.type, old.shape
    old.replace_all_uses_with(widened)
    graph.inputs[0] = fed
    old.name, widened.name = None, name
    first = next(iter(graph), None)
    graph.append(cast) if first is None else graph.insert_before(first, cast)
    return copy, fed
