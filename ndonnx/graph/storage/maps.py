"""Types that `onnx_ir` has no class for: maps, as scikit-learn's classifiers give; set aside, and written again."""

from __future__ import annotations

import onnx
import onnx_ir as ir

_FROM_FILE = "ndonnx.map_types"
"""Key of a graph's metadata, which copies of the graph share."""


def holds_map(type_: onnx.TypeProto) -> bool:
    """Whether a value of a type is a map, or holds one."""
    if type_.HasField("sequence_type"):
        return holds_map(type_.sequence_type.elem_type)
    if type_.HasField("optional_type"):
        return holds_map(type_.optional_type.elem_type)
    return bool(type_.HasField("map_type"))


def set_maps_aside(graph: onnx.GraphProto) -> dict[str, onnx.TypeProto]:
    """Leave the types of maps open in a message, in place; what they were, by the name of the value."""
    found = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        if holds_map(value.type):
            found[value.name] = onnx.TypeProto()
            found[value.name].CopyFrom(value.type)
            value.ClearField("type")
    return found


def remember_maps(model: ir.Model, types: dict[str, onnx.TypeProto]) -> None:
    """Let a model, and all copies of it, know the types that were set aside."""
    model.graph.meta[_FROM_FILE] = types


def map_values(model: ir.Model) -> frozenset[str]:
    """Names of the values of a model that are maps, as far as its file says so."""
    return frozenset(model.graph.meta.get(_FROM_FILE, ()))


def write_maps(model: ir.Model, graph: onnx.GraphProto) -> None:
    """Put the types that were set aside into a message again, in place."""
    types: dict[str, onnx.TypeProto] = model.graph.meta.get(_FROM_FILE, {})
    for value in (*graph.input, *graph.output):
        if value.name in types:
            value.type.CopyFrom(types[value.name])
