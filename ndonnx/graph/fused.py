"""Operators that onnxruntime fuses when it saves an optimised model, in the working copy taken apart again.

Behind them stand ONNX's own operators, which everything here knows. A student is written in these; onnxruntime
fuses them anew when it loads the model. An `Einsum` that is a matrix product is written as one, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

DOMAIN = "com.microsoft"
_INSIDE = "ndonnx.inside_fused"
"""Key of a value's metadata."""
_SQRT_HALF = math.sqrt(0.5)
_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715
_CLIP_INPUTS_SINCE, _LAYER_NORM_SINCE, _REDUCTION_INPUTS_SINCE = 11, 17, 18
"""Opsets."""


def is_inside_fused(value: ir.Value) -> bool:
    """Whether a value of the working copy lies inside an operator of the model, which does not have it by itself."""
    return bool(value.meta.get(_INSIDE, False))


def take_apart(model: ir.Model) -> bool:
    """Put ONNX's own operators in the place of fused ones; whether there were any. In place.

    A form that is not known, or of another type than float32, stays. Shapes are to be inferred again, and then
    this to be called again: what it needs to know of a shape may be known only then.
    """
    changed = False
    for node in list(model.graph):
        rules = _RULES if node.domain == DOMAIN else _OWN_RULES if node.domain in ("", "ai.onnx") else {}
        rule = rules.get(node.op_type)
        if rule is None or {value.dtype for value in node.inputs if value is not None} - {None} != {ir.DataType.FLOAT}:
            continue
        writer = _Writer(model.graph, node, model.opset_imports.get("", 1))
        try:
            found = rule(writer, node)
        except _MISFITS:
            continue
        if found is not None:
            writer.finish(found)
            changed = True
    return changed


_MISFITS = (AttributeError, IndexError, TypeError, ValueError)
"""What a node provokes that does not fit its operator's definition: inputs or attributes that cannot be."""


@dataclass(eq=False)
class _Writer:
    """Writes operators in front of the fused one."""

    graph: ir.Graph
    node: ir.Node
    opset: int
    count: int = 0

    def op(self, op: str, *inputs: ir.Value | None, **attributes: float | int | str | Sequence[int]) -> ir.Value:
        """One operator with one output."""
        made = ir.node(op, list(inputs), attributes=attributes, name=self._name())
        value = made.outputs[0]
        value.name, value.meta[_INSIDE] = made.name, True
        value.type = ir.TensorType(ir.DataType.FLOAT)
        self.graph.insert_before(self.node, made)
        return value

    def number(self, number: float) -> ir.Value:
        """A scalar."""
        return self.constant(np.array(number, np.float32))

    def constant(self, array: np.ndarray) -> ir.Value:
        name = self._name()
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        self.graph.register_initializer(value)
        return value

    def finish(self, outputs: Sequence[ir.Value | None]) -> None:
        """Give the new values the names and the readers of the fused operator's outputs, and remove it."""
        read = [old.uses() or old.is_graph_output() for old in self.node.outputs]
        for old, new, is_read in zip(self.node.outputs, outputs, read, strict=False):
            if new is not None and is_read:
                name, new.type, new.shape = old.name, old.type or new.type, old.shape or new.shape
                old.name, new.name = f"{name}/fused", name
                old.replace_all_uses_with(new, replace_graph_outputs=True)
                # A student that made one of several outputs would leave the operator in the model to make the others.
                new.meta[_INSIDE] = sum(map(bool, read)) > 1
        self.graph.remove(self.node, safe=True)

    def _name(self) -> str:
        self.count += 1
        return f"{next(value.name for value in self.node.outputs if value.name)}/part{self.count}"


Outputs = tuple[ir.Value | None, ...] | None
"""By the fused operator's outputs; None where its form is not known."""


def _activation(node: ir.Node) -> tuple[str, list[float]] | None:
    """Name and numbers of the activation in the node's attributes ("" for none); None for one that is not known."""
    given = node.attributes.get("activation_params")
    numbers = [float(number) for number in given.as_floats()] if given is not None else []
    name = node.attributes["activation"].as_string() if "activation" in node.attributes else ""
    return (name, numbers) if len(numbers) == _ACTIVATIONS.get(name, -1) else None


