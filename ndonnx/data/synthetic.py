"""Inputs made up for a look at a model that comes without data: floats are noise, whole numbers are legal.

For looking only. To distil without data, the sources of `noise` have as many samples as wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ndonnx.config.recipe import DataRecipe
from ndonnx.data.preprocess import IMAGE_RANK, resolve
from ndonnx.data.specs import InputSpec
from ndonnx.graph.costs import constant_of

_PIXELS = 224
"""Height and width of an image that the model leaves open."""
_LENGTH = 16
"""Any other size that it leaves open."""
_FORWARDED = {
    "Cast", "Clip", "Concat", "Expand", "Flatten", "Identity", "Max", "Min", "Reshape", "Slice", "Squeeze", "Transpose",
    "Unsqueeze", "Where",
}  # fmt: skip
"""Operators behind which whole numbers are still the same ones."""
_COMPARISONS = {"Greater", "GreaterOrEqual", "Less", "LessOrEqual"}
_DEFAULT_ROWS = 2


def made_up_samples(
    inputs: Sequence[InputSpec], graph: ir.Graph, recipe: DataRecipe, samples: int, *, seed: int = 0
) -> dict[str, NDArray[np.generic]]:
    """Arrays (samples, ...) by input name: standard normal floats; whole numbers that the model can look up.

    Numbers that choose the rows of a table lie within the table. A mask is ones, with zeros at the end of
    some samples; lengths are of such parts. Other whole numbers are 0 or 1. Dynamic sizes of one name are equal.
    Sizes and ranges that the inputs' specs bind are kept.

    Raises:
        DataError: the recipe's `size` contradicts the model.
    """
    rng = np.random.default_rng(seed)
    values = {value.name: value for value in graph.inputs}
    sizes: dict[str, int] = {}
    specs = resolve(inputs, recipe)
    shapes = {spec.name: (samples, *(_size(spec, axis, sizes) for axis in range(1, len(spec.shape)))) for spec in specs}
    longest = longest_sequence(specs, shapes)
    return {
        spec.name: _draw(spec, shapes[spec.name], values.get(spec.name), rng, longest) for spec in specs if spec.shape
    }


def _size(spec: InputSpec, axis: int, sizes: dict[str, int]) -> int:
    size = spec.shape[axis]
    if isinstance(size, int):
        return size
    if spec.sizes is not None:
        return spec.sizes[axis]
    image = spec.is_float and len(spec.shape) == IMAGE_RANK
    guess = (3 if axis == 1 else _PIXELS) if image else _LENGTH
    return guess if size is None else sizes.setdefault(size, guess)


def longest_sequence(specs: Sequence[InputSpec], shapes: Mapping[str, Sequence[int]]) -> int | None:
    """The number of steps of what lengths are told of: of whole numbers where there are such, else of anything."""
    steps = [(spec.is_float, shapes[spec.name][1]) for spec in specs if len(spec.shape) > 1]
    return min(steps, key=lambda found: found[0], default=(True, None))[1]


def _draw(
    spec: InputSpec, shape: tuple[int, ...], value: ir.Value | None, rng: np.random.Generator, longest: int | None
) -> NDArray[np.generic]:
    if not spec.is_float:
        return whole_numbers(spec, shape, value, rng, longest)
    return floats(spec, shape, rng).astype(spec.dtype)


def floats(spec: InputSpec, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.floating[Any]]:
    """Standard normal numbers, or numbers spread evenly over the range that the input's spec has; a mask is ones."""
    if spec.low is None and spec.high is None:
        if "mask" in spec.name.lower() and len(shape) > 1:
            return _mask(shape, rng).astype(np.float32)
        return rng.standard_normal(shape, dtype=np.float32)
    low, high = range_of(spec)
    return (low + (high - low) * rng.random(shape, dtype=np.float32)).astype(np.float32)


def range_of(spec: InputSpec) -> tuple[float, float]:
    """Smallest and largest made-up value of an input whose spec has one of the two at least."""
    low = spec.low if spec.low is not None else min(0.0, (spec.high or 0.0) - 1)
    return low, spec.high if spec.high is not None else max(1.0, low + 1)


