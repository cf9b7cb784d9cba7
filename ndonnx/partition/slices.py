"""A neighbourhood as an ONNX model of its own, and the nodes it is made of."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import onnx_ir as ir

from ndonnx.graph.dataflow import SOURCE, STANDARD_DOMAINS, Dataflow, Kind, reads, sub_graphs
from ndonnx.graph.interface import samples_first


def region_nodes(flow: Dataflow, entry: ir.Value, exit_: ir.Value) -> tuple[list[ir.Node], list[ir.Value]]:
    """Nodes between entry and exit in order, with the metadata they need, and the context they read.

    A stream value from elsewhere, of which only the shape is read, is context too.
    """
    inside = _between(flow, entry, exit_)
    nodes: set[ir.Node] = set()
    context: dict[ir.Value, None] = {}
    stack = [exit_]
    while stack:
        value = stack.pop()
        producer = value.producer()
        if value is entry or flow.kinds[value] is Kind.CONSTANT or producer in nodes:
            continue
        elsewhere = flow.is_stream(value) and value in flow.flow and value not in inside
        if flow.kinds[value] is Kind.CONTEXT or producer is None or elsewhere:
            context[value] = None
            continue
        nodes.add(producer)
        stack.extend(reads(producer))
    return sorted(nodes, key=flow.order.__getitem__), sorted(context, key=lambda value: value.name or "")


def _between(flow: Dataflow, entry: ir.Value, exit_: ir.Value) -> set[ir.Value]:
    """The exit, and the stream values on the way to it from the entry."""
    inside = {exit_}
    stack = [exit_]
    while stack:
        for value in flow.flow.predecessors(stack.pop()):
            if value is not entry and value is not SOURCE and value not in inside:
                inside.add(value)
                stack.append(value)
    return inside


def is_opaque(node: ir.Node) -> bool:
    """Whether a node cannot lie inside a trained neighbourhood: control flow or a custom domain."""
    return node.domain not in STANDARD_DOMAINS or any(True for _ in sub_graphs(node))


def extract(
    model: ir.Model, nodes: Sequence[ir.Node], inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]
) -> ir.Model:
    """The nodes as a model of their own, with the teacher's opset and the initializers they read.

    Tensors are shared with the teacher's, everything else is a copy. The samples are along the first axis of its
    inputs and outputs, wherever they are in the teacher (`ndonnx.graph.interface`).
    """
    own = set(inputs)
    weights = dict.fromkeys(v for node in nodes for v in reads(node) if v.is_initializer() and v not in own)
    view = ir.GraphView(
        inputs,
        outputs,
        nodes=nodes,
        initializers=tuple(weights),
        opset_imports=_imports(model, nodes),
        name=f"{outputs[0].name}",
    )
    return samples_first(ir.Model(view.clone(), ir_version=model.ir_version, producer_name="ndonnx"))


def _imports(model: ir.Model, nodes: Iterable[ir.Node]) -> dict[str, int]:
    used: Collection[str] = {node.domain for node in nodes} | STANDARD_DOMAINS
    return {domain: version for domain, version in model.opset_imports.items() if domain in used}
