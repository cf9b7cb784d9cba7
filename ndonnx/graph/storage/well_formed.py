"""What every ONNX file has to keep, and all that reads one relies upon: whole tensors, attributes of one kind, names.

Libraries take a message that breaks these rules and fail later, far from the cause, or not at all: a tensor whose
bytes are fewer than its sizes claim is read beyond its end, or allocated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import onnx
import onnx_ir as ir
from onnx import AttributeProto, TensorProto

_FIELDS = ("float_data", "int32_data", "int64_data", "string_data", "double_data", "uint64_data")
_OWN_FIELD = {
    "FLOAT": "float_data", "COMPLEX64": "float_data", "INT64": "int64_data", "STRING": "string_data",
    "DOUBLE": "double_data", "COMPLEX128": "double_data", "UINT64": "uint64_data", "UINT32": "uint64_data",
}  # fmt: skip
"""Where a tensor's numbers stand when they are no raw bytes; `int32_data` for all others."""
_KINDS = {
    AttributeProto.FLOAT: "f", AttributeProto.INT: "i", AttributeProto.STRING: "s", AttributeProto.TENSOR: "t",
    AttributeProto.GRAPH: "g", AttributeProto.SPARSE_TENSOR: "sparse_tensor", AttributeProto.TYPE_PROTO: "tp",
    AttributeProto.FLOATS: "floats", AttributeProto.INTS: "ints", AttributeProto.STRINGS: "strings",
    AttributeProto.TENSORS: "tensors", AttributeProto.GRAPHS: "graphs",
    AttributeProto.SPARSE_TENSORS: "sparse_tensors", AttributeProto.TYPE_PROTOS: "type_protos",
}  # fmt: skip
_MESSAGES = ("t", "g", "sparse_tensor", "tp")
"""Kinds that must be there; of the others a missing value is a zero or an empty list."""
_MOST_NODES = 2**20
"""Nodes of a model once its functions are written out; sixty functions that call the next one twice make 10^18."""
_ABOUT = {"name", "doc_string", "type", "ref_attr_name"}


def check_well_formed(model: onnx.ModelProto) -> None:
    """Refuse a message that breaks the rules.

    Raises:
        ValueError: one line that names the tensor, attribute or node, and what is wrong with it.
    """
    _check_text(_texts(model))
    _check_graph(model.graph)
    for function in model.functions:
        _check_nodes(function.node, in_function=True)
    _check_expansion(model)


def _check_text(texts: Iterable[object]) -> None:
    """Refuse names that are not UTF-8, which protobuf gives as bytes."""
    for text in texts:
        if isinstance(text, bytes):
            raise ValueError(f"the name {text[:40]!r} is not UTF-8")


def _texts(model: onnx.ModelProto) -> Iterator[object]:
    """Every text of a message that ends up in a name, a path or a report."""
    for entry in model.opset_import:
        yield entry.domain
    for pair in model.metadata_props:
        yield from (pair.key, pair.value)
    for function in model.functions:
        yield from (function.name, function.domain, *function.input, *function.output, *function.attribute)
        yield from _node_texts(function.node)
    yield from _graph_texts(model.graph)


def _graph_texts(graph: onnx.GraphProto) -> Iterator[object]:
    yield graph.name
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield value.name
        yield from (size.dim_param for size in value.type.tensor_type.shape.dim)
    for tensor in (*graph.initializer, *_parts(graph.sparse_initializer)):
        yield tensor.name
        yield from (text for entry in tensor.external_data for text in (entry.key, entry.value))
    yield from _node_texts(graph.node)


def _node_texts(nodes: Iterable[onnx.NodeProto]) -> Iterator[object]:
    for node in nodes:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        for attribute in node.attribute:
            yield from (attribute.name, attribute.ref_attr_name)
            for graph in (*([attribute.g] if attribute.type == AttributeProto.GRAPH else ()), *attribute.graphs):
                yield from _graph_texts(graph)


def _check_expansion(model: onnx.ModelProto) -> None:
    """Refuse functions that call themselves, or that are too many nodes once each call is written out."""
    known = {(function.domain, function.name): function for function in model.functions}
    sizes: dict[tuple[str, str], int | None] = {}

    def size_of(key: tuple[str, str]) -> int:
        if key not in known:
            return 1
        if key not in sizes:
            sizes[key] = None
            sizes[key] = sum(size_of((node.domain, node.op_type)) for node in _all_nodes(known[key].node))
        found = sizes[key]
        if found is None:
            raise ValueError(f"function '{key[1]}' calls itself")
        return found

    total = sum(size_of((node.domain, node.op_type)) for node in _all_nodes(model.graph.node)) if known else 0
    if total > _MOST_NODES:
        raise ValueError(f"its functions written out are {total:.1g} nodes; at most {_MOST_NODES} are read")


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes, and those of the graphs inside them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.type == AttributeProto.GRAPH else ()), *attribute.graphs):
                yield from _all_nodes(graph.node)