def whole_numbers(
    spec: InputSpec,
    shape: tuple[int, ...],
    value: ir.Value | None,
    rng: np.random.Generator,
    longest: int | None = None,
) -> NDArray[np.generic]:
    """Numbers or truth values of this shape that the model's input `value` can take; the first mask is whole.

    Args:
        spec: of the input.
        shape: (samples, ...).
        value: the input in the graph, which tells what the numbers choose from.
        rng: what they are drawn from.
        longest: steps of a sequence, for numbers that are lengths.
    """
    if spec.low is not None or spec.high is not None:
        low, high = range_of(spec)
        return rng.integers(int(low), int(high) + 1, shape).astype(spec.dtype)
    if "mask" in spec.name.lower() or spec.dtype.kind == "b":
        return _mask(shape, rng).astype(spec.dtype)
    rows = min(_tables(value), default=None) if value is not None else None
    if rows is None and longest is not None and np.prod(shape[1:], dtype=int) == 1 and _is_length(spec, value):
        lengths = rng.integers((longest + 1) // 2, longest + 1, shape)
        lengths[0] = longest
        return lengths.astype(spec.dtype)
    return rng.integers(0, max(1, _DEFAULT_ROWS if rows is None else rows), shape).astype(spec.dtype)


def scalars_for(spec: InputSpec, value: ir.Value | None) -> list[NDArray[Any]]:
    """What an input with one value for all samples could be: what the graph compares it with, and plain numbers."""
    shape = tuple(size for size in spec.shape if isinstance(size, int))
    if spec.low is not None or spec.high is not None:
        return [np.full(shape, number, spec.dtype) for number in reversed(range_of(spec))]
    if spec.is_float:
        return [np.ones(shape, spec.dtype), np.zeros(shape, spec.dtype)]
    compared = [] if value is None else list(_compared(value))
    numbers = dict.fromkeys([*sorted(compared, reverse=True), 1, 0])
    return [np.full(shape, number, spec.dtype) for number in numbers]


def _mask(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Ones up to a length of its own in every sample, at least half of the last axis; the first sample is whole."""
    longest = shape[-1]
    lengths = rng.integers((longest + 1) // 2, longest + 1, (shape[0], *(1,) * (len(shape) - 1)))
    lengths[0] = longest
    return np.broadcast_to(np.arange(longest) < lengths, shape)


def _is_length(spec: InputSpec, value: ir.Value | None) -> bool:
    """Whether numbers say how long something is: by their name, or because the graph compares them."""
    compared = value is not None and any(node.op_type in _COMPARISONS for node, _, _ in _readers(value))
    return compared or "len" in spec.name.lower()


def _tables(value: ir.Value) -> Iterator[int]:
    """How many numbers a value can take: rows of the tables in which they are looked up, classes they are told from."""
    for node, slot, offset in _readers(value):
        if node.op_type == "Gather" and slot == 1:
            yield from (rows - offset for rows in _rows(node))
        elif node.op_type == "OneHot" and slot == 0 and (depth := constant_of(node.inputs[1])) is not None:
            yield int(depth.numpy().reshape(-1)[0]) - offset
        elif node.op_type == "Equal":
            classes = constant_of(node.inputs[1 - slot])
            if classes is not None and classes.size > 1:
                yield int(classes.numpy().max()) + 1 - offset


def _compared(value: ir.Value) -> Iterator[int]:
    """Single constants that a value is compared with."""
    for node, slot, _ in _readers(value):
        if node.op_type in {"Equal", *_COMPARISONS}:
            other = constant_of(node.inputs[1 - slot])
            if other is not None and other.size == 1:
                yield int(other.numpy().reshape(-1)[0])


def _readers(value: ir.Value) -> Iterator[tuple[ir.Node, int, int]]:
    """Nodes that read a value, or the same numbers behind operators that move them: the slot, and what was added."""
    seen, stack = {value}, [(value, 0)]
    while stack:
        read, offset = stack.pop()
        for node, slot in read.uses():
            yield node, slot, offset
            added = _added(node, slot)
            picked = node.op_type == "Gather" and slot == 0
            if node.op_type in _FORWARDED or picked or added is not None:
                fresh: list[Any] = [output for output in node.outputs if output not in seen]
                seen.update(fresh)
                stack += [(output, offset + (added or 0)) for output in fresh]


def _added(node: ir.Node, slot: int) -> int | None:
    """The constant that a node adds to what it reads; None where it does not just do that."""
    if node.op_type not in ("Add", "Sub") or len(node.inputs) != 2 or (node.op_type == "Sub" and slot == 1):
        return None
    other = constant_of(node.inputs[1 - slot])
    if other is None or other.size != 1 or not other.dtype.is_integer():
        return None
    number = int(other.numpy().reshape(-1)[0])
    return number if node.op_type == "Add" else -number


def _rows(node: ir.Node) -> Iterator[int]:
    table = constant_of(node.inputs[0])
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    if table is not None and table.shape.rank():
        yield int(table.shape.numpy()[axis])
