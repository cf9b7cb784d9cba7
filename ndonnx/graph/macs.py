"""What a run of a model multiplies: multiply-accumulates of its operators, for one shape of each input.

A number is told where every shape that it depends on is known, and None otherwise. Counted are sums of products:
element-wise operators, norms, pools and transforms count nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import onnx_ir as ir

from ndonnx.graph.bound import BoundShapes, bind
from ndonnx.graph.costs import Cost, constant_of, parameters_of
from ndonnx.graph.dataflow import STANDARD_DOMAINS, sub_graphs
from ndonnx.graph.einsum import contractions

_DOMAINS = {*STANDARD_DOMAINS, "com.microsoft"}


def cost_of(nodes: Iterable[ir.Node], shapes: BoundShapes) -> Cost:
    """Cost of a set of nodes of one graph; a weight that several of them share counts once."""
    nodes = list(nodes)
    return Cost(parameters_of(nodes), _total(macs_of(node, shapes) for node in nodes))


def sample_cost(nodes: Iterable[ir.Node], shapes: BoundShapes) -> Cost:
    """Cost for one sample: MACs of a run over several are shared out among them."""
    cost = cost_of(nodes, shapes)
    return Cost(cost.parameters, None if cost.macs is None else round(cost.macs / shapes.samples))


def slice_cost(model: ir.Model, inputs: Mapping[str, Sequence[int]] | None = None) -> Cost:
    """Cost of a whole model or slice, for stated shapes of its inputs (see `bind`)."""
    return cost_of(model.graph, bind(model, inputs))


def macs_of(node: ir.Node, shapes: BoundShapes) -> int | None:
    """Multiply-accumulates of one node; 0 for an operator that does none, None where they cannot be told."""
    if node.domain not in _DOMAINS:
        return 0
    if node.op_type in _UNCOUNTED:
        return None
    if node.op_type in _RUNS_BODY:
        return _RUNS_BODY[node.op_type](node, shapes)
    count = _MACS.get(node.op_type)
    if count is None:
        return 0
    try:
        return count(_Sizes(node, shapes))
    except (IndexError, KeyError, TypeError, ValueError):
        return None  # a shape is not known, or the node does not fit its operator's definition


class _Sizes:
    """Shapes and attributes of one node; what is not known raises, so that no number is made of it."""

    def __init__(self, node: ir.Node, shapes: BoundShapes) -> None:
        self._node, self._shapes = node, shapes

    def has(self, position: int) -> bool:
        """Whether the node has this input."""
        return position < len(self._node.inputs) and self._node.inputs[position] is not None

    def input(self, position: int) -> tuple[int, ...]:
        """Shape of an input; TypeError where it is not known."""
        return _known(self._shapes.of(self._node.inputs[position]))

    @property
    def inputs(self) -> list[tuple[int, ...]]:
        """Shapes of all inputs; TypeError where one is not known."""
        return [self.input(position) for position in range(len(self._node.inputs))]

    @property
    def output(self) -> tuple[int, ...]:
        """Shape of the first output; TypeError where it is not known."""
        return _known(self._shapes.of(self._node.outputs[0]))

    def number(self, name: str, default: int = 0) -> int:
        """An integer attribute."""
        attribute = self._node.attributes.get(name)
        return default if attribute is None else attribute.as_int()

    def numbers(self, name: str) -> list[int]:
        """An attribute of integers; empty where it is not there."""
        attribute = self._node.attributes.get(name)
        return [] if attribute is None else list(attribute.as_ints())

    def text(self, name: str) -> str:
        """A string attribute; KeyError where it is not there."""
        return self._node.attributes[name].as_string()


def _known(shape: tuple[int, ...] | None) -> tuple[int, ...]:
    if shape is None:
        raise TypeError("a shape is not known")
    return shape


_Count = Callable[[_Sizes], int]


def _convolution(weight: int) -> _Count:
    """The weight's position among the inputs; its first axis is that of the output's channels."""
    return lambda node: math.prod(node.input(weight)[1:]) * math.prod(node.output)


def _transposed_convolution(node: _Sizes) -> int:
    return math.prod(node.input(1)[1:]) * math.prod(node.input(0))


def _matrix_product(node: _Sizes) -> int:
    left = node.input(0)
    summed = left[-2] if node.number("transA") and len(left) > 1 else left[-1]
    return math.prod(node.output) * summed


def _packed_matrix_product(node: _Sizes) -> int:
    return math.prod(node.output) * node.number("K")


def _recurrent(node: _Sizes) -> int:
    steps, batch, *_ = node.input(0)
    return steps * batch * (math.prod(node.input(1)) + math.prod(node.input(2)))


def _einsum(node: _Sizes) -> int:
    return contractions(node.text("equation"), node.inputs)


def _attention(node: _Sizes) -> int:
    """ONNX's own: heads on an axis of their own, or in the last one."""
    query, key, value = (node.input(position) for position in range(3))
    if len(query) == 4:
        batch, heads, rows, width = query
        new, of_value = key[2], value[3]
    else:
        batch, rows, whole = query
        heads = node.number("q_num_heads")
        width, new, of_value = whole // heads, key[1], value[2] // node.number("kv_num_heads")
    seen = new + (node.input(4)[2] if node.has(4) else 0)
    return batch * heads * rows * seen * (width + of_value)