_ACTIVATIONS = {"": 0, "Clip": 2, "HardSigmoid": 2, "LeakyRelu": 1, "Relu": 0, "Sigmoid": 0, "Tanh": 0}
"""How many numbers come with each."""


def _activated(writer: _Writer, value: ir.Value, name: str, numbers: list[float]) -> ir.Value:
    if name == "Clip" and writer.opset >= _CLIP_INPUTS_SINCE:
        return writer.op(name, value, *map(writer.number, numbers))
    names = {"Clip": ("min", "max"), "HardSigmoid": ("alpha", "beta"), "LeakyRelu": ("alpha",)}.get(name, ())
    return writer.op(name, value, **dict(zip(names, numbers, strict=True))) if name else value


def _linear(op: str, inputs: int) -> Callable[[_Writer, ir.Node], Outputs]:
    """A linear operator, a summand where it takes one input more, and an activation."""

    def rule(writer: _Writer, node: ir.Node) -> Outputs:
        activation = _activation(node)
        if activation is None:
            return None
        out = writer.op(op, *node.inputs[:inputs])
        producer = out.producer()
        assert producer is not None
        own = {name: attribute for name, attribute in node.attributes.items() if not name.startswith("activation")}
        producer.attributes.update(own)
        summand = _input(node, inputs)
        if summand is not None:
            out = writer.op("Add", out, summand)
        return (_activated(writer, out, *activation),)

    return rule


def _fused_matmul(writer: _Writer, node: ir.Node) -> Outputs:
    sides = list(node.inputs[:2])
    if _number(node, "transBatchA", 0) or _number(node, "transBatchB", 0):
        return None
    turned = [bool(_number(node, name, 0)) for name in ("transA", "transB")]
    ranks = [len(side.shape) if side is not None and side.shape is not None else 0 for side in sides]
    if any(turn and rank < 2 for turn, rank in zip(turned, ranks, strict=True)):
        return None
    for i in (0, 1):
        if turned[i]:
            axes = list(range(ranks[i]))
            sides[i] = writer.op("Transpose", sides[i], perm=[*axes[:-2], axes[-1], axes[-2]])
    out = writer.op("MatMul", *sides)
    alpha = _number(node, "alpha", 1.0)
    return (writer.op("Mul", out, writer.number(alpha)) if alpha != 1 else out,)


def _gelu(writer: _Writer, node: ir.Node) -> Outputs:
    data, bias = node.inputs[0], _input(node, 1)
    x = writer.op("Add", data, bias) if bias is not None else data
    inner = writer.op("Erf", writer.op("Mul", x, writer.number(_SQRT_HALF)))
    return (_half_of(writer, x, inner),)


def _fast_gelu(writer: _Writer, node: ir.Node) -> Outputs:
    data, bias = node.inputs[0], _input(node, 1)
    x = writer.op("Add", data, bias) if bias is not None else data
    cube = writer.op("Mul", x, writer.op("Mul", x, x))
    inner = writer.op("Add", x, writer.op("Mul", cube, writer.number(_TANH_CUBE)))
    return (_half_of(writer, x, writer.op("Tanh", writer.op("Mul", inner, writer.number(_TANH_SCALE)))),)


def _half_of(writer: _Writer, x: ir.Value | None, inner: ir.Value) -> ir.Value:
    """x / 2 * (1 + inner)."""
    half = writer.op("Mul", x, writer.number(0.5))
    return writer.op("Mul", half, writer.op("Add", inner, writer.number(1)))


def _quick_gelu(writer: _Writer, node: ir.Node) -> Outputs:
    x = node.inputs[0]
    gate = writer.op("Sigmoid", writer.op("Mul", x, writer.number(_number(node, "alpha", 1.702))))
    return (writer.op("Mul", x, gate),)


