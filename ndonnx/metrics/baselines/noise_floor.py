"""The teacher's own noise floor on images: how its answers differ when all inputs move by less than a camera tells.

No student can be expected to agree with its teacher more than the teacher agrees with itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ndonnx.data import DataSource
from ndonnx.data.augmentation import image_axes
from ndonnx.graph.load import add_initializer

NAME = "teacher, inputs moved by a third of a grey level"

_PART = 1 / 3
"""Of a grey level."""
_SAMPLES = 64
"""Samples that the size of a grey level is read from."""
_LEVELS = 256
"""Values that a channel of 8-bit images has at most."""
_GRID = 0.05
"""Largest distance of a value from the grid of grey levels, as a part of one."""
_SEED = 3


def moved(teacher: ir.Model, source: DataSource) -> ir.Model | None:
    """The teacher with noise on its input, the same for every sample; None where the inputs are no 8-bit images.

    Args:
        teacher: as loaded; it is not changed.
        source: samples as the teacher takes them, preprocessed.
    """
    axes = image_axes(source.inputs, source.recipe)
    batch = next(iter(source.batches(_SAMPLES, samples=_SAMPLES)), None)
    if len(axes) != 1 or batch is None or source.inputs[0].axis:
        return None
    (name,) = axes
    images = batch.inputs[name]
    channels = next(axis for axis in (1, 2, 3) if axis not in axes[name])
    levels = [grey_level(np.take(images, number, channels)) for number in range(images.shape[channels])]
    told = [level for level in levels if level is not None]
    if not told:
        return None
    shape = [1, *images.shape[1:]]
    noise = np.random.default_rng(_SEED).uniform(-_PART, _PART, shape)
    known = [max(told) if level is None else level for level in levels]
    noise *= np.reshape(known, [-1 if axis == channels else 1 for axis in range(len(shape))])
    return _with_noise(teacher, name, noise.astype(images.dtype))


def grey_level(values: NDArray[np.generic]) -> float | None:
    """Distance of neighbouring grey levels in one channel of images; None where the values lie on no such grid."""
    found = np.unique(values.astype(np.float64))
    if not len(found) > 2 or values.size < 2 * len(found):
        return None
    gaps = np.diff(found)
    gaps = gaps[gaps > 1e-6 * (found[-1] - found[0])]  # values that differ by rounding only
    level = float(gaps.min())
    steps = gaps / level
    if (found[-1] - found[0]) / level > _LEVELS or np.abs(steps - np.round(steps)).max() > _GRID:
        return None
    return level


def _with_noise(teacher: ir.Model, name: str, noise: NDArray[np.generic]) -> ir.Model:
    model = teacher.clone()
    entry = next(value for value in model.graph.inputs if value.name == name)
    constant = ir.Value(name=f"{name}/ndonnx:noise", const_value=ir.tensor(noise, name=f"{name}/ndonnx:noise"))
    add_initializer(model, constant)
    readers: Sequence[tuple[ir.Node, int]] = list(entry.uses())
    node = ir.node("Add", [entry, constant])
    node.outputs[0].name = f"{name}/ndonnx:moved"
    for reader, position in readers:
        reader.replace_input_with(position, node.outputs[0])
    model.graph.insert_before(model.graph[0], node)
    return model
