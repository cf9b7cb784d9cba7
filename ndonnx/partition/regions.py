"""Single-entry, single-exit regions of the dataflow, by dominators and post-dominators.

`(a, b)` is a region when `a` dominates `b` and every value between them is read only
between them; `a` itself may be read elsewhere (a long skip). For each exit `b` the smallest
region starts at its immediate dominator: an *atom*. Two atoms `(a, b)` and `(b, c)` join
into a region when `c` post-dominates `b`. Every region is such a run of atoms, so the atoms,
linked into chains, describe all of them; a chain whose values lie inside an atom is nested
in it (the layers of a residual unit).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import networkx as nx
import onnx_ir as ir

from ndonnx.graph.dataflow import SINK, SOURCE, Dataflow
from ndonnx.partition.dominators import DominatorTree


@dataclass(eq=False)
class Atom:
    """The smallest region that ends at `exit`: entry is the exit's immediate dominator."""

    entry: ir.Value
    exit: ir.Value
    loose: list[ir.Value] = field(default_factory=list)
    """Values inside that end no atom, those of nested atoms left out."""
    nested: list[Chain] = field(default_factory=list)
    """Chains that lie wholly inside, in topological order."""

    @property
    def inner(self) -> frozenset[ir.Value]:
        """Stream values strictly between entry and exit; collected anew each time, as atoms may nest deeply."""
        return frozenset(_inner(self))


@dataclass(eq=False)
class Chain:
    """Atoms end to end: any run of neighbours in it is a region."""

    atoms: list[Atom]


def find_chains(flow: Dataflow) -> list[Chain]:
    """Outermost chains of the graph in topological order, with the others nested in their atoms.

    Runs in near-linear time, however deeply atoms nest: what lies in an atom is held once, by the
    innermost.
    """
    graph = flow.flow
    rank = _ranks(flow)
    order, dominators, post_dominators = _trees(flow, rank)
    atoms = _find_atoms(graph, order, dominators, post_dominators)
    chains = _link(atoms, post_dominators.parent)
    return _nest(graph, atoms, chains, rank)