def _fused_attention(weight: int, past: int) -> _Count:
    """onnxruntime's, with the projection of queries, keys and values inside."""

    def count(node: _Sizes) -> int:
        (batch, rows, width), (_, made) = node.input(0), node.input(weight)
        of_query, _, of_value = node.numbers("qkv_hidden_sizes") or [made // 3] * 3
        seen = rows + (node.input(past)[3] if node.has(past) else 0)
        return batch * rows * (width * made + seen * (of_query + of_value))

    return count


def _multi_head_attention(node: _Sizes) -> int:
    """onnxruntime's, behind the projections, which may come packed into one tensor."""
    query = node.input(0)
    batch, rows = query[:2]
    if len(query) == 5:  # queries, keys and values of each head side by side
        width = of_value = query[2] * query[4]
        new = rows
    else:
        width, key = query[2], node.input(1)
        packed = len(key) == 5
        new = key[2] if len(key) == 4 else key[1]
        of_value = width if packed else math.prod(node.input(2)) // (batch * new)
    seen = new + (node.input(6)[2] if node.has(6) else 0)
    return batch * rows * seen * (width + of_value)


def _group_query_attention(node: _Sizes) -> int:
    batch, rows, width = node.input(0)
    heads = node.number("num_heads")
    if not node.has(1):  # keys and values come packed behind the queries
        width = width // (heads + 2 * node.number("kv_num_heads")) * heads
    seen = rows + (node.input(3)[2] if node.has(3) else 0)
    return 2 * batch * rows * seen * width


_MACS: dict[str, _Count] = {
    "Attention": lambda node: (_fused_attention(1, 4) if len(node.input(1)) == 2 else _attention)(node),
    "Conv": _convolution(1),
    "ConvInteger": _convolution(1),
    "ConvTranspose": _transposed_convolution,
    "DeformConv": _convolution(1),
    "DynamicQuantizeLSTM": _recurrent,
    "DynamicQuantizeMatMul": _matrix_product,
    "Einsum": _einsum,
    "FusedConv": _convolution(1),
    "FusedGemm": _matrix_product,
    "FusedMatMul": _matrix_product,
    "GRU": _recurrent,
    "Gemm": _matrix_product,
    "GroupQueryAttention": _group_query_attention,
    "LSTM": _recurrent,
    "MatMul": _matrix_product,
    "MatMulInteger": _matrix_product,
    "MatMulIntegerToFloat": _matrix_product,
    "MatMulNBits": _packed_matrix_product,
    "MultiHeadAttention": _multi_head_attention,
    "NhwcFusedConv": _convolution(1),
    "QAttention": _fused_attention(1, 8),
    "QGemm": _matrix_product,
    "QLinearConv": _convolution(3),
    "QLinearMatMul": _matrix_product,
    "RNN": _recurrent,
}

_UNCOUNTED = {
    "CausalConvWithState", "DecoderAttention", "DecoderMaskedMultiHeadAttention", "DecoderMaskedSelfAttention",
    "LinearAttention", "LongformerAttention", "MatMulBnb4", "MoE", "PackedAttention", "PackedMultiHeadAttention",
    "PagedAttention", "QLinearConvTranspose", "QMoE", "QOrderedAttention", "QOrderedMatMul", "SparseAttention",
    "SparseToDenseMatMul",
}  # fmt: skip
"""Operators that multiply, and that nobody has counted here yet: no number is better than 0."""


def _total(parts: Iterable[int | None]) -> int | None:
    counted = list(parts)
    return None if None in counted else sum(count for count in counted if count is not None)


def _of_body(graph: Iterable[ir.Node], shapes: BoundShapes) -> int | None:
    return _total(macs_of(node, shapes) for node in graph)


def _one_branch(node: ir.Node, shapes: BoundShapes) -> int | None:
    """One of the branches is run: the dearer."""
    branches = [_of_body(graph, shapes) for graph in sub_graphs(node)]
    return None if None in branches else max((count for count in branches if count is not None), default=0)


def _each_step(node: ir.Node, shapes: BoundShapes) -> int | None:
    """The body is run as often as the first scanned input is long."""
    once = _total(_of_body(graph, shapes) for graph in sub_graphs(node))
    scanned = node.attributes["num_scan_inputs"].as_int()
    shape = shapes.of(node.inputs[-scanned])
    axes = node.attributes.get("scan_input_axes")
    axis = axes.as_ints()[0] if axes is not None else 0
    return 0 if once == 0 else None if once is None or shape is None else once * shape[axis]


def _each_turn(node: ir.Node, shapes: BoundShapes) -> int | None:
    """The body is run as often as a constant says; where something computed ends it, nobody knows."""
    once = _total(_of_body(graph, shapes) for graph in sub_graphs(node))
    if not once:
        return once
    turns, condition = constant_of(node.inputs[0]), node.inputs[1]
    body = next(iter(sub_graphs(node)))
    ends_early = constant_of(body.outputs[0]) is None and not _passes_on(body, body.outputs[0])
    if turns is None or ends_early or (condition is not None and constant_of(condition) is None):
        return None
    return once * int(turns.numpy().reshape(-1)[0])


def _passes_on(body: ir.Graph, condition: ir.Value) -> bool:
    """Whether a loop's condition is handed on from turn to turn as it came in."""
    maker = condition.producer()
    while maker is not None and maker.op_type == "Identity":
        assert maker.inputs[0] is not None
        condition = maker.inputs[0]
        maker = condition.producer()
    return maker is None and len(body.inputs) > 1 and condition is body.inputs[1]


_RUNS_BODY: dict[str, Callable[[ir.Node, BoundShapes], int | None]] = {
    "If": _one_branch,
    "Loop": _each_turn,
    "Scan": _each_step,
}
