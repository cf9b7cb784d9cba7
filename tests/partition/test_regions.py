"""Regions: what the chains describe is the definition, no more and no less."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product

import networkx as nx
import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st

from ndonnx.graph import Dataflow
from ndonnx.graph.dataflow import SINK, SOURCE
from ndonnx.partition import Atom, Chain, find_chains, partition
from ndonnx.partition.dominators import DominatorTree

Edges = dict[str, set[str]]
"""Values by the values that they are made from."""


@st.composite
def graphs(draw: st.DrawFn) -> ir.Graph:
    """Random graphs of elementwise operators: several inputs and outputs, second outputs of a node, dead values."""
    inputs = [ir.Value(name=f"x{i}") for i in range(draw(st.integers(1, 2)))]
    values, nodes = list(inputs), []
    for i in range(draw(st.integers(1, draw(st.sampled_from([6, 12, 24]))))):
        reach = st.integers(max(0, len(values) - draw(st.sampled_from([2, 4, 14, 30]))), len(values) - 1)
        read = draw(st.lists(reach, min_size=1, max_size=3))
        op, outputs = ("Split", 2) if draw(st.integers(0, 7)) == 0 else ("Sum", 1)
        node = ir.node(op, [values[j] for j in read], num_outputs=outputs)
        for j, value in enumerate(node.outputs):
            value.name = f"v{i}.{j}"
        nodes.append(node)
        values += node.outputs
    made = values[len(inputs) :]
    ends = draw(st.lists(st.sampled_from(made), max_size=2, unique_by=id))
    outputs = list(dict.fromkeys([*ends, made[-1]]))
    return ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 18})


def all_chains(chains: list[Chain]) -> Iterator[tuple[Chain, Atom | None]]:
    """Every chain with the atom that it is nested in."""
    stack: list[tuple[Chain, Atom | None]] = [(chain, None) for chain in chains]
    while stack:
        chain, holder = stack.pop()
        yield chain, holder
        stack.extend((nested, atom) for atom in chain.atoms for nested in atom.nested)


def regions_by_chains(chains: list[Chain]) -> list[tuple[str | None, str | None]]:
    found = []
    for chain, _ in all_chains(chains):
        for i, first in enumerate(chain.atoms):
            found += [(first.entry.name, last.exit.name) for last in chain.atoms[i:]]
    return found


class Definition:
    """Regions as they are defined, by plain reachability."""

    def __init__(self, graph: ir.Graph) -> None:
        after: Edges = {"source": {str(value.name) for value in graph.inputs}, "sink": set()}
        for node in graph:
            for read, made in product(node.inputs, node.outputs):
                assert read is not None
                after.setdefault(str(read.name), set()).add(str(made.name))
        for value in graph.outputs:
            after.setdefault(str(value.name), set()).add("sink")
        self.after = after
        self.live = {value for value in self.reach("source") if "sink" in self.reach(value)} - {"sink"}

    def reach(self, start: str, without: str | None = None) -> set[str]:
        """Everything behind a value, on paths that avoid another."""
        seen: set[str] = set()
        stack = [start]
        while stack:
            for value in self.after.get(stack.pop(), ()):
                if value not in seen and value != without:
                    seen.add(value)
                    stack.append(value)
        return seen

    def inner(self, entry: str, exit_: str) -> set[str]:
        between = {value for value in self.reach(entry) if exit_ in self.reach(value)}
        return (between & self.live) - {entry, exit_}

    def is_region(self, entry: str, exit_: str) -> bool:
        if exit_ not in self.reach(entry) or exit_ in self.reach("source", without=entry):
            return False
        return all("sink" not in self.reach(value, without=exit_) for value in self.inner(entry, exit_))

    def regions(self) -> set[tuple[str, str]]:
        return {pair for pair in product(self.live, self.live) if pair[0] != pair[1] and self.is_region(*pair)}


@settings(max_examples=200)
@given(graphs())
def test_runs_of_atoms_are_exactly_the_regions(graph: ir.Graph) -> None:
    found = regions_by_chains(find_chains(Dataflow.of(graph)))
    assert len(found) == len(set(found))
    assert set(found) == Definition(graph).regions()


@settings(max_examples=120)
@given(graphs())
def test_atoms_hold_what_lies_between_and_chains_lie_inside_their_atom(graph: ir.Graph) -> None:
    definition = Definition(graph)
    for chain, holder in all_chains(find_chains(Dataflow.of(graph))):
        assert all(before.exit is after.entry for before, after in pairwise(chain.atoms))
        for atom in chain.atoms:
            inner = {str(value.name) for value in atom.inner}
            assert inner == definition.inner(str(atom.entry.name), str(atom.exit.name))
            if holder is not None:
                assert {atom.exit, *atom.inner} <= holder.inner
                assert atom.entry in {holder.entry, *holder.inner}
                assert len(atom.inner) < len(holder.inner)


@settings(max_examples=50)
@given(graphs())
def test_chains_come_in_topological_order(graph: ir.Graph) -> None:
    order = {value: i for i, node in enumerate(graph) for value in node.outputs}
    chains = find_chains(Dataflow.of(graph))
    for level in [chains, *([*atom.nested] for chain, _ in all_chains(chains) for atom in chain.atoms)]:
        starts = [order[chain.atoms[0].exit] for chain in level]
        assert starts == sorted(starts)
    for chain, _ in all_chains(chains):
        exits = [order[atom.exit] for atom in chain.atoms]
        assert exits == sorted(set(exits))


def chain_graph(length: int, *, skip: bool = False) -> ir.Graph:
    """A chain of elementwise operators; with `skip`, each reads the input once more."""
    start = ir.Value(name="x", shape=ir.Shape([4]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, last = [], start
    for i in range(length):
        node = ir.node("Add", [last, start]) if skip else ir.node("Relu", [last])
        last = node.outputs[0]
        last.name = f"v{i}"
        nodes.append(node)
    return ir.Graph([start], [last], nodes=nodes, opset_imports={"": 18})


def test_a_long_chain_is_one_chain() -> None:
    (chain,) = find_chains(Dataflow.of(chain_graph(10_000)))
    assert len(chain.atoms) == 10_000
    assert not any(atom.inner or atom.nested for atom in chain.atoms)


def test_regions_nested_deeper_than_the_interpreters_stack() -> None:
    """Each holds all those before it: what they hold must not be stored, or looked at, for each of them anew."""
    graph = chain_graph(4_000, skip=True)
    depth = sum(1 for _ in all_chains(find_chains(Dataflow.of(graph))))
    assert depth == 4_000
    assert not partition(ir.Model(graph, ir_version=9)).distillable


@settings(max_examples=100)
@given(graphs())
def test_dominators_are_those_of_networkx(graph: ir.Graph) -> None:
    flow = Dataflow.of(graph).flow
    order = list(nx.topological_sort(flow))
    forward = DominatorTree.of(SOURCE, [v for v in order if v is not SOURCE], flow.predecessors)
    backward = DominatorTree.of(SINK, [v for v in reversed(order) if v is not SINK], flow.successors)
    for tree, root, edges in ((forward, SOURCE, flow), (backward, SINK, flow.reverse())):
        expected = nx.immediate_dominators(edges, root)
        assert tree.parent == {value: above for value, above in expected.items() if value != root}


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=60), st.data())
def test_meeting_points_and_spans_of_a_tree_follow_from_its_paths(parents: list[int], data: st.DataObject) -> None:
    above = {child: parent % child for child, parent in enumerate(parents, 1)}
    tree = DominatorTree.of(0, above, lambda child: [above[child]])

    def path(node: int) -> list[int]:
        return [node] if node == 0 else [node, *path(above[node])]

    spans = tree.spans()
    nodes = st.integers(0, len(parents))
    one, other = data.draw(nodes), data.draw(nodes)
    assert tree.meet(one, other) == next(node for node in path(one) if node in path(other))
    assert (spans[other][0] <= spans[one][0] < spans[other][1]) == (other in path(one))


def test_a_long_skip_starts_a_region_without_being_read_only_there() -> None:
    values = [ir.Value(name="x")]
    nodes = []

    def add(op: str, *inputs: int) -> None:
        nodes.append(ir.node(op, [values[i] for i in inputs]))
        nodes[-1].outputs[0].name = f"v{len(values)}"
        values.append(nodes[-1].outputs[0])

    for op, inputs in [("Relu", [0]), ("Relu", [1]), ("Relu", [2]), ("Add", [3, 1]), ("Add", [4, 1])]:
        add(op, *inputs)
    graph = ir.Graph(values[:1], values[-1:], nodes=nodes, opset_imports={"": 18})
    outer, nested = find_chains(Dataflow.of(graph)), []
    assert [(a.entry.name, a.exit.name) for chain in outer for a in chain.atoms] == [("x", "v1"), ("v1", "v5")]
    nested = outer[0].atoms[1].nested
    assert [(a.entry.name, a.exit.name) for chain in nested for a in chain.atoms] == [("v1", "v4")]
    innermost = nested[0].atoms[0].nested
    assert [(a.entry.name, a.exit.name) for c in innermost for a in c.atoms] == [("v1", "v2"), ("v2", "v3")]
