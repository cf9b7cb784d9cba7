"""Reading a `.onnx` file that nobody vouches for, and writing one whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes.common import InlinePass

from ndonnx.errors import ModelError, RunDirError, first_line
from ndonnx.graph.collector import collector_paused
from ndonnx.graph.dataflow import reads, sub_graphs
from ndonnx.graph.declared import believe_statements, remember_statements, set_aside
from ndonnx.graph.external import external_tensors, resolve_external_data
from ndonnx.graph.files import model_files, name_by_contents, own_data, rename_data
from ndonnx.graph.inference import open_negative_sizes, take_inferred, weightless
from ndonnx.graph.maps import remember_maps, set_maps_aside, write_maps
from ndonnx.graph.opsets import ONNX_NAMES, let_functions_follow, remember_opsets, settle_opsets, write_opsets
from ndonnx.graph.runtime_types import ask_onnxruntime, believe, try_out, undefined_outputs
from ndonnx.graph.sparse import remember, unfold, write_sparse

PROTOBUF_LIMIT = 1_900_000_000
"""Bytes of tensors above which a model is written with external data (protobuf stops at 2 GB)."""


@collector_paused()
def load(path: str | Path) -> ir.Model:
    """Read a model as `onnx_ir` sees it: external data stays on disk, functions are inlined, shapes are inferred.

    Types that ONNX cannot infer come from onnxruntime. Names, nodes, opset, initializers among the inputs and metadata
    are kept as they are.

    Raises:
        ModelError: the file is missing, empty, not ONNX, or names external data outside its folder.
    """
    path = Path(path)
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot read the model: {error.strerror}") from error
    except (DecodeError, ValueError) as error:
        kind = "in onnxruntime's own format: give the .onnx file that it was made of" if _is_ort(path) else _NO_MODEL
        raise ModelError(f"{path}: not an ONNX file, {kind}") from error
    if not proto.graph.output:
        raise ModelError(f"{path}: not an ONNX model: it has no graph with an output")
    open_negative_sizes(proto.graph)
    if not any(entry.domain in ONNX_NAMES for entry in proto.opset_import):
        raise ModelError(f"{path}: the model states no opset for the ONNX operators; export it again")
    try:
        opsets, maps = settle_opsets(proto), set_maps_aside(proto.graph)
        model = _read(proto)
        in_order = _sort(model.graph)
    except Exception as error:  # whatever a hostile graph provokes in the deserialiser is the file's fault
        raise ModelError(f"{path}: the graph is malformed: {first_line(_root(error))}") from error
    remember_opsets(model, opsets)
    remember_maps(model, maps)
    brought_in = resolve_external_data(model, path)
    _check_names(model.graph, set(), path)
    is_same = in_order and not brought_in and not proto.functions
    _infer_types(model, weightless(proto) if is_same else None)
    return model


_NO_MODEL = "or a truncated one: export or copy it again"


def _is_ort(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8)[4:] == b"ORTM"


def _read(proto: onnx.ModelProto) -> ir.Model:
    """A message as a model without functions: of initializers of one name the first counts, sparse ones are dense."""
    sparse = unfold(proto)
    _drop_doubles(proto.graph)
    model = ir.from_proto(proto)
    remember(model, sparse)
    if model.functions:
        let_functions_follow(model)
        model = InlinePass()(model).model
    return model


def _drop_doubles(graph: onnx.GraphProto) -> None:
    first = {tensor.name: position for position, tensor in reversed(list(enumerate(graph.initializer)))}
    double = [position for position, tensor in enumerate(graph.initializer) if first[tensor.name] != position]
    for position in reversed(double):
        del graph.initializer[position]


def _sort(graph: ir.Graph) -> bool:
    """Put the nodes into an order in which each reads what was made before; whether they stood in one already.

    Raises:
        ValueError: there is none.
    """
    seen: set[ir.Node] = set()
    for node in graph:
        makers = (value.producer() for value in reads(node))
        if any(maker is not None and maker.graph is graph and maker not in seen for maker in makers):
            graph.sort()
            return False
        seen.add(node)
    return True


def add_initializer(model: ir.Model, value: ir.Value) -> None:
    """Give a model's graph one more initializer, among the inputs too where the model's format wants it there."""
    model.graph.register_initializer(value)
    if model.ir_version < _INITIALIZERS_MAY_STAND_ALONE:
        model.graph.inputs.append(value)


_INITIALIZERS_MAY_STAND_ALONE = 4
"""IR version from which an initializer need not be among the inputs."""


def infer_shapes(model: ir.Model, proto: onnx.ModelProto | None = None) -> ir.Model:
    """Fill in types and shapes where ONNX can infer them, in place; what it cannot infer stays unknown.

    Outputs that the model leaves open stay open: inference would narrow what is promised to the caller.

    Args:
        model: is returned.
        proto: the same model as a message, see `weightless`; made where it is not given.
    """
    declared = [(value, value.shape.copy() if value.shape is not None else None) for value in model.graph.outputs]
    take_inferred(model, proto)
    for value, shape in declared:
        if shape is None or (value.shape is not None and len(value.shape) == len(shape)):
            value.shape = shape
    return model


def _infer_types(model: ir.Model, proto: onnx.ModelProto | None) -> None:
    """As `infer_shapes`; what ONNX cannot infer is as the file states it, or asked of onnxruntime.

    Args:
        model: as read; told what its file states.
        proto: the same as a message without its weights.
    """
    stated = set_aside(model.graph)
    remember_statements(model, stated)
    if proto is not None:
        del proto.graph.value_info[:]
    infer_shapes(model, proto)
    unknown = any(value.type is None or value.shape is None for value in stated)
    if believe_statements(model.graph, stated) and unknown:
        infer_shapes(model)  # what lies behind them
    for ask in (ask_onnxruntime, try_out):
        if types := ask(model):
            believe(undefined_outputs(model), types)
            infer_shapes(model)  # what lies behind them
            believe((value for node in model.graph for value in node.outputs), types)


def serialise(model: ir.Model) -> bytes:
    """The model as the bytes of one `.onnx` file, with the tensors that were kept beside it inside."""
    if external_tensors(model):
        model = ir.external_data.load_to_model(model.clone())
    proto = ir.to_proto(model)
    write_sparse(model, proto)
    return _as_in_file(model, proto).SerializeToString(deterministic=True)


def _as_in_file(model: ir.Model, proto: onnx.ModelProto) -> onnx.ModelProto:
    """Let a model's message say what `onnx_ir` does not hold as the file that the model was read from does."""
    write_opsets(model, proto)
    write_maps(model, proto.graph)
    held = set(model.graph.initializers)  # their types stand in the tensors; `onnx_ir` writes them down once more
    told = [value for value in proto.graph.value_info if value.name not in held]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(told)
    return proto


