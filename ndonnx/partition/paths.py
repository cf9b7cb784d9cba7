"""What has to be computed to get from values in hand to values that are wanted."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from ndonnx.graph.dataflow import reads


def nodes_between(wanted: Sequence[ir.Value], held: Collection[str]) -> tuple[list[ir.Node], list[ir.Value]]:
    """Nodes that compute the wanted values from held ones, in topological order, and the held values they read.

    Args:
        wanted: values of one graph; one that is held itself is only read.
        held: names of the values in hand. Where they do not suffice, the nodes begin at the graph's inputs.
    """
    nodes: dict[ir.Node, None] = {}
    read: dict[ir.Value, None] = {}
    stack = list(wanted)
    while stack:
        value = stack.pop()
        producer = value.producer()
        if value.name in held:
            read[value] = None
        elif producer is not None and producer not in nodes:
            nodes[producer] = None
            stack.extend(reads(producer))
    return sort_nodes(list(nodes)), list(read)


def sort_nodes(nodes: Sequence[ir.Node]) -> list[ir.Node]:
    """The nodes of one graph in topological order."""
    chosen = set(nodes)
    ready: list[ir.Node] = []
    seen: set[ir.Node] = set()
    for start in nodes:
        stack = [(start, False)]
        while stack:
            node, expanded = stack.pop()
            if expanded:
                ready.append(node)
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                stack.extend((p, False) for v in reads(node) if (p := v.producer()) in chosen and p is not None)
    return ready
