"""Initializers of a graph: a new one under a free name, and other numbers for one that is there."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]


def set_numbers(value: ir.Value, array: Array) -> None:
    """Give an initializer other numbers, in its own type; its shape becomes the array's."""
    assert value.const_value is not None
    numbers = np.ascontiguousarray(array, dtype=value.const_value.dtype.numpy())
    value.const_value = ir.tensor(numbers, name=value.name)
    value.shape = ir.Shape(numbers.shape)


def add_constant(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """A new initializer of the array's type under this name, or under one like it that is free."""
    name = unique_name(graph, name)
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


def unique_name(graph: ir.Graph, name: str) -> str:
    """The name, or one like it, that no value and no node of the graph has."""
    taken = {value.name for value in ir.convenience.create_value_mapping(graph).values()}
    taken |= {node.name for node in graph}
    while name in taken:
        name += "'"
    return name
