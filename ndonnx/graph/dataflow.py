"""The graph as a flow of values: what depends on the main input, and what is set apart.

Constants and metadata (shapes, and whatever is computed from shapes and constants alone)
are no part of the flow: a slice recomputes them. Context (activations that do not depend on
the stream inputs, an attention mask for one) is handed to a slice beside its stream input.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import networkx as nx
import onnx_ir as ir

from ndonnx.graph.ties import is_tie

_SHAPE_OPS = {"Shape", "Size"}
_RANDOM_OPS = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}
_SEQUENCE_OPS = {"SequenceEmpty", "SequenceConstruct", "SplitToSequence", "Optional"}

STANDARD_DOMAINS = {"", "ai.onnx"}

SOURCE = "<source>"
"""Virtual value in front of the stream inputs."""
SINK = "<sink>"
"""Virtual value behind the outputs."""


class Kind(enum.Enum):
    """What a value is made from."""

    CONSTANT = "constant"
    METADATA = "metadata"
    CONTEXT = "context"
    STREAM = "stream"


@dataclass(frozen=True, eq=False)
class Dataflow:
    """Values of one graph by kind, and the directed graph of the stream values."""

    graph: ir.Graph
    stream_inputs: tuple[str, ...]
    kinds: dict[ir.Value, Kind]
    order: dict[ir.Node, int]
    """Position of each node in the graph, which is a topological order."""
    flow: nx.DiGraph
    """`ir.Value -> ir.Value` between live stream values, with `SOURCE` and `SINK` at the ends."""

    @classmethod
    def of(cls, graph: ir.Graph, stream_inputs: Collection[str] | None = None) -> Dataflow:
        """View `graph` with the named inputs as the stream; all real inputs by default."""
        names = tuple(value.name or "" for value in real_inputs(graph))
        stream = names if stream_inputs is None else tuple(name for name in names if name in stream_inputs)
        kinds = _classify(graph, set(stream))
        order = {node: position for position, node in enumerate(graph)}
        return cls(graph, stream, kinds, order, _flow(graph, kinds))

    def is_stream(self, value: ir.Value) -> bool:
        """Whether the value depends on the contents of a stream input."""
        return self.kinds.get(value) is Kind.STREAM

    def stream_reads(self, node: ir.Node) -> list[ir.Value]:
        """The stream values that a node reads, those of its sub-graphs included."""
        return [value for value in reads(node) if self.is_stream(value)]


def kinds_of(graph: ir.Graph) -> dict[ir.Value, Kind]:
    """What each value of a graph is made from, with all real inputs as the stream."""
    return _classify(graph, {value.name or "" for value in real_inputs(graph)})


def draws_random(graph: ir.Graph) -> bool:
    """Whether a graph draws random numbers, so that it answers differently each time."""
    return any(node.op_type in _RANDOM_OPS and node.domain in STANDARD_DOMAINS for node in graph.all_nodes())


def real_inputs(graph: ir.Graph) -> list[ir.Value]:
    """Graph inputs that a caller feeds: those that are not also initializers."""
    return [value for value in graph.inputs if value.name not in graph.initializers]


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """Every value a node reads: its inputs, and what its sub-graphs read from outside."""
    for value in node.inputs:
        if value is not None:
            yield value
    if not node.attributes:
        return
    for inner in sub_graphs(node):
        yield from implicit_inputs(inner)


def sub_graphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs that a control-flow node holds in its attributes."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def implicit_inputs(graph: ir.Graph) -> Iterator[ir.Value]:
    """Values of an enclosing graph that `graph` reads, at any depth."""
    own = set(graph.inputs) | set(graph.initializers.values())
    for node in graph:
        own.update(node.outputs)
    inner = (value for node in graph for value in reads(node))
    outer = dict.fromkeys(value for value in (*inner, *graph.outputs) if value not in own)
    yield from outer


def _classify(graph: ir.Graph, stream: set[str]) -> dict[ir.Value, Kind]:
    kinds: dict[ir.Value, Kind] = dict.fromkeys(graph.initializers.values(), Kind.CONSTANT)
    for value in real_inputs(graph):
        kinds[value] = Kind.STREAM if value.name in stream else Kind.CONTEXT
    for node in graph:
        kind = _kind_of(node, (kinds.get(value, Kind.CONSTANT) for value in reads(node)))
        kinds.update(dict.fromkeys(node.outputs, kind))
    return kinds


def _kind_of(node: ir.Node, inputs: Iterable[Kind]) -> Kind:
    seen = set(inputs)
    if not _recomputable(node):
        return Kind.STREAM if Kind.STREAM in seen else Kind.CONTEXT
    if seen <= {Kind.CONSTANT}:
        # Folded, a quantised weight would become a float32 weight of four times its size, and a tied one two weights.
        return Kind.METADATA if node.op_type == "DequantizeLinear" or is_tie(node) else Kind.CONSTANT
    if seen <= {Kind.CONSTANT, Kind.METADATA} or node.op_type in _SHAPE_OPS:
        return Kind.METADATA
    return Kind.STREAM if Kind.STREAM in seen else Kind.CONTEXT


def _recomputable(node: ir.Node) -> bool:
    """Whether a node answers the same each time, with a tensor, and onnxruntime is sure to know it."""
    if node.domain not in STANDARD_DOMAINS or node.op_type in _RANDOM_OPS | _SEQUENCE_OPS:
        return False
    return all(_recomputable(inner) for graph in sub_graphs(node) for inner in graph)


def _flow(graph: ir.Graph, kinds: dict[ir.Value, Kind]) -> nx.DiGraph:
    flow: nx.DiGraph = nx.DiGraph()
    flow.add_node(SOURCE)
    flow.add_node(SINK)
    flow.add_edges_from((SOURCE, value) for value in real_inputs(graph) if kinds[value] is Kind.STREAM)
    for node in graph:
        inputs = [value for value in reads(node) if kinds.get(value) is Kind.STREAM]
        outputs = [value for value in node.outputs if kinds[value] is Kind.STREAM]
        flow.add_edges_from((a, b) for a in inputs for b in outputs)
    flow.add_edges_from((value, SINK) for value in graph.outputs if kinds.get(value) is Kind.STREAM)
    live = nx.ancestors(flow, SINK) | {SINK, SOURCE}
    flow.remove_nodes_from([value for value in flow if value not in live])
    return flow


def float_outputs(model: ir.Model) -> list[str]:
    """Names of the outputs that are tensors of floating-point numbers and computed by the model."""
    return [
        value.name or ""
        for value in model.graph.outputs
        if isinstance(value.type, ir.TensorType)
        and value.type.dtype.is_floating_point()
        and value.producer() is not None
    ]
