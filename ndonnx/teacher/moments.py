"""How noise at each neighbourhood's input has to look: mean and deviation of every channel, without any data.

Behind a BatchNormalization its parameters tell. Elsewhere the moments are carried down the teacher: each
slice is run on noise that is like its predecessor's answer to noise, from the model's inputs on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ndonnx.errors import SliceError, first_line
from ndonnx.graph.costs import constant_of
from ndonnx.graph.dataflow import reads
from ndonnx.partition import Partition, extract
from ndonnx.teacher.noise import (
    BATCH,
    ChannelMoments,
    EntryNoise,
    NoiseKind,
    drawer,
    fixed_batch,
    numpy_type,
)
from ndonnx.teacher.rectified import rectified_moments
from ndonnx.teacher.sessions import REFUSALS, make_session

Array = npt.NDArray[Any]

CARRIED = 512
"""Samples on which moments are measured: with one pixel a channel their error is still under 5%."""

_PASSING_OPS = {"Dropout", "Identity"}
_SPATIAL_OPS = {
    "AveragePool", "BatchNormalization", "Conv", "ConvTranspose", "GlobalAveragePool", "GlobalMaxPool",
    "GroupNormalization", "InstanceNormalization", "MaxPool",
}  # fmt: skip
"""Operators whose channels are on axis 1; elsewhere they are on the last axis."""

_STANDARD = EntryNoise("white", None)


def entry_noise(
    parts: Partition, *, carry: bool = True, samples: int = CARRIED, seed: int = 0, threads: int | None = None
) -> dict[str, EntryNoise]:
    """How to draw the noise of every distillable neighbourhood that noise can stand for, by name.

    Moments come from the BatchNormalization that makes the entry (through a ReLU) where there is
    one. Otherwise, with `carry`, they are measured: the teacher's own nodes between the exits of earlier
    neighbourhoods and this entry are run on noise that is drawn as those exits looked when their
    slices were run on their own noise. The model's inputs are standard normal.

    A neighbourhood is left out where the way to it holds anything that noise cannot stand for: whole numbers,
    sizes that the model leaves open. `noise_store` tells the reason.

    Args:
        parts: the teacher.
        carry: False: no moments where no BatchNormalization holds them.
        samples: on which moments are measured.
        seed: of those samples.
        threads: for onnxruntime; None takes the cores of the process's affinity.
    """
    carrier = _Carrier(parts, samples, seed, threads)
    found: dict[str, EntryNoise] = {}
    for neighbourhood in parts.distillable:
        entry = neighbourhood.entry
        assert entry is not None and neighbourhood.exit is not None
        moments = batchnorm_moments(entry)
        try:
            if moments is None and carry:
                moments = carrier.measure(entry)
            noise = EntryNoise(noise_kind(entry), moments)
            if carry:
                carrier.hold(entry, noise)
                exit_ = neighbourhood.exit
                carrier.hold(exit_, EntryNoise(noise_kind(exit_), batchnorm_moments(exit_) or carrier.measure(exit_)))
        except SliceError:
            continue
        found[neighbourhood.name] = noise
    return found


def batchnorm_moments(value: ir.Value) -> ChannelMoments | None:
    """Moments that a BatchNormalization right in front of a value, or of the ReLU that makes it, holds.

    Behind its statistics a channel is normal with mean `bias` and deviation `|scale|`; a ReLU cuts that off at 0.
    """
    producer = _made_by(value)
    rectified = producer is not None and producer.op_type == "Relu"
    if rectified and producer is not None and producer.inputs[0] is not None:
        producer = _made_by(producer.inputs[0])
    if producer is None or producer.op_type != "BatchNormalization" or len(producer.inputs) < 3:
        return None
    scale, bias = constant_of(producer.inputs[1]), constant_of(producer.inputs[2])
    if scale is None or bias is None:
        return None
    mean, std = (np.asarray(tensor.numpy(), dtype=np.float64) for tensor in (bias, scale))
    if rectified:
        return _moments(*rectified_moments(mean, np.abs(std)))
    return _moments(mean, np.abs(std))


def noise_kind(entry: ir.Value) -> NoiseKind:
    """What suits a value of the teacher: `rectified` where a ReLU makes it."""
    producer = _made_by(entry)
    return "rectified" if producer is not None and producer.op_type == "Relu" else "white"


class _Carrier:
    """Values whose noise is known, and the measuring of further ones behind them."""

    def __init__(self, parts: Partition, samples: int, seed: int, threads: int | None) -> None:
        self._parts = parts
        self._threads = threads
        self._samples = samples
        self._seed = seed
        self._held: dict[ir.Value, EntryNoise] = {}

    def hold(self, value: ir.Value, noise: EntryNoise) -> None:
        self._held[value] = noise

    def measure(self, value: ir.Value) -> ChannelMoments | None:
        """Moments of a value on noise at the nearest values that are held; None for an input of the model."""
        if value.producer() is None:
            return None
        if value in self._held:
            return self._held[value].moments
        nodes, given = self._behind(value)
        model = extract(self._parts.model, nodes, given, [value])
        sizes = {size for entry in given if (size := fixed_batch(entry)) is not None}
        size = sizes.pop() if sizes else BATCH
        draws = {entry: drawer(entry, self._held.get(entry, _STANDARD)) for entry in given}
        tally = _Tally(_channel_axis(value))
        try:
            session = make_session(model, threads=self._threads)
            for start in range(0, self._samples, size):
                feeds = {
                    entry.name or "": draw(np.random.default_rng((self._seed, place, start)), size).astype(
                        numpy_type(entry)
                    )
                    for place, (entry, draw) in enumerate(draws.items())
                }
                tally.add(session.run(None, feeds)[0])
        except REFUSALS as error:
            raise SliceError(f"value '{value.name}' cannot be computed on noise: {first_line(error)}") from error
        return tally.moments(value.name or "")

    def _behind(self, value: ir.Value) -> tuple[list[ir.Node], list[ir.Value]]:
        """Nodes that make the value from held ones, in order, and the held ones and model inputs that they read."""
        nodes: set[ir.Node] = set()
        given: dict[ir.Value, None] = {}
        stack = [value]
        while stack:
            found = stack.pop()
            producer = found.producer()
            if found in self._held or (producer is None and not found.is_initializer()):
                given[found] = None
            elif producer is not None and producer not in nodes:
                nodes.add(producer)
                stack.extend(reads(producer))
        return sorted(nodes, key=self._parts.flow.order.__getitem__), list(given)


class _Tally:
    """Mean and deviation of a value's channels over batches."""

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._count = 0
        self._sum: npt.NDArray[np.float64] = np.zeros(())
        self._square: npt.NDArray[np.float64] = np.zeros(())

    def add(self, block: Array) -> None:
        rows = np.moveaxis(block, self._axis, -1).reshape(-1, block.shape[self._axis]).astype(np.float64)
        self._count += len(rows)
        self._sum = self._sum + rows.sum(axis=0)
        self._square = self._square + np.square(rows).sum(axis=0)

    def moments(self, name: str) -> ChannelMoments:
        mean = self._sum / self._count
        variance = np.maximum(self._square / self._count - mean * mean, 0)
        if not np.isfinite(variance).all():
            raise SliceError(f"value '{name}' becomes Inf or NaN on noise; give data")
        return _moments(mean, np.sqrt(variance), self._axis)


def _moments(mean: npt.NDArray[np.float64], std: npt.NDArray[np.float64], axis: int = 1) -> ChannelMoments:
    return ChannelMoments(mean.astype(np.float32), std.astype(np.float32), axis)


def _channel_axis(value: ir.Value) -> int:
    """1 in front of convolutions, else the last: linear operators on sequences have their features there."""
    rank = len(value.shape) if value.shape is not None else 0
    spatial = rank > 3 or any(node.op_type in _SPATIAL_OPS for node, _ in value.uses())
    return 1 if spatial or rank < 3 else rank - 1


def _made_by(value: ir.Value) -> ir.Node | None:
    """The node that makes a value, seen through those that only hand it on."""
    producer = value.producer()
    while producer is not None and producer.op_type in _PASSING_OPS and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    return producer
