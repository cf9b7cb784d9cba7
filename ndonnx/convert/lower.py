"""A slice, rewritten so that onnx2torch converts it: weights become inputs, known operators ours.

onnx2torch copies the weights of some operators into modules (transposed or scaled), makes
buffers of others, and loses which of them are one tensor. As graph inputs they all pass
through unchanged, one input for each initializer, so that training and writing back need no
table of where a weight went.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx_ir as ir

from ndonnx.convert.fuse_rounding import fuse_rounding
from ndonnx.convert.fusing import fuse_activations
from ndonnx.convert.registry import DOMAIN, OPSET_ATTRIBUTE, has_converter
from ndonnx.graph.costs import is_weight
from ndonnx.graph.shapes.inference import infer_shapes

_STATIC_INPUTS = {
    "Attention": {3},
    "Clip": {1, 2},
    "DequantizeLinear": {1, 2},
    "Dropout": {1},
    "GridSample": {1},
    "OneHot": {1, 2},
    "Pad": {2},
    "QuantizeDequantize": {1, 2},
    "QuantizeLinear": {1, 2},
    "Range": {0, 1, 2},
    "Resize": {1, 2},
    "RotaryEmbedding": {1, 2},
    "STFT": {2},
    "Upsample": {1},
}
"""Inputs that configure an operator; floating-point constants there are no weights."""

_MOMENTS = {"BatchNormalization": {3, 4}}
"""Inputs that hold statistics: carried along, never trained."""

_FURTHER_OUTPUTS = {
    "Attention",
    "BatchNormalization",
    "Dropout",
    "GRU",
    "LSTM",
    "LayerNormalization",
    "MaxPool",
    "RMSNormalization",
    "RNN",
    "SimplifiedLayerNormalization",
}
"""Operators whose outputs after the first are optional: those that nothing reads are dropped."""


@dataclass(frozen=True)
class Lowered:
    """What onnx2torch is given, and which initializers its extra inputs stand for."""

    proto: onnx.ModelProto
    """Inputs: the slice's own, then the weights in the order of `weights`."""
    weights: tuple[str, ...]
    """Names of the slice's floating-point initializers."""
    moments: frozenset[str]
    """Inputs of operators that are running statistics: never trained."""


def lower(model: ir.Model) -> Lowered:
    """Rewrite a copy of a slice; the slice itself is not changed."""
    copy = infer_shapes(model.clone())
    graph, opset = copy.graph, copy.opset_imports.get("", 1)
    fuse_activations(graph)
    fuse_rounding(graph)
    weights = [value for value in graph.initializers.values() if is_weight(value) and not _is_static(value)]
    moments = {value.name for value in weights if _is_moment(value)}
    for value in weights:
        del graph.initializers[value.name or ""]
        graph.inputs.append(value)
        value.const_value = None
    for index, node in enumerate(graph):
        node.name = f"node_{index}"
        _drop_unread_outputs(node)
        if node.domain in ("", "ai.onnx") and has_converter(node.op_type):
            node.domain, node.version = DOMAIN, 1
            node.attributes[OPSET_ATTRIBUTE] = ir.AttrInt64(OPSET_ATTRIBUTE, opset)
    _separate_constants(graph)
    _end_in_single_output(graph)
    copy.opset_imports[DOMAIN] = 1
    return Lowered(ir.to_proto(copy), tuple(v.name or "" for v in weights), frozenset(n for n in moments if n))


def _is_static(value: ir.Value) -> bool:
    return any(index in _STATIC_INPUTS.get(node.op_type, ()) for node, index in value.uses())


def _is_moment(value: ir.Value) -> bool:
    return any(index in _MOMENTS.get(node.op_type, ()) for node, index in value.uses())


def _drop_unread_outputs(node: ir.Node) -> None:
    if node.op_type not in _FURTHER_OUTPUTS:
        return
    read = [index for index, value in enumerate(node.outputs) if value.uses() or value.is_graph_output()]
    node.resize_outputs(max(read, default=0) + 1)
    for index, value in enumerate(node.outputs):
        # One that is left out goes by the empty name, as an input that is left out does.
        value.name = value.name or f"{node.name}/unread{index}"


def _separate_constants(graph: ir.Graph) -> None:
    """Give every reader of a constant its own copy: onnx2torch stumbles over shared ones."""
    for value in list(graph.initializers.values()):
        for number, (node, index) in enumerate(value.uses()):
            if number:
                twin = ir.Value(
                    name=f"{value.name}/copy{number}", shape=value.shape, type=value.type, const_value=value.const_value
                )
                graph.register_initializer(twin)
                node.replace_input_with(index, twin)


def _end_in_single_output(graph: ir.Graph) -> None:
    """onnx2torch returns a node's outputs together: let the slice end in a node that has only one."""
    output = graph.outputs[0]
    producer = output.producer()
    if producer is None or len(producer.outputs) == 1:
        return
    end = ir.node("Identity", [output], name="node_end")
    end.outputs[0].name, end.outputs[0].type, end.outputs[0].shape = f"{output.name}/end", output.type, output.shape
    graph.append(end)
    graph.outputs[0] = end.outputs[0]
