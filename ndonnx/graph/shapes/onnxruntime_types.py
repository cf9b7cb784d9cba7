"""Types and shapes that ONNX's inference does not know: those behind operators of onnxruntime's own, asked of it.

One session tells them of all values at once. It is made of the graph without its weights, and runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnx
import onnx_ir as ir
import onnxruntime as ort

from ndonnx.graph.dataflow import sub_graphs
from ndonnx.graph.shapes.onnx_inference import weightless_of
from ndonnx.graph.shapes.trial import shapes_by_trying
from ndonnx.graph.storage.maps import map_values
from ndonnx.runtime.endless import session_class

_ELEMENTS = {
    "bfloat16": ir.DataType.BFLOAT16, "bool": ir.DataType.BOOL, "double": ir.DataType.DOUBLE,
    "float": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "int16": ir.DataType.INT16,
    "int32": ir.DataType.INT32, "int64": ir.DataType.INT64, "int8": ir.DataType.INT8, "string": ir.DataType.STRING,
    "uint16": ir.DataType.UINT16, "uint32": ir.DataType.UINT32, "uint64": ir.DataType.UINT64,
    "uint8": ir.DataType.UINT8,
}  # fmt: skip
"""Element types by onnxruntime's names."""
_FATAL = 4

Types = Mapping[str, tuple[ir.DataType, Sequence[int | str | None]]]
"""Element type and sizes by the name of a value; no sizes where onnxruntime does not know them."""


def open_quietly(model: bytes | str) -> ort.InferenceSession:
    """A session of a model or its path that changes nothing of the graph, on one thread, without a word."""
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return session_class(model)(model, options, providers=["CPUExecutionProvider"])


def ask_onnxruntime(model: ir.Model) -> Types:
    """What onnxruntime knows of the values whose type or rank is open in a model; nothing where none is."""
    names = [value.name for value in _open_values(model)]
    session = (_weightless_session(model, names) or _session(model, names)) if names else None
    told = {}
    for value in session.get_outputs() if session is not None else ():
        element = _ELEMENTS.get(value.type.removeprefix("tensor(").removesuffix(")"))
        if element is not None:
            told[value.name] = element, value.shape
    return told


def try_out(model: ir.Model) -> Types:
    """Shapes of values of which onnxruntime does not know the rank either, from runs on a few made-up inputs."""
    open_ = {value.name: value for value in _open_values(model) if value.name and isinstance(value.type, ir.TensorType)}
    session = _session(model, list(open_)) if open_ else None
    if session is None:
        return {}
    try:
        shapes = shapes_by_trying(model, session, list(open_))
    except Exception:  # the model does not like such inputs, and its shapes stay unknown
        return {}
    return {name: (type_.dtype, sizes) for name, sizes in shapes.items() if (type_ := open_[name].type) is not None}


def believe(values: Iterable[ir.Value], types: Types) -> None:
    """Write down types and shapes where they are open, in place; outputs of the model keep their shapes."""
    for value in values:
        if value.name is None or value.name not in types:
            continue
        element, sizes = types[value.name]
        if value.type is None:
            value.type = ir.TensorType(element)
        if sizes and _has_no_rank(value):  # of a rank that it does not know, onnxruntime says what it says of a scalar
            value.shape = ir.Shape(size if isinstance(size, int) and size >= 0 else _symbol(size) for size in sizes)


def undefined_outputs(model: ir.Model) -> Iterator[ir.Value]:
    """What operators make whose types ONNX does not infer: of other domains, of later opsets, or with graphs inside."""
    for node in model.graph:
        known = node.domain == "" and onnx.defs.has(node.op_type, model.opset_imports.get("", 1), "")
        if not known or any(True for _ in sub_graphs(node)):
            yield from node.outputs


def _open_values(model: ir.Model) -> Iterator[ir.Value]:
    maps = map_values(model)
    for node in model.graph:
        for value in node.outputs:
            is_read = value.uses() or value.is_graph_output()
            if value.name and value.name not in maps and is_read and (value.type is None or _has_no_rank(value)):
                yield value


def _has_no_rank(value: ir.Value) -> bool:
    """Whether a tensor's rank is not known; an output of the model that has none is open by the model's own word."""
    return isinstance(value.type, ir.TensorType) and value.shape is None and not value.is_graph_output()


def _weightless_session(model: ir.Model, names: Sequence[str | None]) -> ort.InferenceSession | None:
    try:
        message = weightless_of(model)
        del message.graph.output[:]
        message.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        return open_quietly(message.SerializeToString())
    except Exception:  # its errors share no base class: some operator wants its weights as constants
        return None


def _session(model: ir.Model, names: Sequence[str | None]) -> ort.InferenceSession | None:
    try:
        opened = ir.external_data.load_to_model(model.clone())
        values = ir.convenience.create_value_mapping(opened.graph, include_subgraphs=False)
        opened.graph.outputs[:] = [values[name or ""] for name in names]
        return open_quietly(ir.to_proto(opened).SerializeToString())
    except Exception:  # types are a help, not a condition: what has none is no end of a neighbourhood
        return None


def _symbol(size: int | str | None) -> ir.SymbolicDim:
    return ir.SymbolicDim(size if isinstance(size, str) else None)
