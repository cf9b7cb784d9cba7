"""What holds for the neighbourhoods of every model."""

from __future__ import annotations

from ndonnx.graph.dataflow import Kind
from ndonnx.partition import Partition
from ndonnx.partition.slices import is_opaque


def ends(parts: Partition) -> list[tuple[str | None, str | None]]:
    """Entry and exit of each distillable neighbourhood."""
    return [(n.entry.name, n.exit.name) for n in parts.distillable if n.entry and n.exit]


def check_neighbourhoods(parts: Partition) -> None:
    """Disjoint, one stream input, one output, nothing opaque, every node accounted for."""
    flow = parts.flow
    seen: dict[object, str] = {}
    for n in parts.neighbourhoods:
        for node in n.nodes:
            if flow.kinds[node.outputs[0]] in (Kind.STREAM, Kind.CONTEXT):
                assert node not in seen, (n.name, seen[node])
                seen[node] = n.name
    work = [node for node in flow.graph if flow.kinds[node.outputs[0]] in (Kind.STREAM, Kind.CONTEXT)]
    assert set(seen) == set(work)
    for n in parts.distillable:
        own = set(n.nodes)
        assert n.groups is not None and n.groups.groups and n.reason is None
        assert n.entry is not None and n.exit is not None and n.exit.producer() in own
        assert not any(is_opaque(node) for node in own)
        for node in own:
            for value in node.inputs:
                if value is not None and value.producer() not in own and flow.kinds[value] is not Kind.CONSTANT:
                    assert value is n.entry or value in n.context
            for value in node.outputs:
                if value is not n.exit and flow.is_stream(value):
                    assert not value.is_graph_output()
                    assert all(user in own for user in value.consumers())
    numbers = [n.name for n in parts.neighbourhoods]
    assert numbers == sorted(set(numbers))
    firsts = [flow.order[n.nodes[0]] for n in parts.neighbourhoods]
    assert firsts == sorted(firsts)
