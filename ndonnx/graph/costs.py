"""What a node costs: parameters held and multiply-accumulates done for one sample.

A parameter is an element of a floating-point constant with more than one element, counted
once however many nodes read it. Symbolic dimensions count as 1, so that costs are per
sample for the usual dynamic batch.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from ndonnx.graph.dataflow import reads, sub_graphs

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}


@dataclass(frozen=True)
class Cost:
    """Parameters (elements) and MACs (multiply-accumulates per sample)."""

    parameters: int = 0
    macs: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.macs + other.macs)


def cost_of(nodes: Iterable[ir.Node]) -> Cost:
    """Cost of a set of nodes of one graph; a weight that several of them share counts once."""
    nodes = list(nodes)
    weights = {value: None for node in _with_inner(nodes) for value in reads(node) if is_weight(value)}
    return Cost(sum(_size(value) for value in weights), sum(macs_of(node) for node in nodes))


def _with_inner(nodes: Iterable[ir.Node]) -> Iterator[ir.Node]:
    """The nodes, and those of their sub-graphs."""
    for node in nodes:
        yield node
        for graph in sub_graphs(node):
            yield from _with_inner(graph)


def slice_cost(model: ir.Model) -> Cost:
    """Cost of a whole model or slice."""
    return cost_of(model.graph)


def compressed_bytes(path: str | Path, beside: Iterable[Path] | None = None) -> int:
    """Bytes that a file, and the weights kept beside it, take after zlib: what zeros are worth on the way to a device.

    Args:
        path: of the model.
        beside: files that hold its weights. None: `<path>.data`, as `save` writes them, if it is there.

    Raises:
        OSError: a file cannot be read.
    """
    if beside is None:
        beside = [data] if (data := Path(f"{path}.data")).exists() else []
    packer = zlib.compressobj()
    size = 0
    for part in (Path(path), *beside):
        with part.open("rb") as file:
            while chunk := file.read(_CHUNK):
                size += len(packer.compress(chunk))
    return size + len(packer.flush())


_CHUNK = 2**20


def is_weight(value: ir.Value | None) -> bool:
    """Whether a value is a floating-point constant with more than one element."""
    tensor = constant_of(value)
    return tensor is not None and tensor.dtype in _FLOATS and _size(value) > 1


def constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a `Constant` node; None for anything computed."""
    if value is None:
        return None
    return value.const_value if value.is_initializer() else ir.convenience.get_const_tensor(value)


def macs_of(node: ir.Node) -> int:
    """Multiply-accumulates of one node for one sample; 0 where shapes are unknown or it does none."""
    inner = sum(macs_of(child) for graph in sub_graphs(node) for child in graph)
    count = _MACS.get(node.op_type)
    return inner + (count(node) if count is not None and node.domain in ("", "ai.onnx", "com.microsoft") else 0)


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


def _conv(node: ir.Node) -> int:
    weight, out = dims(node.inputs[1]), dims(node.outputs[0])
    return math.prod(weight[1:]) * math.prod(out) if weight and out else 0


def _conv_transpose(node: ir.Node) -> int:
    weight, data = dims(node.inputs[1]), dims(node.inputs[0])
    return math.prod(weight[1:]) * math.prod(data) if weight and data else 0


def _gemm(node: ir.Node) -> int:
    b, out = dims(node.inputs[1]), dims(node.outputs[0])
    transposed = (attribute := node.attributes.get("transB")) is not None and attribute.as_int() == 1
    return math.prod(out) * b[1 if transposed else 0] if b and out else 0


def _matmul(node: ir.Node) -> int:
    b, out = dims(node.inputs[1]), dims(node.outputs[0])
    return math.prod(out) * b[-2 if len(b) > 1 else 0] if b and out is not None else 0


def _recurrent(node: ir.Node) -> int:
    data, weight, state = dims(node.inputs[0]), dims(node.inputs[1]), dims(node.inputs[2])
    return data[0] * data[1] * (math.prod(weight) + math.prod(state)) if data and weight and state else 0


_MACS: dict[str, Callable[[ir.Node], int]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "FusedMatMul": _matmul,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
}
