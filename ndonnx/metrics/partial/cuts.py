"""Where the teacher is cut for partial models: what depends on a neighbourhood's exit, and what is read beside it."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from ndonnx.graph.dataflow import Kind, reads, real_inputs
from ndonnx.partition import Neighbourhood, Partition


class Cuts:
    """One teacher, cut behind each of its neighbourhoods."""

    def __init__(self, parts: Partition) -> None:
        """Look at the partition's working copy."""
        self._parts = parts
        self._nodes = _live_nodes(parts.model.graph)
        self.inputs = [value.name or "" for value in real_inputs(parts.model.graph)]
        """Names of what the model is fed."""

    def wanted(self, outputs: list[str]) -> list[str]:
        """Names of what has to be captured: the model's ends, those of the neighbourhoods, and what later nodes read.

        Without the last, a value on a long skip would have to be computed from the model's inputs every time.
        """
        names = dict.fromkeys((*self.inputs, *outputs))
        for n in self._parts.distillable:
            assert n.exit is not None
            names.update(dict.fromkeys((*inputs_of(n), n.exit.name or "")))
        for n in self._parts.distillable:
            names.update(dict.fromkeys(self._beside(n)))
        return list(names)

    def after(self, n: Neighbourhood) -> set[ir.Value]:
        """The values that depend on the neighbourhood's exit, of those that an output needs."""
        assert n.exit is not None
        after = {n.exit}
        for node, read in self._nodes:
            if not after.isdisjoint(read):
                after.update(node.outputs)
        return after - {n.exit}

    def _beside(self, n: Neighbourhood) -> Iterator[str]:
        """Values that nodes behind the exit read and that do not depend on it; of shapes, what they are taken from."""
        after = self.after(n)
        kinds = self._parts.flow.kinds
        stack = [v for value in after if (p := value.producer()) is not None for v in reads(p) if v not in after]
        seen: set[ir.Value] = set()
        while stack:
            value = stack.pop()
            if value in seen or value is n.exit or kinds.get(value, Kind.CONSTANT) is Kind.CONSTANT:
                continue
            seen.add(value)
            producer = value.producer()
            if kinds[value] is Kind.METADATA and producer is not None:
                stack.extend(reads(producer))
            elif value.type is not None:
                yield value.name or ""


def inputs_of(neighbourhood: Neighbourhood) -> list[str]:
    """Names of a neighbourhood's entry and context."""
    assert neighbourhood.entry is not None
    return [value.name or "" for value in (neighbourhood.entry, *neighbourhood.context)]


def _live_nodes(graph: ir.Graph) -> list[tuple[ir.Node, list[ir.Value]]]:
    """The nodes that an output needs, in order, each with the values that it reads."""
    live: set[ir.Value] = set(graph.outputs)
    found = []
    for node in reversed(graph):
        if any(value in live for value in node.outputs):
            read = list(reads(node))
            live.update(read)
            found.append((node, read))
    return found[::-1]
