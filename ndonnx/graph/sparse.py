"""Sparse initializers: dense while a model is worked on, and sparse again in the file where they did not change."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir

FREE_BYTES = 256 * 2**20
"""Bytes up to which a sparse tensor may unfold whatever it holds; beyond that, up to a hundred times what it holds."""
_UNFOLDS = 100


class SparseTensor(ir.Tensor[np.ndarray]):
    """A dense tensor that knows the sparse one it was read from."""

    def __init__(self, message: onnx.SparseTensorProto) -> None:
        super().__init__(_unfolded(message), name=message.values.name)
        self.message = onnx.SparseTensorProto()
        self.message.CopyFrom(message)


def unfold(proto: onnx.ModelProto) -> dict[str, SparseTensor]:
    """Take the sparse tensors out of a message and put dense ones in their places; those of its main graph by name.

    Raises:
        ValueError: one is not what it says, is larger than it may be, or lies in another file.
    """
    graph = proto.graph
    for position, message in reversed([(i, m) for i, node in enumerate(graph.node) if (m := _sparse_value(node))]):
        message.values.name = graph.node[position].output[0]
        graph.sparse_initializer.append(message)
        del graph.node[position]
    found = {message.values.name: SparseTensor(message) for message in graph.sparse_initializer}
    for inner in _graphs(graph):
        _make_dense(inner)
    return found


def remember(model: ir.Model, tensors: dict[str, SparseTensor]) -> None:
    """Let the initializers of a model know the sparse tensors that they were."""
    for name, tensor in tensors.items():
        model.graph.initializers[name].const_value = tensor


def write_sparse(model: ir.Model, proto: onnx.ModelProto) -> None:
    """Let the initializers of a message that are still those of the file be sparse again. In place."""
    held = {name: value.const_value for name, value in model.graph.initializers.items()}
    sparse = {name: tensor for name, tensor in held.items() if isinstance(tensor, SparseTensor)}
    if sparse:
        dense = [tensor for tensor in proto.graph.initializer if tensor.name not in sparse]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(dense)
        for name, tensor in sparse.items():
            tensor.message.values.name = name
            proto.graph.sparse_initializer.append(tensor.message)


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
