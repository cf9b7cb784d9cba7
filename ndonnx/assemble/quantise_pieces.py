"""Which nodes of a student belong to which piece of its teacher, and what onnxruntime makes of a quantised student."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from ndonnx.partition import Partition
from ndonnx.teacher.sessions import optimised

_INTEGER = frozenset({
    "QLinearConv", "QLinearMatMul", "QGemm", "MatMulInteger", "ConvInteger", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention",
})  # fmt: skip
"""Operators of onnxruntime that multiply integers with integers."""
_FLOAT = frozenset({
    "Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "LSTM", "GRU",
    "RNN", "Attention", "MultiHeadAttention", "TransposeMatMul",
})  # fmt: skip
_STEPS = frozenset({"QuantizeLinear", "DequantizeLinear"})


@dataclass(frozen=True)
class Executed:
    """What onnxruntime executes of a quantised model on this machine."""

    quantised_nodes: int
    """Convolutions, matrix products and recurrent layers that are computed with integers."""
    float_nodes: int
    """Those that are computed with floats."""
    qdq_left: int
    """`QuantizeLinear` and `DequantizeLinear` that were not merged into other operators."""


def executed(model: ir.Model) -> Executed:
    """Count the operators of the graph that onnxruntime makes of a model.

    Raises:
        ModelError: onnxruntime refuses the model.
    """
    found = Counter(node.op_type for node in optimised(model).graph.node)
    counts = (sum(found[name] for name in names) for names in (_INTEGER, _FLOAT, _STEPS))
    return Executed(*counts)


def pieces_of(model: ir.Model, parts: Partition) -> dict[str, str]:
    """The piece of the partition that each node of a student is in, by the names of the nodes.

    A node that makes a value of the teacher is in the piece that the value is in. Any other, as the inner nodes of a
    student, is where the first node is that reads what it makes.
    """
    places = {v.name: n.name for n in parts.neighbourhoods for node in n.nodes for v in node.outputs}
    found: dict[ir.Node, str] = {}
    for node in reversed(list(model.graph)):
        own = next((places[value.name] for value in node.outputs if value.name in places), None)
        behind = (found[use.node] for value in node.outputs for use in value.uses() if use.node in found)
        piece = own or next(behind, None)
        if piece is not None:
            found[node] = piece
    return {node.name or "": piece for node, piece in found.items()}


def grouped(pieces: Mapping[str, str], heavy: Collection[str], order: Iterable[str], most: int) -> list[list[str]]:
    """All nodes by their piece, in the order of the pieces, where a piece holds one that is worth quantising.

    Args:
        pieces: of `pieces_of`.
        heavy: names of the nodes worth quantising; one that is in no piece is a group of its own.
        order: names of the pieces.
        most: number of groups; where there are more pieces, neighbours are joined.
    """
    each: dict[str, list[str]] = {piece: [] for piece in order}
    for name, piece in pieces.items():
        each[piece].append(name)
    groups = [group for group in each.values() if not set(heavy).isdisjoint(group)]
    groups += [[name] for name in heavy if name not in pieces]
    together = max(1, -(-len(groups) // most))
    starts = range(0, len(groups), together)
    return [[name for group in groups[start : start + together] for name in group] for start in starts]
