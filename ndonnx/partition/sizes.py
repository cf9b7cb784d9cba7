"""Numbers that a graph holds about its own channels, and where to write a new one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ndonnx.graph.costs import constant_of, dims

COMPUTED = -1
"""Stands for a number that the graph computes from a shape: it follows by itself."""


@dataclass(frozen=True, eq=False)
class NumberSource:
    """Where one number of a list input comes from."""

    number: int
    reader: ir.Node
    """Node that reads the constant: the operator itself, or the `Concat` that makes its list."""
    slot: int
    """Which of the reader's inputs the constant is."""
    index: int
    """Which of the constant's elements the number is."""


def number_source(node: ir.Node, slot: int, position: int) -> NumberSource | None:
    """Find the number at a position of a list input; None when the list is not understood."""
    value = node.inputs[slot] if slot < len(node.inputs) else None
    tensor = constant_of(value)
    if tensor is not None:
        return NumberSource(int(tensor.numpy().reshape(-1)[position]), node, slot, position)
    producer = value.producer() if value is not None else None
    if producer is None:
        return None
    if producer.op_type != "Concat":
        return NumberSource(COMPUTED, node, slot, position)
    passed = 0
    for index, part in enumerate(producer.inputs):
        shape = dims(part)
        if shape is None or len(shape) != 1:
            return None
        if position < passed + shape[0]:
            held = constant_of(part)
            number = int(held.numpy().reshape(-1)[position - passed]) if held is not None else COMPUTED
            return NumberSource(number, producer, index, position - passed)
        passed += shape[0]
    return None


def write_number(graph: ir.Graph, node: ir.Node, slot: int, position: int, number: int) -> None:
    """Put another number at a position of a list input, in a constant of the reader's own."""
    source = number_source(node, slot, position)
    assert source is not None and source.number != COMPUTED
    old = source.reader.inputs[source.slot]
    tensor = constant_of(old)
    assert old is not None and tensor is not None
    array = np.array(tensor.numpy())
    array.reshape(-1)[source.index] = number
    name = f"{source.reader.outputs[0].name}/{source.slot}"
    if old.name == name:
        old.const_value = ir.tensor(array, name=name)
        return
    fresh = ir.Value(
        name=name,
        const_value=ir.tensor(array, name=name),
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
    )
    graph.register_initializer(fresh)
    source.reader.replace_input_with(source.slot, fresh)
    if not old.uses() and old.is_initializer() and not old.is_graph_output():
        del graph.initializers[old.name or ""]