def _check_graph(graph: onnx.GraphProto, *, in_function: bool = False) -> None:
    for tensor in (*graph.initializer, *_parts(graph.sparse_initializer)):
        _check_tensor(tensor)
    _check_once(graph)
    _check_nodes(graph.node, in_function)


def _check_once(graph: onnx.GraphProto) -> None:
    """Every value has one maker: a node, an initializer, or whoever feeds the inputs."""
    inputs = [value.name for value in graph.input]
    made = {name: "an input" for name in inputs} | {tensor.name: "a constant" for tensor in graph.initializer}
    if len(set(inputs)) < len(inputs):
        raise ValueError(f"two inputs are called '{next(name for name in inputs if inputs.count(name) > 1)}'")
    for node in graph.node:
        for name in filter(None, node.output):
            if name in made:
                raise ValueError(f"'{name}' is made by {made[name]} and by {_called(node)}")
            made[name] = _called(node)


def _check_nodes(nodes: Iterable[onnx.NodeProto], in_function: bool) -> None:
    for node in nodes:
        names = [attribute.name for attribute in node.attribute]
        if len(set(names)) < len(names):
            raise ValueError(f"{_called(node)} has an attribute twice")
        if node.op_type == "Constant" and len(names) != 1 and node.domain in ("", "ai.onnx"):
            raise ValueError(f"{_called(node)} should have one attribute, its value, and has {len(names)}")
        for attribute in node.attribute:
            _check_attribute(attribute, node, in_function)


def _check_attribute(attribute: AttributeProto, node: onnx.NodeProto, in_function: bool) -> None:
    where = f"attribute '{attribute.name}' of {_called(node)}"
    if attribute.ref_attr_name:
        if not in_function:
            raise ValueError(f"{where} refers to one of a function, outside any")
        return
    field = _KINDS.get(attribute.type)
    if field is None:
        raise ValueError(f"{where} has no type")
    others = [described.name for described, _ in attribute.ListFields() if described.name not in {*_ABOUT, field}]
    if others or (field in _MESSAGES and not attribute.HasField(field)):
        raise ValueError(f"{where} is not of the type that it states")
    for tensor in _tensors_of(attribute):
        _check_tensor(tensor)
    for graph in (attribute.g,) if field == "g" else attribute.graphs:
        _check_graph(graph, in_function=in_function)


def _tensors_of(attribute: AttributeProto) -> Iterator[TensorProto]:
    if attribute.type == AttributeProto.TENSOR:
        yield attribute.t
    yield from attribute.tensors
    yield from _parts([attribute.sparse_tensor] if attribute.type == AttributeProto.SPARSE_TENSOR else ())
    yield from _parts(attribute.sparse_tensors)


def _parts(sparse: Iterable[onnx.SparseTensorProto]) -> Iterator[TensorProto]:
    return (part for tensor in sparse for part in (tensor.values, tensor.indices))


def _check_tensor(tensor: TensorProto) -> None:
    """Refuse a tensor whose numbers are not as many as its sizes say, or stand where those of its type do not."""
    where = f"tensor '{tensor.name}'"
    dtype = _dtype(tensor, where)
    if any(size < 0 for size in tensor.dims):
        raise ValueError(f"{where} has the shape {list(tensor.dims)}")
    if tensor.data_location == TensorProto.EXTERNAL:
        return
    own = _OWN_FIELD.get(dtype.name, "int32_data")
    held = {field: len(getattr(tensor, field)) for field in _FIELDS if len(getattr(tensor, field))}
    if set(held) - {own} or (held and tensor.raw_data):
        raise ValueError(f"{where} keeps numbers of type {dtype.name} in {' and '.join(held)}")
    size = math.prod(tensor.dims)
    if tensor.raw_data:
        found, wanted = len(tensor.raw_data), {_bytes(dtype, size)}
    else:
        found, wanted = held.get(own, 0), _counts(dtype, size)
    if found not in wanted:
        unit = "bytes" if tensor.raw_data else "numbers"
        raise ValueError(
            f"{where} of type {dtype.name} and shape {list(tensor.dims)} should hold {max(wanted)} {unit}, "
            f"found {found}"
        )


def _dtype(tensor: TensorProto, where: str) -> ir.DataType:
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        dtype = ir.DataType.UNDEFINED
    if dtype is ir.DataType.UNDEFINED or (dtype is ir.DataType.STRING and tensor.raw_data):
        raise ValueError(f"{where} is of no type that there is ({tensor.data_type})")
    return dtype


def _bytes(dtype: ir.DataType, size: int) -> int:
    return math.ceil(size * dtype.itemsize)


def _counts(dtype: ir.DataType, size: int) -> set[int]:
    """How many numbers a field may hold: complex ones are two each, and of the small ones several may share one."""
    if dtype.name.startswith("COMPLEX"):
        return {2 * size}
    return {size} if dtype is ir.DataType.STRING or dtype.itemsize >= 1 else {size, _bytes(dtype, size)}


def _called(node: onnx.NodeProto) -> str:
    return f"node '{node.name or node.op_type}'"
