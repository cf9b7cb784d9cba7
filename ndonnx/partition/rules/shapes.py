"""Numbers computed from a shape: as a target shape they follow a changed width, as a factor they must not change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from ndonnx.graph.costs import constant_of
from ndonnx.partition.rules.tracker import Tracker, input_at, int_attribute, labelled_axes, numbers

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
_INTEGERS = {ir.DataType.INT64, ir.DataType.INT32}


def freeze_widths_calculated_with(tracker: Tracker, node: ir.Node) -> None:
    """A width that a `Cast` turns into a float is calculated with (the root of a head's width): it stays."""
    if node.op_type != "Cast" or int_attribute(node, "to", 0) not in _FLOATS:
        return
    for value, axes in _shapes_behind(node.inputs[0]):
        labels = tracker.labels(value)
        for axis in axes if labels is not None else ():
            if labels is not None and labelled_axes(labels) == [axis]:
                tracker.sets.freeze(labels)
            elif labels is not None and labels.shape[axis] > 1:  # whole heads may still go
                tracker.sets.unite(labels, labels.take([0], axis=axis))


def _shapes_behind(start: ir.Value | None) -> Iterator[tuple[ir.Value, Sequence[int]]]:
    """Values and axes whose lengths an integer is computed from."""
    stack, seen = [start], set()
    while stack:
        value = stack.pop()
        node = value.producer() if value is not None else None
        if value is None or node is None or value in seen or value.dtype not in _INTEGERS:
            continue
        seen.add(value)
        source = node if node.op_type in ("Shape", "Size") else _reads_shape(node)
        data = source.inputs[0] if source is not None else None
        if data is None or data.shape is None:
            stack.extend(node.inputs)
        else:
            yield data, _positions(node, len(data.shape))


def _reads_shape(node: ir.Node) -> ir.Node | None:
    """The `Shape` that a `Gather` or `Slice` picks numbers from."""
    if node.op_type not in ("Gather", "Slice") or node.inputs[0] is None:
        return None
    source = node.inputs[0].producer()
    return source if source is not None and source.op_type == "Shape" and not source.attributes else None


def _positions(node: ir.Node, rank: int) -> Sequence[int]:
    """Which of a shape's numbers a node passes on; all of them where that is not known."""
    axes = range(rank)
    if node.op_type == "Gather" and (index := constant_of(node.inputs[1])) is not None:
        return [axes[int(i)] for i in index.numpy().reshape(-1)]
    if node.op_type == "Slice" and input_at(node, 4) is None:
        starts, ends = numbers(node, "starts", 1), numbers(node, "ends", 2)
        if starts is not None and ends is not None:
            return axes[starts[0] : ends[0]]
    return axes
