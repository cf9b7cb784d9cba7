"""Operators that onnxruntime fuses when it saves an optimised model, in the working copy taken apart again.

Behind them stand ONNX's own operators, which everything here knows. A student is written in these; onnxruntime
fuses them anew when it loads the model. An `Einsum` that is a matrix product is written as one, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from ndonnx.graph.passes.einsum_products import einsum
from ndonnx.graph.passes.fused_attention import attention, embed_layer_norm, multi_head_attention
from ndonnx.graph.passes.fused_writer import Outputs, Writer, input_of, is_read, number_of

DOMAIN = "com.microsoft"
_SQRT_HALF = math.sqrt(0.5)
_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715
_CLIP_INPUTS_SINCE = 11
"""Opset."""

Rule = Callable[[Writer, ir.Node], Outputs]


def take_apart(model: ir.Model) -> bool:
    """Put ONNX's own operators in the place of fused ones; whether there were any. In place.

    A form that is not known, or of another type than float32, stays. Shapes are to be inferred again, and then
    this to be called again: what it needs to know of a shape may be known only then.
    """
    found = [node for node in list(model.graph) if take_node_apart(model, node)]
    return bool(found)


def take_node_apart(model: ir.Model, node: ir.Node) -> bool:
    """Put ONNX's own operators in the place of one node, if it is a fused one of a known form. In place."""
    rules = _RULES if node.domain == DOMAIN else _OWN_RULES if node.domain == "" else {}
    rule = rules.get(node.op_type)
    if rule is None or _floats_read(node) != {ir.DataType.FLOAT}:
        return False
    writer = Writer(model.graph, node, model.opset_imports.get("", 1))
    try:
        found = rule(writer, node)
    except _MISFITS:
        found = None
    if found is None:
        writer.discard()
        return False
    writer.finish(found)
    return True


def _floats_read(node: ir.Node) -> set[ir.DataType]:
    kinds = {value.dtype for value in node.inputs if value is not None and value.dtype is not None}
    return {kind for kind in kinds if kind.is_floating_point()}


_MISFITS = (AttributeError, IndexError, TypeError, ValueError)
"""What a node provokes that does not fit its operator's definition: inputs or attributes that cannot be."""


def _activation(node: ir.Node) -> tuple[str, list[float]] | None:
    """Name and numbers of the activation in the node's attributes ("" for none); None for one that is not known."""
    given = node.attributes.get("activation_params")
    numbers = [float(number) for number in given.as_floats()] if given is not None else []
    name = node.attributes["activation"].as_string() if "activation" in node.attributes else ""
    return (name, numbers) if len(numbers) == _ACTIVATIONS.get(name, -1) else None


_ACTIVATIONS = {"": 0, "Clip": 2, "HardSigmoid": 2, "LeakyRelu": 1, "Relu": 0, "Sigmoid": 0, "Tanh": 0}
"""How many numbers come with each."""


def _activated(writer: Writer, value: ir.Value, name: str, numbers: list[float]) -> ir.Value:
    if name == "Clip" and writer.opset >= _CLIP_INPUTS_SINCE:
        return writer.op(name, value, *map(writer.number, numbers))
    names = {"Clip": ("min", "max"), "HardSigmoid": ("alpha", "beta"), "LeakyRelu": ("alpha",)}.get(name, ())
    attributes: dict[str, Any] = dict(zip(names, numbers, strict=True))
    return writer.op(name, value, **attributes) if name else value


def _linear(op: str, inputs: int) -> Rule:
    """A linear operator, a summand where it takes one input more, and an activation."""

    def rule(writer: Writer, node: ir.Node) -> Outputs:
        activation = _activation(node)
        if activation is None:
            return None
        out = writer.op(op, *node.inputs[:inputs])
        producer = out.producer()
        assert producer is not None
        own = {name: attribute for name, attribute in node.attributes.items() if not name.startswith("activation")}
        producer.attributes.update(own)
        summand = input_of(node, inputs)
        if summand is not None:
            out = writer.op("Add", out, summand)
        return (_activated(writer, out, *activation),)

    return rule