def save(model: ir.Model, path: str | Path) -> None:
    """Write a model under its final name only when it is complete.

    Above 1.9 GB of tensors the weights go into a file beside it, named after its contents: `<name>.<digest>.data`. So
    whenever the process is killed, the model's name stands for the old pair of files or for the new one. The old
    weights go when nothing reads them any more.

    Raises:
        RunDirError: the folder is missing, unwritable, or full.
    """
    path = Path(path)
    try:
        with tempfile.TemporaryDirectory(prefix=".ndonnx-", dir=path.parent) as scratch:
            whole = Path(scratch) / path.name
            if tensor_bytes(model) > PROTOBUF_LIMIT:
                data = whole.with_name(f"{path.name}.data")
                ir.save(model, whole, external_data=data.name)
                named = name_by_contents(data, path.name)
                proto = _as_in_file(model, onnx.load(whole, load_external_data=False))
                rename_data(proto, named.name)
                whole.write_bytes(proto.SerializeToString(deterministic=True))
                os.replace(named, path.parent / named.name)
            else:
                whole.write_bytes(serialise(model))
            own = own_data(path)
            os.replace(whole, path)
        for unread in own.difference(model_files(path)):
            unread.unlink(missing_ok=True)
    except OSError as error:
        raise RunDirError(f"{path}: cannot write the model: {error.strerror}") from error


def check_writable(path: str | Path) -> None:
    """Refuse, before any work is done, a path under which nothing could be written.

    Raises:
        RunDirError: naming the path and what is wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        raise RunDirError(f"{path}: is a directory; give the name of a file to write")
    try:
        with tempfile.TemporaryDirectory(prefix=".ndonnx-", dir=path.parent):
            pass
    except OSError as error:
        raise RunDirError(f"{path}: cannot write there: {error.strerror}") from error
    if path.exists() and not os.access(path, os.W_OK):
        raise RunDirError(f"{path}: exists and is not writable")
    if shutil.disk_usage(path.parent).free == 0:
        raise RunDirError(f"{path}: the disk is full")


def tensor_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, without reading those kept in external data."""
    values = (value for graph in model.graphs() for value in graph.initializers.values())
    tensors = (tensor for value in values if (tensor := value.const_value) is not None)
    return sum(tensor.nbytes for tensor in tensors if tensor.dtype is not ir.DataType.STRING)


def _check_names(graph: ir.Graph, outer: set[str | None], path: Path) -> None:
    """Refuse a graph that reads a value which nothing produces, or reads it before it is there."""
    known = outer | {value.name for value in graph.inputs} | set(graph.initializers)
    for node in graph:
        for value in node.inputs:
            if value is not None and value.name not in known:
                raise ModelError(
                    f"{path}: node '{node.name or node.op_type}' reads '{value.name}' before anything makes it"
                )
        for inner in sub_graphs(node):
            _check_names(inner, known, path)
        known |= {value.name for value in node.outputs}
    for value in graph.outputs:
        if value.name not in known:
            raise ModelError(f"{path}: the output '{value.name}' is made by no node")


def _root(error: BaseException) -> BaseException:
    """What an error goes back to."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error
