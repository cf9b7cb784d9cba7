"""ONNX's own shape inference, on the graph without its weights.

ONNX wants the model as one message, and answers with another. Both are without the weights here: their types
stand among the inputs, and only small constants stay, which inference reads numbers from (the target of a
`Reshape`). What is inferred is read off the answer, which is not made a graph of again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx
import onnx_ir as ir

from ndonnx.graph.dataflow import sub_graphs
from ndonnx.graph.storage.maps import holds_map

_LARGEST_BYTES = 1000
"""Bytes of an initializer up to which inference may read its numbers."""
_LIKE_THEIR_INPUT = {"LayerNormalization", "SimplifiedLayerNormalization"}
"""Operators whose output has the type of their first input, and which onnxruntime has at opsets where ONNX has not."""


def open_negative_sizes(graph: onnx.GraphProto) -> None:
    """Leave sizes below 0 open, in place: some exporters write -1 for any size, and inference would reckon with it."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape"):
            for size in value.type.tensor_type.shape.dim:
                if size.dim_value < 0:
                    size.ClearField("dim_value")


def weightless(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model without functions, less the data of its large initializers."""
    graph = proto.graph
    slim = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import)
    copy = slim.graph
    copy.name = graph.name
    copy.node.MergeFrom(graph.node)
    copy.input.MergeFrom(graph.input)
    copy.output.MergeFrom(graph.output)
    copy.value_info.MergeFrom(graph.value_info)
    fed = {value.name for value in graph.input}
    for tensor in graph.initializer:
        if tensor.name not in fed:
            copy.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        if _bytes(ir.DataType(tensor.data_type), math.prod(tensor.dims)) <= _LARGEST_BYTES:
            copy.initializer.append(tensor)
    return _known_to_onnx(slim)


def _known_to_onnx(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Let ONNX infer what it has no definition of at this opset: an `Identity` stands in for such operators."""
    opset = max((entry.version for entry in proto.opset_import if entry.domain == ""), default=1)
    unknown = {operator for operator in _LIKE_THEIR_INPUT if not onnx.defs.has(operator, opset, "")}
    for node in proto.graph.node:
        if node.op_type in unknown and node.domain == "" and node.input and node.output:
            node.CopyFrom(onnx.helper.make_node("Identity", node.input[:1], node.output[:1], node.name))
    return proto


def weightless_of(model: ir.Model) -> onnx.ModelProto:
    """A model as a message without the data of its large initializers."""
    graph = model.graph
    held = list(graph.initializers.values())
    for value in held:
        if value.const_value is not None:
            value.shape = value.const_value.shape if value.shape is None else value.shape  # type: ignore[assignment]
            value.dtype = value.const_value.dtype if value.dtype is None else value.dtype
    fed = set(graph.inputs)
    view = ir.GraphView(
        [*graph.inputs, *(value for value in held if value not in fed)],
        graph.outputs,
        nodes=graph,
        initializers=[value for value in held if _is_small(value.const_value)],
        name=graph.name,
    )
    return _known_to_onnx(
        onnx.ModelProto(
            ir_version=model.ir_version,
            opset_import=[onnx.helper.make_opsetid(*entry) for entry in model.opset_imports.items()],
            graph=ir.serde.serialize_graph(view),  # type: ignore[arg-type]  # stricter than its own classes
            functions=[ir.serde.serialize_function(function) for function in model.functions.values()],
        )
    )


def take_inferred(model: ir.Model, proto: onnx.ModelProto | None = None) -> None:
    """Let ONNX infer the types in a model, and write down in it what is found.

    Nothing is found where ONNX gives up on the whole model.

    Args:
        model: to be written into.
        proto: the same model as a message, see `weightless`; made where it is not given.
    """
    try:
        message = weightless_of(model) if proto is None else proto
        inferred = onnx.shape_inference.infer_shapes(message, check_type=False, strict_mode=False, data_prop=True)
    except Exception:  # its errors share no base class, and shapes are a help, not a condition
        return
    types: dict[bytes, tuple[ir.Shape | None, ir.TypeProtocol | None]] = {}
    for graph, found in _graphs(model.graph, inferred.graph):
        by_name = {value.name: value.type for value in (*found.value_info, *found.output, *found.input)}
        for value in _values(graph):
            if (type_ := by_name.get(value.name or "")) is not None and not holds_map(type_):
                key = type_.SerializeToString()
                if key not in types:
                    types[key] = _read(type_)
                _believe(value, *types[key])


def _believe(value: ir.Value, shape: ir.Shape | None, type_: ir.TypeProtocol | None) -> None:
    if shape is not None and value.shape != shape:
        value.shape = shape
    if type_ is not None and value.type != type_:
        value.type = type_


def _read(type_: onnx.TypeProto) -> tuple[ir.Shape | None, ir.TypeProtocol | None]:
    return ir.serde.deserialize_type_proto_for_shape(type_), ir.serde.deserialize_type_proto_for_type(type_)


def _graphs(graph: ir.Graph, proto: onnx.GraphProto) -> Iterator[tuple[ir.Graph, onnx.GraphProto]]:
    """A graph and those inside its nodes, each beside its message."""
    yield graph, proto
    for node, message in zip(graph, proto.node, strict=True):
        if any(True for _ in sub_graphs(node)):
            inner = (part for held in message.attribute for part in ([held.g] if held.HasField("g") else held.graphs))
            for pair in zip(sub_graphs(node), inner, strict=True):
                yield from _graphs(*pair)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _is_small(tensor: ir.TensorProtocol | None) -> bool:
    return tensor is not None and _bytes(tensor.dtype, tensor.size) <= _LARGEST_BYTES


def _bytes(dtype: ir.DataType, size: int) -> float:
    return 0 if dtype is ir.DataType.STRING else size * dtype.itemsize
