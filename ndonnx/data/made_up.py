"""Inputs made up for a look at a model that comes without data: floats are noise, whole numbers are legal.

For looking only. To distil without data, the sources of `noise` have as many samples as wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ndonnx.data.preprocess import IMAGE_RANK, resolve
from ndonnx.data.specs import InputSpec
from ndonnx.graph.costs import constant_of
from ndonnx.recipe import DataRecipe

_PIXELS = 224
"""Height and width of an image that the model leaves open."""
_LENGTH = 16
"""Any other size that it leaves open."""
_FORWARDED = {"Cast", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
"""Operators behind which whole numbers are still the same ones."""


def made_up_samples(
    inputs: Sequence[InputSpec], graph: ir.Graph, recipe: DataRecipe, samples: int, *, seed: int = 0
) -> dict[str, NDArray[np.generic]]:
    """Arrays (samples, ...) by input name: standard normal floats; whole numbers that the model can look up.

    Numbers that choose the rows of a table lie within the table. A mask is ones, with zeros at the end of
    some samples. Other whole numbers are 0 or 1. Dynamic sizes of one name are equal.

    Raises:
        DataError: an input has no sample axis, or the recipe's `size` contradicts the model.
    """
    rng = np.random.default_rng(seed)
    values = {value.name: value for value in graph.inputs}
    sizes: dict[str, int] = {}
    made = {}
    for spec in resolve(inputs, recipe):
        shape = (samples, *(_size(spec, axis, sizes) for axis in range(1, len(spec.shape))))
        made[spec.name] = _draw(spec, shape, values.get(spec.name), rng)
    return made


def _size(spec: InputSpec, axis: int, sizes: dict[str, int]) -> int:
    size = spec.shape[axis]
    if isinstance(size, int):
        return size
    image = spec.is_float and len(spec.shape) == IMAGE_RANK
    guess = (3 if axis == 1 else _PIXELS) if image else _LENGTH
    return guess if size is None else sizes.setdefault(size, guess)


def _draw(
    spec: InputSpec, shape: tuple[int, ...], value: ir.Value | None, rng: np.random.Generator
) -> NDArray[np.generic]:
    if spec.is_float:
        return rng.standard_normal(shape, dtype=np.float32).astype(spec.dtype)
    return whole_numbers(spec, shape, value, rng)


def whole_numbers(
    spec: InputSpec, shape: tuple[int, ...], value: ir.Value | None, rng: np.random.Generator
) -> NDArray[np.generic]:
    """Numbers or truth values of this shape that the model's input `value` can take; the first mask is whole."""
    if "mask" in spec.name.lower() or spec.dtype.kind == "b":
        return _mask(shape, rng).astype(spec.dtype)
    rows = min(_tables(value), default=2) if value is not None else 2
    return rng.integers(0, max(1, rows), shape).astype(spec.dtype)


def _mask(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Ones up to a length of its own in every sample, at least half of the last axis; the first sample is whole."""
    longest = shape[-1]
    lengths = rng.integers((longest + 1) // 2, longest + 1, (shape[0], *(1,) * (len(shape) - 1)))
    lengths[0] = longest
    return np.broadcast_to(np.arange(longest) < lengths, shape)


def _tables(value: ir.Value) -> Iterator[int]:
    """Rows of the tables in which the numbers of a value are looked up."""
    seen, stack = {value}, [value]
    while stack:
        for node, slot in stack.pop().uses():
            if node.op_type == "Gather" and slot == 1:
                yield from _rows(node)
            elif node.op_type in _FORWARDED and slot == 0:
                fresh: list[Any] = [output for output in node.outputs if output not in seen]
                seen.update(fresh)
                stack += fresh


def _rows(node: ir.Node) -> Iterator[int]:
    table = constant_of(node.inputs[0])
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    if table is not None and table.shape.rank():
        yield int(table.shape.numpy()[axis])