def around(flow: Dataflow, ends: Sequence[tuple[ir.Value, ir.Value]]) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Values between which several regions may lie together in one region, the nearest first.

    Args:
        flow: of the working copy.
        ends: entry and exit of each of the regions.
    """
    _, dominators, post_dominators = _trees(flow, _ranks(flow))
    entries = _upwards(dominators, [entry for entry, _ in ends])
    exits = _upwards(post_dominators, [exit_ for _, exit_ in ends])
    places = [(i, j) for i in range(len(entries)) for j in range(len(exits))]
    yield from ((entries[i], exits[j]) for i, j in sorted(places, key=lambda place: (sum(place), place)))


_NEAR = 4
"""Dominators that are tried as an end of a common region."""


def _upwards(tree: DominatorTree[Hashable], values: Sequence[ir.Value]) -> list[ir.Value]:
    """What dominates all the values, the nearest first."""
    if any(value not in tree.depth for value in values):
        return []
    above: Hashable = values[0]
    for value in values[1:]:
        above = tree.meet(above, value)
    found: list[ir.Value] = []
    while isinstance(above, ir.Value) and len(found) < _NEAR:
        found.append(above)
        above = tree.parent[above]
    return found


def _trees(
    flow: Dataflow, rank: Mapping[ir.Value, int]
) -> tuple[list[ir.Value], DominatorTree[Hashable], DominatorTree[Hashable]]:
    """The stream values in order, and what dominates and what post-dominates them."""
    graph = flow.flow
    order = sorted((v for v in graph if isinstance(v, ir.Value)), key=rank.__getitem__)
    dominators = DominatorTree.of(SOURCE, [*order, SINK], graph.predecessors)
    post_dominators = DominatorTree.of(SINK, [*reversed(order), SOURCE], graph.successors)
    return order, dominators, post_dominators


def _ranks(flow: Dataflow) -> dict[ir.Value, int]:
    """Position in which values are made: inputs first, then by node, then by output."""
    rank: dict[ir.Value, int] = {value: position for position, value in enumerate(flow.graph.inputs)}
    for node in flow.graph:
        for value in node.outputs:
            rank[value] = len(rank)
    return rank


def _find_atoms(
    graph: nx.DiGraph,
    order: Iterable[ir.Value],
    dominators: DominatorTree[Hashable],
    post_dominators: DominatorTree[Hashable],
) -> dict[ir.Value, Atom]:
    """Atoms by exit: a value that post-dominates all that lies between its immediate dominator and it ends one.

    Post-dominated values have numbers in one interval, so the lowest and the highest number of
    those between tell. They are taken along the paths of the dominator tree from each
    predecessor up to the dominator; jump pointers remember what they jump over.
    """
    spans = post_dominators.spans()
    depth, jump, parent = dominators.depth, dominators.jump, dominators.parent
    between: dict[Hashable, tuple[int, int]] = {}  # of a value, with itself: lowest and highest number
    jumped: dict[Hashable, tuple[int, int]] = {}  # the same over all from a value to below its jump
    found: dict[ir.Value, Atom] = {}
    for value in order:
        entry = parent[value]
        low = high = spans[value][0]
        for above in graph.predecessors(value):
            at = above
            while at is not entry:
                far = depth[jump[at]] >= depth[entry]
                reach = jumped[at] if far else between[at]
                low, high = min(low, reach[0]), max(high, reach[1])
                at = jump[at] if far else parent[at]
        between[value] = low, high
        start, end = spans[value]
        if isinstance(entry, ir.Value) and start <= low and high < end:
            found[value] = Atom(entry, value)
        at = entry
        while at is not jump[value]:
            low, high = min(low, jumped[at][0]), max(high, jumped[at][1])
            at = jump[at]
        jumped[value] = low, high
    return found


def _link(atoms: dict[ir.Value, Atom], post_dominator: dict[Hashable, Hashable]) -> list[Chain]:
    """Join each atom to the one that starts where it ends, when nothing else reads its exit."""

    def following(atom: Atom) -> Atom | None:
        ahead = post_dominator.get(atom.exit)
        after = atoms.get(ahead) if isinstance(ahead, ir.Value) else None
        return after if after is not None and after.entry is atom.exit else None

    after = {atom: successor for atom in atoms.values() if (successor := following(atom)) is not None}
    followers = set(after.values())
    heads = [atom for atom in atoms.values() if atom not in followers]
    return [Chain(list(_following(head, after))) for head in heads]


def _following(atom: Atom | None, after: dict[Atom, Atom]) -> Iterator[Atom]:
    while atom is not None:
        yield atom
        atom = after.get(atom)


def _nest(
    graph: nx.DiGraph, atoms: dict[ir.Value, Atom], chains: list[Chain], rank: dict[ir.Value, int]
) -> list[Chain]:
    """Hang each chain into the smallest atom that holds it; return those that none holds.

    From an atom's exit the search goes backwards and leaps over atoms that it meets, whose inside
    is known: each value is visited once in all.
    """
    owner: dict[ir.Value, Atom] = {}
    for atom in atoms.values():  # inner atoms before those that hold them
        stack = [*graph.predecessors(atom.exit)]
        while stack:
            value = stack.pop()
            if value is atom.entry or value in owner:
                continue
            owner[value] = atom
            if (inside := atoms.get(value)) is not None:
                stack.append(inside.entry)
            else:
                atom.loose.append(value)
                stack.extend(graph.predecessors(value))
    outermost: list[Chain] = []
    for chain in sorted(chains, key=lambda c: rank[c.atoms[0].exit]):
        holder = owner.get(chain.atoms[0].exit)
        (outermost if holder is None else holder.nested).append(chain)
    return outermost


def _inner(atom: Atom) -> Iterator[ir.Value]:
    stack = [atom]
    while stack:
        holder = stack.pop()
        yield from holder.loose
        for chain in holder.nested:
            for inside in chain.atoms:
                yield inside.exit
                stack.append(inside)
