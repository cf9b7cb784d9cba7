"""Numbers computed from a shape: as a target shape they follow a changed width, as a factor they must not change."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir

from ndonnx.graph.shapes.lengths import lengths_read
from ndonnx.partition.channels.rules.tracker import FLOATS, Tracker, int_attribute, labelled_axes

_INTEGERS = {ir.DataType.INT64, ir.DataType.INT32}


def freeze_widths_calculated_with(tracker: Tracker, node: ir.Node) -> None:
    """A width that a `Cast` turns into a float is calculated with (the root of a head's width): it stays."""
    if node.op_type != "Cast" or int_attribute(node, "to", 0) not in FLOATS:
        return
    for value, axes in _shapes_behind(node.inputs[0]):
        labels = tracker.labels(value)
        for axis in axes if labels is not None else ():
            if labels is not None and labelled_axes(labels) == [axis]:
                tracker.sets.freeze(labels)
            elif labels is not None and labels.shape[axis] > 1:  # whole heads may still go
                tracker.sets.unite(labels, labels.take([0], axis=axis))


def _shapes_behind(start: ir.Value | None) -> Iterator[tuple[ir.Value, Collection[int]]]:
    """Values and axes whose lengths an integer is computed from."""
    stack, seen = [start], set()
    while stack:
        value = stack.pop()
        node = value.producer() if value is not None else None
        if value is None or node is None or value in seen or value.dtype not in _INTEGERS:
            continue
        seen.add(value)
        read = lengths_read(node)
        if read is None or read[1] is None:
            stack.extend(node.inputs)
        else:
            yield read[0], read[1]
