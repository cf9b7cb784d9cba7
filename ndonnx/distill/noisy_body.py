"""Gaussian noise behind every neighbourhood: how much, where, and how it comes into torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, nn

from ndonnx.data import DataSource
from ndonnx.distill.draws import part_seed
from ndonnx.errors import ConversionError, ModelError, SliceError, first_line
from ndonnx.partition import Partition
from ndonnx.teacher import make_session
from ndonnx.teacher.batches import whole_batches
from ndonnx.teacher.noise_inputs import Noise
from ndonnx.teacher.sessions import REFUSALS

_SPREAD_BATCH = 8
"""Samples whose activations are held at a time."""


def measure_noises(parts: Partition, source: DataSource, noise: float) -> tuple[Noise, ...]:
    """The noise behind every distillable neighbourhood, in proportion to the activation's deviation on these data.

    An exit that is the model's output gets none: nothing could be learnt from it.

    Raises:
        ConversionError: there is no such exit.
        SliceError: an activation is not finite, or has no sample axis.
    """
    exits = [n.exit for n in parts.distillable if n.exit is not None and not n.exit.is_graph_output()]
    if not exits:
        raise ConversionError("no neighbourhood ends inside the model, so there is nowhere to add noise")
    names = [value.name or "" for value in exits]
    spreads = {name: _Spread(name) for name in names}
    for name, rows in _values(parts, names, source):
        spreads[name].add(rows)
    return tuple(Noise(name, spread.shape, noise * spread.std) for name, spread in spreads.items())


def _values(parts: Partition, names: Sequence[str], source: DataSource) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Activations of some samples, by the name of the value, a batch at a time."""
    opened = parts.model.clone()
    values = ir.convenience.create_value_mapping(opened.graph, include_subgraphs=False)
    opened.graph.outputs[:] = [values[name] for name in names]
    try:
        session = make_session(opened)
        for batch in whole_batches(source, _SPREAD_BATCH):
            yield from zip(names, session.run(names, dict(batch)), strict=True)
    except REFUSALS as error:
        raise ModelError(f"onnxruntime does not run the model on these data: {first_line(error)}") from error


class _Spread:
    """Deviation of a value over samples and elements."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._count = 0
        self._sum = self._square = 0.0
        self.shape: tuple[int, ...] = ()

    def add(self, rows: npt.NDArray[Any]) -> None:
        values = rows.astype(np.float64)
        if not np.isfinite(values).all():
            raise SliceError(f"the teacher's activation '{self._name}' holds NaN or Inf on this data")
        if not rows.ndim:
            raise SliceError(f"the teacher's activation '{self._name}' has no sample axis; name it in --freeze")
        self.shape = rows.shape[1:]
        self._count += values.size
        self._sum += float(values.sum())
        self._square += float(np.square(values).sum())

    @property
    def std(self) -> float:
        mean = self._sum / self._count
        return math.sqrt(max(0.0, self._square / self._count - mean * mean))


class NoisyBody(nn.Module):
    """The body of a torch slice whose last inputs are noise: draws it for every call.

    In training it is new in every step; without gradients, where states are compared, always the same. Neither
    depends on the number of threads that happen to be ahead.
    """

    def __init__(self, body: nn.Module, inputs: int, noises: Sequence[Noise], seed: int) -> None:
        super().__init__()
        self.body = body
        self.quiet = False
        """Leave the noise out."""
        self._inputs = inputs
        self._noises = tuple(noises)
        self._seed = seed

    def forward(self, *values: Tensor) -> Tensor:
        given, weights = values[: self._inputs], values[self._inputs :]
        device, count = given[0].device, len(given[0])
        dtype = next((value.dtype for value in given if value.is_floating_point()), torch.float32)
        seed = part_seed() if torch.is_grad_enabled() else self._seed
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        drawn = [
            torch.zeros(count, *noise.shape, device=device, dtype=dtype)
            if self.quiet
            else torch.randn(count, *noise.shape, generator=generator, device=device, dtype=dtype) * noise.std
            for noise in self._noises
        ]
        out: Tensor = self.body(*given, *drawn, *weights)
        return out
