"""A neighbourhood as an ONNX model of its own, and the nodes it is made of."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import onnx_ir as ir

from ndonnx.graph.dataflow import SOURCE, STANDARD_DOMAINS, Dataflow, Kind, reads, sub_graphs
from ndonnx.graph.interface import name_inside, samples_first
from ndonnx.graph.passes.fused_writer import is_inside_fused
from ndonnx.graph.shapes.inference import infer_shapes


def region_nodes(flow: Dataflow, entry: ir.Value, exit_: ir.Value) -> tuple[list[ir.Node], list[ir.Value]]:
    """Nodes between entry and exit in order, with the metadata they need, and the context they read.

    A stream value from elsewhere, of which only the shape is read, is context too. Context inside a fused operator,
    which the model does not have by itself, is computed once more inside.
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
        given = flow.kinds[value] is Kind.CONTEXT and not is_inside_fused(value)
        if given or producer is None or elsewhere:
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


def is_region(flow: Dataflow, entry: ir.Value, exit_: ir.Value) -> bool:
    """Whether the entry dominates the exit and nothing between them is read outside."""
    inside = _between(flow, entry, exit_)
    if any(value.producer() is None for value in inside):
        return False
    return all(set(flow.flow.successors(value)) <= inside for value in inside if value is not exit_)


def is_opaque(node: ir.Node) -> bool:
    """Whether a node cannot lie inside a trained neighbourhood: control flow or a custom domain."""
    return node.domain not in STANDARD_DOMAINS or any(True for _ in sub_graphs(node))


def extract(
    model: ir.Model, nodes: Sequence[ir.Node], inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]
) -> ir.Model:
    """The nodes as a model of their own, with the teacher's opset and the initializers they read.

    Tensors are shared with the teacher's, everything else is a copy. An input that one of the nodes makes too is read
    as it is given, not as the node makes it. The samples are along the first axis of its inputs and outputs, wherever
    they are in the teacher (`ndonnx.graph.interface`).
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
    graph = view.clone()
    _read_what_is_given(graph)
    return samples_first(ir.Model(graph, ir_version=model.ir_version, producer_name="ndonnx"))


def _read_what_is_given(graph: ir.Graph) -> None:
    """Where a node is wanted for some of its outputs and others are inputs, let their readers read the inputs."""
    given = {value.name: value for value in graph.inputs}
    taken = given.keys() | {value.name for node in graph for value in node.outputs}
    for node in graph:
        for value in node.outputs:
            if value.name in given:
                value.replace_all_uses_with(given[value.name], replace_graph_outputs=True)
                while value.name in taken:
                    value.name = f"{value.name}/again"


def _imports(model: ir.Model, nodes: Iterable[ir.Node]) -> dict[str, int]:
    used: Collection[str] = {node.domain for node in nodes} | STANDARD_DOMAINS
    return {domain: version for domain, version in model.opset_imports.items() if domain in used}


def with_copies(model: ir.Model, copies: Mapping[tuple[str, str], str]) -> ir.Model:
    """Give nodes of a slice initializers of their own that they share with others. In place.

    Args:
        model: the slice.
        copies: names of the new ones, by the name of a node's first output and that of the initializer.
    """
    graph = model.graph
    by_output = {name_inside(node.outputs[0]): node for node in graph}
    for (output, initializer), name in copies.items():
        old, node = graph.initializers[initializer], by_output[output]
        if name not in graph.initializers:
            copy = ir.Value(name=name, const_value=old.const_value, shape=old.shape, type=old.type)
            graph.register_initializer(copy)
        for position, value in enumerate(node.inputs):
            if value is old:
                node.replace_input_with(position, graph.initializers[name])
    return model


def renamed(model: ir.Model, names: Mapping[str, str], shapes: Mapping[str, ir.Shape]) -> ir.Model:
    """A copy of a slice for another place, where its values have other names; initializers keep theirs.

    Args:
        model: as it is for the first place.
        names: of the values there, with those of the values here.
        shapes: of what it reads and makes here, by name; the number of samples stays open if it is open.
    """
    copy = model.clone()
    graph = copy.graph
    ends = [*graph.inputs, *graph.outputs]
    inner = [value for node in graph for value in node.outputs if value not in graph.outputs]
    taken = {*graph.initializers, *(value.name for value in inner if value.name not in names)}
    taken |= {names.get(value.name or "", value.name) for value in ends}
    for value in inner:
        if (name := names.get(value.name or "")) is not None and name not in taken:
            value.name = name
            taken.add(name)
    for value in ends:
        value.name = names.get(value.name or "", value.name)
        shape = shapes.get(value.name or "")
        if shape is not None and value.shape is not None and len(shape) == len(value.shape) > 0:
            first = shape[0] if isinstance(value.shape[0], int) else value.shape[0]
            value.shape = ir.Shape([first, *shape[1:]])
    for value in inner:
        value.shape = None
    return infer_shapes(copy)