def _skip_layer_norm(writer: _Writer, node: ir.Node) -> Outputs:
    total, scale, shift = _skip(writer, node, 4), node.inputs[2], _input(node, 3)
    epsilon = _number(node, "epsilon", 1e-12)
    if total is None:
        return None
    if writer.opset >= _LAYER_NORM_SINCE:
        sides = [scale] if shift is None else [scale, shift]
        return writer.op("LayerNormalization", total, *sides, axis=-1, epsilon=epsilon), None, None, total
    centred = writer.op("Sub", total, writer.op("ReduceMean", total, axes=[-1], keepdims=1))
    out = _scaled(writer, centred, scale, epsilon)
    return out if shift is None else writer.op("Add", out, shift), None, None, total


def _skip_rms_norm(writer: _Writer, node: ir.Node) -> Outputs:
    total = _skip(writer, node, 3)
    if total is None:
        return None
    return _scaled(writer, total, node.inputs[2], _number(node, "epsilon", 1e-12)), None, None, total


def _skip(writer: _Writer, node: ir.Node, bias_at: int) -> ir.Value | None:
    """The sum that is normalised; None where the moments are read too."""
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:3]):
        return None
    total, bias = writer.op("Add", *node.inputs[:2]), _input(node, bias_at)
    return total if bias is None else writer.op("Add", total, bias)


def _scaled(writer: _Writer, x: ir.Value, scale: ir.Value | None, epsilon: float) -> ir.Value:
    """x over the root of its mean square along the last axis, times a scale."""
    square = writer.op("Mul", x, x)
    if writer.opset < _REDUCTION_INPUTS_SINCE:
        mean = writer.op("ReduceMean", square, axes=[-1], keepdims=1)
    else:
        mean = writer.op("ReduceMean", square, writer.constant(np.array([-1], np.int64)), keepdims=1)
    root = writer.op("Sqrt", writer.op("Add", mean, writer.number(epsilon)))
    return writer.op("Mul", writer.op("Div", x, root), scale)


def _einsum(writer: _Writer, node: ir.Node) -> Outputs:
    """A product over one letter: of matrices that share their leading axes, or of a tensor and one matrix."""
    terms, arrow, out = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    left, right = terms.split(",")
    if not arrow or not all(term.isalpha() and len(set(term)) == len(term) for term in (left, right, out)):
        return None
    shared = "".join(letter for letter in out if letter in left and letter in right)
    rows = "".join(letter for letter in out if letter in left and letter not in right)
    columns = "".join(letter for letter in out if letter in right and letter not in left)
    summed = "".join(letter for letter in left if letter in right and letter not in out)
    known = len(shared + rows + columns) == len(out) and set(left + right) == set(out + summed)
    if not known or len(summed) != 1 or len(columns) != 1 or not rows or (shared and len(rows) != 1):
        return None
    product = writer.op(
        "MatMul",
        _turned(writer, node.inputs[0], left, shared + rows + summed),
        _turned(writer, node.inputs[1], right, shared + summed + columns),
    )
    return (_turned(writer, product, shared + rows + columns, out),)


def _turned(writer: _Writer, value: ir.Value | None, letters: str, wanted: str) -> ir.Value:
    assert value is not None
    return value if letters == wanted else writer.op("Transpose", value, perm=[letters.index(one) for one in wanted])


def _input(node: ir.Node, position: int) -> ir.Value | None:
    return node.inputs[position] if position < len(node.inputs) else None


def _number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)


_RULES: dict[str, Callable[[_Writer, ir.Node], Outputs]] = {
    "BiasGelu": _gelu,
    "FastGelu": _fast_gelu,
    "FusedConv": _linear("Conv", 3),
    "FusedGemm": _linear("Gemm", 3),
    "FusedMatMul": _fused_matmul,
    "Gelu": _gelu,
    "QuickGelu": _quick_gelu,
    "SkipLayerNormalization": _skip_layer_norm,
    "SkipSimplifiedLayerNormalization": _skip_rms_norm,
}
_OWN_RULES: dict[str, Callable[[_Writer, ir.Node], Outputs]] = {"Einsum": _einsum}
"""Of ONNX's own operators."""
