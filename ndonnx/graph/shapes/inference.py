"""Types and shapes of a graph's values, from whoever knows them: ONNX, the file, onnxruntime."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from ndonnx.graph.shapes.declared import believe_statements, remember_statements, set_aside
from ndonnx.graph.shapes.onnx_inference import take_inferred
from ndonnx.graph.shapes.onnxruntime_types import ask_onnxruntime, believe, try_out, undefined_outputs


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


def infer_types(model: ir.Model, proto: onnx.ModelProto | None) -> None:
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
