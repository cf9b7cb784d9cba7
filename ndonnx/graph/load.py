"""Reading a `.onnx` file that nobody vouches for."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes.common import InlinePass

from ndonnx.errors import ModelError, first_line
from ndonnx.graph.dataflow import reads, sub_graphs
from ndonnx.graph.shapes.inference import infer_types
from ndonnx.graph.shapes.onnx_inference import open_negative_sizes, weightless
from ndonnx.graph.storage.external import resolve_external_data
from ndonnx.graph.storage.maps import remember_maps, set_maps_aside
from ndonnx.graph.storage.opsets import ONNX_NAMES, let_functions_follow, remember_opsets, settle_opsets
from ndonnx.graph.storage.sparse import remember, unfold
from ndonnx.graph.storage.well_formed import check_well_formed
from ndonnx.runtime.gc_pause import gc_paused


@gc_paused()
def load(path: str | Path) -> ir.Model:
    """Read a model as `onnx_ir` sees it: external data stays on disk, functions are inlined, shapes are inferred.

    Types that ONNX cannot infer come from onnxruntime. Names, nodes, opset, initializers among the inputs and metadata
    are kept as they are.

    Raises:
        ModelError: the file is missing, empty, not ONNX, breaks its rules, or names external data outside its folder.
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
        check_well_formed(proto)
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
    infer_types(model, weightless(proto) if is_same else None)
    return model


def check_file(path: str | Path) -> None:
    """Refuse a model that breaks ONNX's rules before onnxruntime opens it, which then may never come to an end.

    What cannot be read, or is no ONNX file, is left to whoever opens it.

    Raises:
        ModelError: the file breaks a rule.
    """
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except (OSError, DecodeError, ValueError):
        return
    try:
        check_well_formed(proto)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: the graph is malformed: {first_line(error)}") from error


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
