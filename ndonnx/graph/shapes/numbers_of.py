"""Numbers that a graph computes from its shapes, operator by operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ndonnx.graph.shapes.sizes import (
    Size,
    product,
)

MOST_NUMBERS = 64
"""Elements up to which a tensor of integers may say something about a shape."""
INTEGERS = {ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL}

Numbers = npt.NDArray[np.object_]
"""Elements of an integer tensor: a `Size`, a truth value, or None where unknown."""
Shape = list[Size | None]


class Known(Protocol):
    """What is known of a graph's values so far."""

    def sizes(self, value: ir.Value | None) -> Shape | None:
        """The sizes of a value's axes; None where not even its rank is known."""

    def integers(self, value: ir.Value | None) -> Numbers | None:
        """The numbers that an integer value holds; None where they are not known."""


def shape_of(known: Known, node: ir.Node) -> Numbers | None:
    sizes = known.sizes(node.inputs[0])
    if sizes is None:
        return None
    start, end = (
        node.attributes[name].as_int() if name in node.attributes else default
        for name, default in (("start", 0), ("end", len(sizes)))
    )
    return np.array(sizes[start:end], dtype=object)


def size_of(known: Known, node: ir.Node) -> Numbers | None:
    sizes = known.sizes(node.inputs[0])
    return None if sizes is None else np.array(product(sizes), dtype=object)


def gather(known: Known, node: ir.Node) -> Numbers | None:
    data, index = known.integers(node.inputs[0]), known.integers(node.inputs[1])
    if data is None or index is None or data.ndim != 1:
        return None
    return np.asarray(data[index.astype(np.int64)], dtype=object)


def cut(known: Known, node: ir.Node) -> Numbers | None:
    data = known.integers(node.inputs[0])
    starts, ends, axes, steps = bounds(known, node)
    if data is None or starts is None or ends is None or axes is None or steps is None:
        return None
    index = [slice(None)] * data.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if not (isinstance(axis, int) and isinstance(start, int) and isinstance(end, int) and isinstance(step, int)):
            return None
        index[axis] = slice(start, end, step)
    return data[tuple(index)]


def transposed(known: Known, node: ir.Node) -> Numbers | None:
    data = known.integers(node.inputs[0])
    perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else None
    return None if data is None else np.transpose(data, perm)


def concat(known: Known, node: ir.Node) -> Numbers | None:
    parts = []
    for value in node.inputs:
        numbers = known.integers(value)
        if numbers is None:
            sizes = known.sizes(value)
            if sizes is None or len(sizes) != 1 or not isinstance(sizes[0], int) or sizes[0] > MOST_NUMBERS:
                return None
            numbers = np.full(sizes[0], None, dtype=object)
        parts.append(numbers)
    return np.concatenate(parts) if all(part.ndim == 1 for part in parts) else None


def reshaped(known: Known, node: ir.Node) -> Numbers | None:
    """Operators that change no more than the form."""
    data, sizes = known.integers(node.inputs[0]), known.sizes(node.outputs[0])
    if data is None or sizes is None or not all(isinstance(size, int) for size in sizes):
        return None
    return data.reshape([int(size) for size in sizes if size is not None])


def expanded(known: Known, node: ir.Node) -> Numbers | None:
    data, sizes = known.integers(node.inputs[0]), known.sizes(node.outputs[0])
    count = product(sizes or [None])
    if data is None or sizes is None or not isinstance(count, int) or count > MOST_NUMBERS:
        return None
    return np.broadcast_to(data, [int(size) for size in sizes if size is not None])


def filled(known: Known, node: ir.Node) -> Numbers | None:
    sizes = known.sizes(node.outputs[0])
    count = product(sizes or [None])
    if sizes is None or not isinstance(count, int) or count > MOST_NUMBERS:
        return None
    value = node.attributes["value"].as_tensor().numpy().item() if "value" in node.attributes else 0
    return np.full([int(size) for size in sizes if size is not None], value, dtype=object)


def elementwise(function: Callable[..., object]) -> Callable[[Known, ir.Node], Numbers | None]:
    def rule(known: Known, node: ir.Node) -> Numbers | None:
        operands = [known.integers(value) for value in node.inputs]
        if any(operand is None for operand in operands):
            return None
        return np.asarray(np.frompyfunc(function, len(operands), 1)(*operands), dtype=object)

    return rule


def where(condition: bool | None, a: Size | None, b: Size | None) -> Size | None:
    if condition is None:
        return a if a == b else None
    return a if condition else b


def bounds(known: Known, node: ir.Node) -> list[list[Any] | None]:
    """Starts, ends, axes and steps of a `Slice`; None for a list that is not known."""
    if len(node.inputs) < 3:  # before opset 10 they are attributes, and ONNX reads them
        return [None] * 4
    found: list[list[Any] | None] = []
    for position in range(1, 5):
        value = node.inputs[position] if position < len(node.inputs) else None
        numbers = known.integers(value)
        if value is not None:
            found.append(None if numbers is None else numbers.tolist())
        else:
            count = len(found[0] or ())
            found.append([1] * count if position == 4 else list(range(count)))
    return found