def _fused_matmul(writer: Writer, node: ir.Node) -> Outputs:
    sides = list(node.inputs[:2])
    if number_of(node, "transBatchA", 0) or number_of(node, "transBatchB", 0):
        return None
    turned = [bool(number_of(node, name, 0)) for name in ("transA", "transB")]
    ranks = [len(side.shape) if side is not None and side.shape is not None else 0 for side in sides]
    if any(turn and rank < 2 for turn, rank in zip(turned, ranks, strict=True)):
        return None
    for i in (0, 1):
        if turned[i]:
            axes = list(range(ranks[i]))
            sides[i] = writer.op("Transpose", sides[i], perm=[*axes[:-2], axes[-1], axes[-2]])
    out = writer.op("MatMul", *sides)
    alpha = number_of(node, "alpha", 1.0)
    return (writer.op("Mul", out, writer.number(alpha)) if alpha != 1 else out,)


def _gelu(writer: Writer, node: ir.Node) -> Outputs:
    data, bias = node.inputs[0], input_of(node, 1)
    x = writer.op("Add", data, bias) if bias is not None else data
    inner = writer.op("Erf", writer.op("Mul", x, writer.number(_SQRT_HALF)))
    return (_half_of(writer, x, inner),)


def _fast_gelu(writer: Writer, node: ir.Node) -> Outputs:
    data, bias = node.inputs[0], input_of(node, 1)
    x = writer.op("Add", data, bias) if bias is not None else data
    cube = writer.op("Mul", x, writer.op("Mul", x, x))
    inner = writer.op("Add", x, writer.op("Mul", cube, writer.number(_TANH_CUBE)))
    return (_half_of(writer, x, writer.op("Tanh", writer.op("Mul", inner, writer.number(_TANH_SCALE)))),)


def _half_of(writer: Writer, x: ir.Value | None, inner: ir.Value) -> ir.Value:
    """x / 2 * (1 + inner)."""
    half = writer.op("Mul", x, writer.number(0.5))
    return writer.op("Mul", half, writer.op("Add", inner, writer.number(1)))


def _quick_gelu(writer: Writer, node: ir.Node) -> Outputs:
    x = node.inputs[0]
    gate = writer.op("Sigmoid", writer.op("Mul", x, writer.number(number_of(node, "alpha", 1.702))))
    return (writer.op("Mul", x, gate),)


def _skip_layer_norm(writer: Writer, node: ir.Node) -> Outputs:
    total = _skip(writer, node, 4)
    if total is None:
        return None
    out = writer.layer_norm(total, node.inputs[2], input_of(node, 3), number_of(node, "epsilon", 1e-12))
    return out, None, None, total


def _skip_rms_norm(writer: Writer, node: ir.Node) -> Outputs:
    total = _skip(writer, node, 3)
    if total is None:
        return None
    return writer.scaled(total, node.inputs[2], number_of(node, "epsilon", 1e-12)), None, None, total


def _skip(writer: Writer, node: ir.Node, bias_at: int) -> ir.Value | None:
    """The sum that is normalised; None where the moments are read too."""
    if is_read(node, 1) or is_read(node, 2):
        return None
    total, bias = writer.op("Add", *node.inputs[:2]), input_of(node, bias_at)
    return total if bias is None else writer.op("Add", total, bias)


_RULES: dict[str, Rule] = {
    "Attention": attention,
    "BiasGelu": _gelu,
    "EmbedLayerNormalization": embed_layer_norm,
    "FastGelu": _fast_gelu,
    "FusedConv": _linear("Conv", 3),
    "FusedGemm": _linear("Gemm", 3),
    "FusedMatMul": _fused_matmul,
    "Gelu": _gelu,
    "MultiHeadAttention": multi_head_attention,
    "QuickGelu": _quick_gelu,
    "SkipLayerNormalization": _skip_layer_norm,
    "SkipSimplifiedLayerNormalization": _skip_rms_norm,
    "TransposeMatMul": _fused_matmul,
}
_OWN_RULES: dict[str, Rule] = {"Einsum": einsum}
"""Of ONNX's own operators."""
