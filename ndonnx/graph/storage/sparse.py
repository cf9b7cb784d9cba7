"""Sparse initializers: dense while a model is worked on, and sparse again in the file where that is smaller."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

FREE_BYTES = 256 * 2**20
"""Bytes up to which a sparse tensor may unfold whatever it holds; beyond that, up to a hundred times what it holds."""
_UNFOLDS = 100
_FROM_FILE = "ndonnx.sparse"
"""Key of an initializer's metadata, which copies of it share."""


@dataclass(frozen=True, eq=False)
class _Origin:
    """What an initializer was in its file."""

    message: onnx.SparseTensorProto
    tensor: ir.TensorProtocol | None
    """A sparse tensor as a dense one."""


def unfold(proto: onnx.ModelProto) -> dict[str, onnx.SparseTensorProto]:
    """Take the sparse tensors out of a message and put dense ones in their places; those of its main graph by name.

    Raises:
        ValueError: one is not what it says, is larger than it may be, or lies in another file.
    """
    graph = proto.graph
    for position, message in reversed([(i, m) for i, node in enumerate(graph.node) if (m := _sparse_value(node))]):
        message.values.name = graph.node[position].output[0]
        graph.sparse_initializer.append(message)
        del graph.node[position]
    found = {message.values.name: onnx.SparseTensorProto() for message in graph.sparse_initializer}
    for message in graph.sparse_initializer:
        found[message.values.name].CopyFrom(message)
    for inner in _graphs(graph):
        _make_dense(inner)
    return found


def remember(model: ir.Model, messages: dict[str, onnx.SparseTensorProto]) -> None:
    """Let the initializers of a model, and all copies of them, know the sparse tensors that they were."""
    for name, message in messages.items():
        value = model.graph.initializers[name]
        value.meta[_FROM_FILE] = _Origin(message, value.const_value)


def is_sparse(value: ir.Value) -> bool:
    """Whether an initializer was a sparse one in its file, so that its zeros are to stay."""
    return _FROM_FILE in value.meta


def stored(value: ir.Value) -> tuple[int, int]:
    """Elements and bytes that an initializer takes in a file."""
    message, tensor = _message(value), value.const_value
    if message is not None:
        return math.prod(message.values.dims), message.ByteSize()
    return (0, 0) if tensor is None else (int(tensor.size), tensor.nbytes)


def write_sparse(model: ir.Model, proto: onnx.ModelProto) -> None:
    """Let the initializers of a message that were sparse in its file be so again where that is smaller. In place."""
    messages = {name: message for name, value in model.graph.initializers.items() if (message := _message(value))}
    if messages:
        dense = [tensor for tensor in proto.graph.initializer if tensor.name not in messages]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(dense)
        for name, message in messages.items():
            proto.graph.sparse_initializer.append(message)
            proto.graph.sparse_initializer[-1].values.name = name


def _message(value: ir.Value) -> onnx.SparseTensorProto | None:
    """An initializer as a sparse tensor: as it was, or by the positions of what is not zero; None for a dense one."""
    origin: _Origin | None = value.meta.get(_FROM_FILE)
    tensor = value.const_value
    if origin is None or tensor is None:
        return None
    if tensor is origin.tensor:
        return origin.message
    array = tensor.numpy()
    at = np.flatnonzero(array).astype(np.int64)
    if at.size * array.itemsize + at.nbytes >= array.nbytes:
        return None
    values = onnx.numpy_helper.from_array(array.reshape(-1)[at], value.name)
    return onnx.SparseTensorProto(values=values, indices=onnx.numpy_helper.from_array(at), dims=array.shape)


def _unfolded(message: onnx.SparseTensorProto) -> np.ndarray:
    values, indices, dims = message.values, message.indices, tuple(message.dims)
    name = values.name
    if onnx.TensorProto.EXTERNAL in (values.data_location, indices.data_location):
        raise ValueError(f"the sparse tensor '{name}' keeps its data in another file, which is not supported")
    held, at = onnx.numpy_helper.to_array(values), onnx.numpy_helper.to_array(indices)
    size = math.prod(dims)
    if min(dims, default=1) < 0 or size * held.itemsize > max(FREE_BYTES, _UNFOLDS * message.ByteSize()):
        raise ValueError(f"the sparse tensor '{name}' would take {size * held.itemsize:.2g} bytes")
    if at.ndim == 2 and at.shape == (held.size, len(dims)):
        inside = bool((at >= 0).all() and (at < dims).all())
        at = np.ravel_multi_index(tuple(at.T), dims) if inside else np.array([-1])
    if at.shape != (held.size,) or (at.size and (at.min() < 0 or at.max() >= size)):
        raise ValueError(f"the sparse tensor '{name}' names elements that it does not have")
    dense = np.zeros(size, held.dtype)
    dense[at] = held.reshape(-1)
    return dense.reshape(dims)


def _make_dense(graph: onnx.GraphProto) -> None:
    for message in graph.sparse_initializer:
        graph.initializer.append(onnx.numpy_helper.from_array(_unfolded(message), message.values.name))
    del graph.sparse_initializer[:]
    for node in graph.node:
        if (held := _sparse_value(node)) is not None:
            dense = onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(_unfolded(held)))
            del node.attribute[:]
            node.attribute.append(dense)


def _sparse_value(node: onnx.NodeProto) -> onnx.SparseTensorProto | None:
    """What a `Constant` holds, where that is sparse."""
    if node.op_type != "Constant" or not node.output:
        return None
    return next((a.sparse_tensor for a in node.attribute if a.name == "sparse_value"), None)


def _graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    """A graph and those inside its nodes."""
    found = [graph]
    for each in found:
        for node in each.node:
            for attribute in node.attribute:
                found += [attribute.g] if attribute.HasField("g") else attribute.graphs
    return found
