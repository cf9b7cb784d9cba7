"""Numbers that a graph holds about its own channels, and where to write a new one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ndonnx.graph.costs import constant_of, dims
from ndonnx.graph.shapes.lengths import is_whole_shape


@dataclass(frozen=True, eq=False)
class NumberSource:
    """Where one number of a list input comes from."""

    number: int | None
    """None where the graph computes it."""
    length_of: tuple[ir.Value, int] | None
    """The value and the axis whose length a computed number is, where it is only handed on from its `Shape`."""
    reader: ir.Node
    """Node that reads the number: the operator itself, or the `Concat` that makes its list."""
    slot: int
    """Which of the reader's inputs holds the number."""
    index: int
    """Which of that input's elements the number is."""

    @property
    def writable(self) -> bool:
        """Whether another number can stand there: in a constant, or as a part of a `Concat` by itself."""
        held = self.reader.inputs[self.slot]
        return constant_of(held) is not None or (self.reader.op_type == "Concat" and dims(held) == (1,))


def number_source(node: ir.Node, slot: int, position: int) -> NumberSource | None:
    """Find the number at a position of a list input; None when the list is not understood."""
    value = node.inputs[slot] if slot < len(node.inputs) else None
    reader, index = node, position
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Concat":
        found = _part_of(producer, position)
        if found is None:
            return None
        reader, (slot, index) = producer, found
        value = reader.inputs[slot]
    if value is None:
        return None
    last, at = _traced(value, index)
    tensor = constant_of(last)
    number = int(tensor.numpy().reshape(-1)[at]) if tensor is not None else None
    if number is None and last.producer() is None:
        return None
    return NumberSource(number, _length_of(last, at), reader, slot, index)


def _part_of(concat: ir.Node, position: int) -> tuple[int, int] | None:
    """Which input of a `Concat` of lists, and which of its elements, stands at a position of the result."""
    passed = 0
    for part, value in enumerate(concat.inputs):
        shape = dims(value)
        if shape is None or len(shape) != 1:
            return None
        if position < passed + shape[0]:
            return part, position - passed
        passed += shape[0]
    return None


def _traced(value: ir.Value, index: int) -> tuple[ir.Value, int]:
    """The element of a value that an element comes from, past all that only hands it on."""
    while (node := value.producer()) is not None and (step := _before(node, index)) is not None:
        slot, index = step
        before = node.inputs[slot]
        if before is None:
            break
        value = before
    return value, index


def _length_of(value: ir.Value, index: int) -> tuple[ir.Value, int] | None:
    node = value.producer()
    data = node.inputs[0] if node is not None and is_whole_shape(node) else None
    if data is None or data.shape is None or not -len(data.shape) <= index < len(data.shape):
        return None
    return data, index % len(data.shape)


def _before(node: ir.Node, index: int) -> tuple[int, int] | None:
    """The input of a node, and the element of it, that stands at an element of its output."""
    if node.op_type in _HAND_ON:
        return 0, index
    if node.op_type == "Concat":
        return _part_of(node, index)
    if node.op_type == "Gather" and (picked := constant_of(node.inputs[1])) is not None:
        return 0, int(picked.numpy().reshape(-1)[index])
    if node.op_type == "Slice" and len(node.inputs) in (3, 4):
        starts, length = constant_of(node.inputs[1]), dims(node.inputs[0])
        if starts is not None and starts.size == 1 and length is not None and len(length) == 1:
            start = int(starts.numpy().reshape(-1)[0])
            return 0, max(0, start + length[0] if start < 0 else start) + index
    return None


_HAND_ON = {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
"""Operators that leave the elements of a list in their order."""


def write_number(graph: ir.Graph, node: ir.Node, slot: int, position: int, number: int) -> None:
    """Put another number at a position of a list input, in a constant of the reader's own."""
    source = number_source(node, slot, position)
    assert source is not None
    reader = source.reader
    if reader is not node and len(reader.outputs[0].uses()) > 1:
        # Others read the same list, and may want another number there.
        reader = _copy_for(graph, node, slot)
    old = reader.inputs[source.slot]
    tensor = constant_of(old)
    assert old is not None and (tensor is not None or dims(old) == (1,))
    array = np.array(tensor.numpy()) if tensor is not None else np.zeros(1, np.int64)
    array.reshape(-1)[source.index] = number
    name = f"{reader.outputs[0].name}/{source.slot}"
    if old.name == name and old.is_initializer():
        old.const_value = ir.tensor(array, name=name)
        return
    fresh = ir.Value(
        name=name,
        const_value=ir.tensor(array, name=name),
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
    )
    graph.register_initializer(fresh)
    reader.replace_input_with(source.slot, fresh)
    if not old.uses() and old.is_initializer() and not old.is_graph_output():
        del graph.initializers[old.name or ""]


def _copy_for(graph: ir.Graph, node: ir.Node, slot: int) -> ir.Node:
    """The `Concat` that makes a list input, once more for this reader alone."""
    value = node.inputs[slot]
    old = value.producer() if value is not None else None
    assert value is not None and old is not None
    name = f"{node.outputs[0].name}/{slot}"
    copy = ir.Node(old.domain, old.op_type, old.inputs, old.attributes.values(), name=name)
    copy.outputs[0].name, copy.outputs[0].type, copy.outputs[0].shape = name, value.type, value.shape
    graph.insert_before(node, copy)
    node.replace_input_with(slot, copy.outputs[0])
    return copy
