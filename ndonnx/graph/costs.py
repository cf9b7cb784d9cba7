"""What nodes hold: constants, and the weights among them.

A parameter is an element of a floating-point constant with more than one element, counted
once however many nodes read it. What nodes compute stands in `macs.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from ndonnx.graph.dataflow import reads, sub_graphs
from ndonnx.graph.storage.sparse import stored
from ndonnx.graph.ties import origin_of

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}


@dataclass(frozen=True)
class Cost:
    """Parameters (elements) and MACs (multiply-accumulates of one run); None where the MACs cannot be told."""

    parameters: int = 0
    macs: int | None = 0

    def __add__(self, other: Cost) -> Cost:
        macs = None if self.macs is None or other.macs is None else self.macs + other.macs
        return Cost(self.parameters + other.parameters, macs)


def parameters_of(nodes: Iterable[ir.Node]) -> int:
    """Elements of the weights that nodes of one graph read, quantised ones included; what several share counts once."""
    weights = {value: None for node in _with_inner(nodes) for value in _counted(node)}
    return sum(_size(value) for value in weights)


_QUANTISED = {"DequantizeLinear": 0, "QuantizeLinear": 0, "MatMulInteger": 1}
"""Operators that read integers with their scales: the input that a weight is."""


def _counted(node: ir.Node) -> list[ir.Value]:
    """The weights that a node reads, among them integers that stand for floats; their scales are none."""
    place = _QUANTISED.get(node.op_type)
    if place is None and node.op_type == "Gather":
        tensor = constant_of(node.inputs[0])
        place = 0 if tensor is not None and tensor.dtype in (ir.DataType.INT8, ir.DataType.UINT8) else None
    if place is None:
        return weights_of(node)
    read = node.inputs[place]
    return [read] if read is not None and constant_of(read) is not None and _size(read) > 1 else []


def weights_of(node: ir.Node) -> list[ir.Value]:
    """The weights that a node reads, each once; of a transposed or reshaped one, what it is made from."""
    origins = (origin_of(value) for value in reads(node))
    return list(dict.fromkeys(origin for origin in origins if is_weight(origin)))


def _with_inner(nodes: Iterable[ir.Node]) -> Iterator[ir.Node]:
    """The nodes, and those of their sub-graphs."""
    for node in nodes:
        yield node
        for graph in sub_graphs(node):
            yield from _with_inner(graph)


def held_weights(model: ir.Model) -> tuple[int, int]:
    """What a model's file holds in weights: how many elements, and bytes, those of sub-graphs among them.

    Each constant counts once, however many nodes read it.
    """
    graphs = [model.graph]
    sizes: list[tuple[int, int]] = []
    for graph in graphs:
        sizes += [stored(value) for value in graph.initializers.values() if is_weight(value)]
        for node in graph:
            graphs += sub_graphs(node)
            if node.op_type == "Constant" and (tensor := constant_of(node.outputs[0])) is not None:
                sizes += [(int(tensor.size), tensor.nbytes)] * (tensor.dtype in _FLOATS and tensor.size > 1)
    return sum(elements for elements, _ in sizes), sum(nbytes for _, nbytes in sizes)


def is_weight(value: ir.Value | None) -> bool:
    """Whether a value is a floating-point constant with more than one element."""
    tensor = constant_of(value)
    return tensor is not None and tensor.dtype in _FLOATS and _size(value) > 1


def constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a `Constant` node; None for anything computed."""
    if value is None:
        return None
    return value.const_value if value.is_initializer() else ir.convenience.get_const_tensor(value)


def dims(value: ir.Value | None) -> tuple[int, ...] | None:
    """Static shape with symbolic dimensions as 1; None when the rank is unknown."""
    if value is None or value.shape is None:
        tensor = constant_of(value)
        return tuple(int(d) for d in tensor.shape.numpy()) if tensor is not None else None
    return tuple(d if isinstance(d, int) else 1 for d in value.shape)


def _size(value: ir.Value | None) -> int:
    """Elements of a constant. A tensor read from a file makes its shape anew each time: the value's is at hand."""
    if value is not None and value.shape is not None and value.shape.is_static():
        return math.prod(value.shape.numpy())
    tensor = constant_of(value)
    return int(tensor.size) if tensor is not None else 0
