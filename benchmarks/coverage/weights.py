"""Which weights count: all but embedding tables and the last classifier, which no method of ours may touch."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from benchmarks.coverage.findings import Coverage, Kept, operators_of
from ndonnx.graph.costs import constant_of, is_weight
from ndonnx.graph.dataflow import reads
from ndonnx.partition import Partition

_TOLD_SHARE = 0.001
"""Share of the weights from which a piece that is kept is worth a line."""
_LINEAR = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_PASS = {
    "Add", "Cast", "Concat", "Div", "Exp", "Flatten", "Identity", "LogSoftmax", "Mul", "Reshape", "Resize", "Sigmoid",
    "Slice", "Softmax", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze",
}  # fmt: skip


def shares(parts: Partition, found: Coverage) -> None:
    """Take note of which part of the weights lies in distillable neighbourhoods, and of what is kept."""
    graph = parts.model.graph
    aside = embeddings(graph) | classifiers(graph)
    total = _size(_weights(graph) - aside)
    found.neighbourhoods, found.distillable = len(parts.neighbourhoods), len(parts.distillable)
    sizes = {n.name: _size(_weights(n.nodes) - aside) for n in parts.neighbourhoods}
    inside = set().union(*(_weights(n.nodes) for n in parts.distillable)) - aside
    found.share = _size(inside) / total if total else 0.0
    found.largest = max((sizes[n.name] for n in parts.distillable), default=0) / total if total else 0.0
    for n in sorted(parts.neighbourhoods, key=lambda n: -sizes[n.name]):
        if not n.distillable and total and sizes[n.name] > _TOLD_SHARE * total:
            found.kept.append(Kept(n.name, sizes[n.name] / total, n.reason or "", operators_of(n.nodes)))


def embeddings(graph: ir.Graph) -> set[ir.Value]:
    """Tables that a `Gather` reads rows of."""
    heads = (node.inputs[0] for node in graph if node.op_type == "Gather")
    return {value for value in heads if value is not None and is_weight(value)}


def classifiers(graph: ir.Graph) -> set[ir.Value]:
    """Weights of linear operators whose output is the model's, but for a change of form (boxes decoded, say)."""
    found: set[ir.Value] = set()
    stack, seen = list(graph.outputs), set()
    while stack:
        node = stack.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.op_type in _LINEAR:
            found |= _weights([node])
            continue
        inputs = [v for v in node.inputs if v is not None and constant_of(v) is None]
        # A sum of two activations closes a residual unit, unless both come from the very same operators.
        if node.op_type == "Concat" or (node.op_type in _PASS and len({_made_by(v) for v in inputs}) == 1):
            stack += inputs
            found |= _weights([node])
    return found


def _made_by(value: ir.Value) -> frozenset[ir.Value]:
    """Outputs of the linear operators, and inputs of the model, that a value is made from without others between."""
    made, stack, seen = set(), [value], {value}
    while stack:
        value = stack.pop()
        node = value.producer()
        if node is None or node.op_type in _LINEAR:
            made.add(value)
            continue
        before = {v for v in node.inputs if v is not None and constant_of(v) is None} - seen
        seen |= before
        stack += before
    return frozenset(made)


def _weights(nodes: Iterable[ir.Node]) -> set[ir.Value]:
    return {value for node in nodes for value in reads(node) if is_weight(value)}


def _size(values: Iterable[ir.Value]) -> int:
    return sum(int(tensor.size) for value in values if (tensor := constant_of(value)) is not None)
