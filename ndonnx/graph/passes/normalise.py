"""The working copy: constant parts computed once and held as initializers, open shapes filled in."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from ndonnx.errors import ModelError, first_line
from ndonnx.graph.costs import dims
from ndonnx.graph.dataflow import Kind, kinds_of
from ndonnx.graph.passes.fused import take_apart
from ndonnx.graph.passes.initial_states import drop_zero_states
from ndonnx.graph.save import serialise, tensor_bytes
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.graph.shapes.onnxruntime_types import open_quietly
from ndonnx.graph.shapes.symbolic import resolve_shapes
from ndonnx.graph.shapes.targets import write_targets
from ndonnx.graph.ties import unite_views
from ndonnx.runtime.gc_pause import gc_paused

FOLD_LIMIT = 256 * 2**20
"""Bytes that one constant may always take (a `ConstantOfShape` can ask for anything); more if the model itself does."""


@gc_paused()
def fold_constants(model: ir.Model) -> ir.Model:
    """Replace every value computed from constants alone by an initializer of the same name.

    Works in place on a slice and returns it. Nodes that became dead go; initializers that
    nothing reads any more go with them. A view of a matrix that something else reads too stays a node
    (`ndonnx.graph.ties`): both are one weight. Initializers are taken off the inputs, and initial states of zeros off
    their readers. Operators that onnxruntime fused are taken apart. Shapes that ONNX's inference left open are
    filled in where they follow from the graph, and target shapes become constants.

    Raises:
        ModelError: a constant cannot be computed, or is far larger than the model.
    """
    _take_initializers_off_inputs(model.graph)
    _open_unknown_sizes(model)
    while take_apart(model):
        infer_shapes(model)
    unite_views(model.graph)
    _fold(model)
    if drop_zero_states(model):
        _drop_dead(model.graph)
    resolve_shapes(model)
    if write_targets(model):
        _drop_dead(model.graph)
        _fold(model)
    return model


def _fold(model: ir.Model) -> None:
    graph = model.graph
    kinds = kinds_of(graph)
    wanted = [
        value
        for node in graph
        if kinds[node.outputs[0]] is Kind.CONSTANT
        for value in node.outputs
        if value.is_graph_output() or any(kinds.get(user.outputs[0]) is not Kind.CONSTANT for user in value.consumers())
    ]
    for value, array in zip(wanted, evaluate_constants(model, wanted), strict=True):
        name = value.name
        tensor = ir.tensor(array, name=name)
        replacement = ir.Value(
            name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype)
        )
        value.name = f"{name}/folded"
        value.replace_all_uses_with(replacement, replace_graph_outputs=True)
        graph.register_initializer(replacement)
    _drop_dead(graph)


def _take_initializers_off_inputs(graph: ir.Graph) -> None:
    for value in [value for value in graph.inputs if value.name in graph.initializers]:
        graph.inputs.remove(value)


def _open_unknown_sizes(model: ir.Model) -> None:
    """Let sizes of inputs that are not above 0 be open: exporters write such numbers for what they do not know."""
    inputs = [value for value in model.graph.inputs if any(_is_unknown(size) for size in value.shape or ())]
    if not inputs:
        return
    firsts = [value.shape[0] for value in model.graph.inputs if value.shape]
    samples = next((size for size in firsts if isinstance(size, ir.SymbolicDim)), ir.SymbolicDim("samples"))
    for value in inputs:
        value.shape = ir.Shape(
            (samples if axis == 0 else ir.SymbolicDim(f"{value.name}/{axis}")) if _is_unknown(size) else size
            for axis, size in enumerate(value.shape or ())
        )
    for node in model.graph:
        for value in node.outputs:
            value.shape = None  # it was inferred from sizes that there are not
    infer_shapes(model)


def _is_unknown(size: int | ir.SymbolicDim) -> bool:
    return isinstance(size, int) and size <= 0


def evaluate_constants(model: ir.Model, wanted: list[ir.Value]) -> list[np.ndarray]:
    """Values of constants, small ones read off, the rest computed by onnxruntime without inputs."""
    ready = {
        value: tensor.numpy() for value in wanted if (tensor := ir.convenience.get_const_tensor(value)) is not None
    }
    rest = [value for value in wanted if value not in ready]
    if rest:
        part = ir.Model(ir.convenience.extract(model.graph, [], rest), ir_version=model.ir_version)
        _check_sizes(part.graph, max(FOLD_LIMIT, tensor_bytes(model)))
        try:
            session = open_quietly(serialise(part))
            ready |= dict(zip(rest, session.run([value.name for value in rest], {}), strict=True))
        except Exception as error:  # onnxruntime's errors share no base class; all mean that the graph is at fault
            raise ModelError(
                f"the model's constant part, up to '{rest[0].name}', cannot be computed: {first_line(error)}"
            ) from error
    return [ready[value] for value in wanted]


def _check_sizes(graph: ir.Graph, limit: int) -> None:
    for node in graph:
        for value in node.outputs:
            shape = dims(value)
            itemsize = value.dtype.itemsize if value.dtype not in (None, ir.DataType.STRING) else 1
            size = math.prod(shape or (0,)) * itemsize
            if size > limit:
                raise ModelError(
                    f"the constant '{value.name}' would take {size:.2g} bytes; at most {limit:.2g} are allowed"
                )


def _drop_dead(graph: ir.Graph) -> None:
    for node in reversed(list(graph)):
        if not any(value.is_graph_output() or value.uses() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
