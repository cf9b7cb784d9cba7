"""Which nodes of a student belong to which piece of its teacher, and what onnxruntime makes of a quantised student."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from ndonnx.graph.costs import constant_of
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


def wished(model: ir.Model) -> int:
    """How many convolutions and matrix products the file of a model wants to be computed with integers; 0 for none."""
    return sum(node.op_type in _INTEGER or _reads_integers(node) for node in model.graph)


def _reads_integers(node: ir.Node) -> bool:
    """Whether all that a float operator multiplies is dequantised."""
    makers = [None if value is None else value.producer() for value in node.inputs[:2]]
    return node.op_type in _FLOAT and all(m is not None and m.op_type == "DequantizeLinear" for m in makers)


def how_executed(model: ir.Model) -> tuple[Executed, tuple[str, ...]] | None:
    """What onnxruntime executes of a model with integers, and what of it is not as the file wants it, a line each.

    None for a model without any integers.

    Raises:
        ModelError: onnxruntime refuses the model.
    """
    wanted = wished(model)
    if not wanted and not any(node.op_type in _STEPS for node in model.graph):
        return None
    found = executed(model)
    return found, tuple(_unkept(wanted, found))


def _unkept(wanted: int, found: Executed) -> Iterator[str]:
    if found.quantised_nodes < wanted:
        yield (
            f"of {wanted} layers that are in 8 bits in the file, onnxruntime computes {found.quantised_nodes} with "
            "integers on this machine"
        )
    if found.quantised_nodes > wanted:
        yield (
            f"onnxruntime computes {found.quantised_nodes} layers with integers, where only {wanted} are in 8 bits in "
            "the file: it has quantised others by itself"
        )


def pieces_of(model: ir.Model, parts: Partition) -> dict[str, str]:
    """The piece of the partition that each node of a student is in, by the names of the nodes.

    A node that makes a value of the teacher is in the piece that the value is in. Any other, as the inner nodes of a
    student, is where the first node is that reads what it makes.
    """
    return {node.name or "": piece for node, piece in _placed(model, parts).items()}


def _placed(model: ir.Model, parts: Partition) -> dict[ir.Node, str]:
    places = {v.name: n.name for n in parts.neighbourhoods for node in n.nodes for v in node.outputs}
    found: dict[ir.Node, str] = {}
    for node in reversed(list(model.graph)):
        own = next((places[value.name] for value in node.outputs if value.name in places), None)
        behind = (found[use.node] for value in node.outputs for use in value.uses() if use.node in found)
        piece = own or next(behind, None)
        if piece is not None:
            found[node] = piece
    return found


def bits_of_pieces(model: ir.Model, parts: Partition) -> dict[str, int]:
    """Bits of most of the weights of each piece, 8 or 32, as a student's graph holds them; without weights none."""
    found: dict[str, Counter[int]] = {}
    for node, piece in _placed(model, parts).items():
        for tensor in _matrices(node):
            bits = 8 if tensor.dtype in _BYTES else 32
            found.setdefault(piece, Counter())[bits] += int(tensor.size)
    return {piece: max(counted, key=lambda bits: counted[bits]) for piece, counted in found.items()}


_BYTES = (ir.DataType.INT8, ir.DataType.UINT8)


def _matrices(node: ir.Node) -> list[ir.TensorProtocol]:
    """Weights of several axes that a node reads, as integers or as floats; scales and zero points have one at most."""
    tensors = [constant_of(value) for value in node.inputs]
    kinds = (*_BYTES, ir.DataType.FLOAT, ir.DataType.FLOAT16)
    return [tensor for tensor in tensors if tensor is not None and tensor.dtype in kinds and len(tensor.shape) > 1]


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
