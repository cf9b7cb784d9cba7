"""Single-entry, single-exit regions of the dataflow, by dominators and post-dominators.

`(a, b)` is a region when `a` dominates `b` and every value between them is read only
between them; `a` itself may be read elsewhere (a long skip). For each exit `b` the smallest
region starts at its immediate dominator: an *atom*. Two atoms `(a, b)` and `(b, c)` join
into a region when `c` post-dominates `b`. Every region is such a run of atoms, so the atoms,
linked into chains, describe all of them; a chain whose values lie inside an atom is nested
in it (the layers of a residual unit).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

import networkx as nx
import onnx_ir as ir

from ndonnx.graph.dataflow import SINK, SOURCE, Dataflow


@dataclass(eq=False)
class Atom:
    """The smallest region that ends at `exit`: entry is the exit's immediate dominator."""

    entry: ir.Value
    exit: ir.Value
    inner: frozenset[ir.Value]
    """Stream values strictly between entry and exit."""
    nested: list[Chain] = field(default_factory=list)
    """Chains that lie wholly inside, in topological order."""


@dataclass(eq=False)
class Chain:
    """Atoms end to end: any run of neighbours in it is a region."""

    atoms: list[Atom]


def find_chains(flow: Dataflow) -> list[Chain]:
    """Outermost chains of the graph in topological order, with the others nested in their atoms.

    Runs in near-linear time: one dominator tree each way, and one walk over each atom that
    stops at the first value read outside.
    """
    graph = flow.flow
    dominator = immediate_dominators(graph, SOURCE)
    post_dominator = immediate_dominators(graph.reverse(copy=False), SINK)
    rank = _ranks(flow)
    below = _Subtree(post_dominator, SINK)
    atoms: dict[ir.Value, Atom] = {}
    for value in sorted((v for v in graph if isinstance(v, ir.Value)), key=rank.__getitem__):
        entry = dominator.get(value)
        if isinstance(entry, ir.Value) and (inner := _inner(graph, entry, value, below)) is not None:
            atoms[value] = Atom(entry, value, inner)
    chains = _link(atoms, post_dominator)
    return _nest(chains, rank)


def immediate_dominators(graph: nx.DiGraph, start: Hashable) -> dict[Hashable, Hashable]:
    """Immediate dominator of every node reachable from `start`, `start` itself left out."""
    return {node: parent for node, parent in nx.immediate_dominators(graph, start).items() if node != start}


def _ranks(flow: Dataflow) -> dict[ir.Value, int]:
    """Position in which values are made: inputs first, then by node, then by output."""
    rank: dict[ir.Value, int] = {value: position for position, value in enumerate(flow.graph.inputs)}
    for node in flow.graph:
        for value in node.outputs:
            rank[value] = len(rank)
    return rank


class _Subtree:
    """Ancestor test in a dominator tree by entry and exit times."""

    def __init__(self, parent: dict[Hashable, Hashable], root: Hashable) -> None:
        children: dict[Hashable, list[Hashable]] = {}
        for node, above in parent.items():
            children.setdefault(above, []).append(node)
        self._span: dict[Hashable, tuple[int, int]] = {}
        opened: dict[Hashable, int] = {}
        clock, stack = 0, [(root, False)]
        while stack:
            node, leaving = stack.pop()
            if leaving:
                self._span[node] = (opened[node], clock)
                continue
            opened[node] = clock
            clock += 1
            stack.append((node, True))
            stack.extend((child, False) for child in children.get(node, ()))

    def holds(self, node: Hashable, ancestor: Hashable) -> bool:
        """Whether `ancestor` dominates `node` (a node dominates itself)."""
        low, high = self._span[ancestor]
        return low <= self._span[node][0] < high


def _inner(graph: nx.DiGraph, entry: ir.Value, exit_: ir.Value, below: _Subtree) -> frozenset[ir.Value] | None:
    """Values between entry and exit; None when one of them is read outside."""
    inner: set[ir.Value] = set()
    stack = [exit_]
    while stack:
        for value in graph.predecessors(stack.pop()):
            if value is entry or value in inner:
                continue
            if not below.holds(value, exit_):
                return None
            inner.add(value)
            stack.append(value)
    return frozenset(inner)


def _link(atoms: dict[ir.Value, Atom], post_dominator: dict[Hashable, Hashable]) -> list[Chain]:
    """Join each atom to the one that starts where it ends, when nothing else reads its exit."""
    starting: dict[ir.Value, list[Atom]] = {}
    for atom in atoms.values():
        starting.setdefault(atom.entry, []).append(atom)

    def following(atom: Atom) -> Atom | None:
        ahead = post_dominator.get(atom.exit)
        return next((other for other in starting.get(atom.exit, ()) if other.exit is ahead), None)

    after = {atom: successor for atom in atoms.values() if (successor := following(atom)) is not None}
    followers = set(after.values())
    heads = [atom for atom in atoms.values() if atom not in followers]
    return [Chain(list(_walk(head, after))) for head in heads]


def _walk(atom: Atom | None, after: dict[Atom, Atom]) -> Iterator[Atom]:
    while atom is not None:
        yield atom
        atom = after.get(atom)


def _nest(chains: list[Chain], rank: dict[ir.Value, int]) -> list[Chain]:
    """Hang each chain into the smallest atom that holds it; return those that none holds."""
    owner: dict[ir.Value, Atom] = {}
    for atom in sorted((a for chain in chains for a in chain.atoms if a.inner), key=lambda a: len(a.inner)):
        for value in atom.inner:
            owner.setdefault(value, atom)
    outermost: list[Chain] = []
    for chain in sorted(chains, key=lambda c: rank[c.atoms[0].exit]):
        holder = owner.get(chain.atoms[0].exit)
        (outermost if holder is None else holder.nested).append(chain)
    return outermost
