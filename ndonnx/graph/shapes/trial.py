"""Shapes by trying: a model is run on made-up inputs of a few sizes, and what changes with them has their names.

For values of which neither ONNX nor onnxruntime knows even the rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from ndonnx.graph.dataflow import real_inputs, sub_graphs

_SAMPLES = 2
_LENGTH, _STEP = 16, 8
"""Sizes that are left open besides the samples: 16, 24, 32 ... in the order in which they come."""
_IMAGE_RANK, _PIXELS = 4, 64
"""Height and width of what may be an image."""

_MOST = 2**26
"""Elements of an input, doubled sizes included."""

Sizes = dict[str, int]
"""By the names of open sizes; where one has no name, by those of its input and axis."""


@dataclass(frozen=True)
class Trial:
    """The shapes of values when the open sizes of the inputs were so and so."""

    sizes: Sizes
    shapes: Mapping[str, tuple[int, ...]]


def shapes_by_trying(
    model: ir.Model, session: ort.InferenceSession, names: Sequence[str]
) -> dict[str, list[int | str | None]]:
    """Sizes of values: numbers where they stay the same, names where they change as an input's size does, else None.

    Args:
        model: its inputs say which sizes are open.
        session: opened of the model, with the values among its outputs.
        names: of the values; those that are no tensors are left out.

    Raises:
        ValueError: the inputs would be too large, or graphs inside nodes could keep the model busy for any time.
        Exception: onnxruntime's, where the model does not run on such inputs.
    """
    sizes = _first_sizes(model)
    if any(True for node in model.graph for _ in sub_graphs(node)):
        raise ValueError("the model holds graphs inside its nodes")
    trials = [_run(model, session, names, sizes)]
    trials += [_run(model, session, names, sizes | {name: 2 * size}) for name, size in sizes.items()]
    alike = set.intersection(
        *({n for n, shape in t.shapes.items() if _rank(trials[0], n) == len(shape)} for t in trials)
    )
    return {name: [_told(trials, name, axis) for axis in range(len(trials[0].shapes[name]))] for name in sorted(alike)}


def _rank(trial: Trial, name: str) -> int | None:
    return len(trial.shapes[name]) if name in trial.shapes else None


def _told(trials: Sequence[Trial], name: str, axis: int) -> int | str | None:
    """What a size is, by which of the inputs' sizes it follows."""
    first, *others = trials
    size = first.shapes[name][axis]
    changed = [
        (symbol, trial.shapes[name][axis])
        for symbol, trial in zip(first.sizes, others, strict=True)
        if trial.shapes[name][axis] != size
    ]
    if not changed:
        return size
    (symbol, other), more = changed[0], changed[1:]
    return symbol if not more and (size, other) == (first.sizes[symbol], 2 * first.sizes[symbol]) else None


def _first_sizes(model: ir.Model) -> Sizes:
    sizes: Sizes = {}
    for value in real_inputs(model.graph):
        shape = value.shape or ()
        for axis, size in enumerate(shape):
            if not isinstance(size, int):
                pixels = len(shape) == _IMAGE_RANK and axis > 1
                guess = _SAMPLES if axis == 0 else _PIXELS if pixels else _LENGTH + _STEP * len(sizes)
                sizes.setdefault(_name(value, axis), guess)
    return sizes


def _name(value: ir.Value, axis: int) -> str:
    size = value.shape[axis] if value.shape is not None else None
    return size.value if isinstance(size, ir.SymbolicDim) and size.value is not None else f"{value.name}/{axis}"


def _run(model: ir.Model, session: ort.InferenceSession, names: Sequence[str], sizes: Sizes) -> Trial:
    feeds = {value.name or "": _made_up(value, sizes) for value in real_inputs(model.graph)}
    found = dict(zip(names, session.run(list(names), feeds), strict=True))
    return Trial(sizes, {name: value.shape for name, value in found.items() if isinstance(value, np.ndarray)})


def _made_up(value: ir.Value, sizes: Sizes) -> npt.NDArray[np.generic]:
    """Normal floats; zeros, which every table has, for anything else."""
    shape = tuple(
        size if isinstance(size, int) else sizes[_name(value, axis)] for axis, size in enumerate(value.shape or ())
    )
    if math.prod(shape) > _MOST:
        raise ValueError(f"input '{value.name}' would have {math.prod(shape)} elements")
    if value.dtype is None or value.dtype is ir.DataType.STRING:
        return np.full(shape, "", dtype=object)
    if value.dtype.is_floating_point():
        return np.random.default_rng(0).standard_normal(shape).astype(value.dtype.numpy())
    return np.zeros(shape, value.dtype.numpy())
