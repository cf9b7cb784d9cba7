"""Pieces of a model that read the same weights: which of them compute the same with them, and what else reads them.

Layers that share one set of weights, a head over several levels, the towers of a siamese network: their pieces are
alike node by node and read the same initializers in the same places, so that one student can stand in all of them.
Where pieces that are not alike read a matrix, its student must leave it as it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Protocol

import networkx as nx
import numpy as np
import onnx_ir as ir

from ndonnx.graph.costs import constant_of, dims, is_weight, weights_of
from ndonnx.graph.dataflow import Dataflow, Kind, reads, sub_graphs
from ndonnx.graph.interface import sample_axis


class Piece(Protocol):
    """Nodes between an entry and an exit, as a partition has them."""

    @property
    def name(self) -> str: ...
    @property
    def entry(self) -> ir.Value | None: ...
    @property
    def exit(self) -> ir.Value | None: ...
    @property
    def context(self) -> tuple[ir.Value, ...]: ...
    @property
    def nodes(self) -> tuple[ir.Node, ...]: ...
    @property
    def distillable(self) -> bool: ...


Pairs = Mapping[ir.Value, ir.Value]
"""From the values of one piece to those of another that are computed alike."""


@dataclass(frozen=True, eq=False)
class Sharing:
    """Who shares weights with whom."""

    twins: Mapping[str, tuple[str, Pairs]]
    """By the name of a piece, that of the first one that computes the same with the same weights, and from its values
    to those here."""
    elsewhere: Mapping[str, Mapping[ir.Value, str]]
    """By the name of a piece, its weights that others than its twins read, each with the name of one of those."""


def find_sharing(flow: Dataflow, pieces: Sequence[Piece]) -> Sharing:
    """Look which pieces share weights.

    Args:
        flow: of the working copy.
        pieces: of all nodes of the model, in order.
    """
    read = {piece.name: weights_in(piece.nodes) for piece in pieces}
    readers: dict[ir.Value, list[str]] = defaultdict(list)
    for name, weights in read.items():
        for weight in weights:
            readers[weight].append(name)
    twins = _find_twins(flow, pieces, read, readers)
    elsewhere: dict[str, dict[ir.Value, str]] = {}
    for piece in pieces:
        first, _ = twins.get(piece.name, (piece.name, {}))
        same = {first, *(name for name, (other, _) in twins.items() if other == first)}
        others = {w: next((name for name in readers[w] if name not in same), None) for w in read[piece.name]}
        found = {w: name for w, name in others.items() if name is not None}
        found |= {w: "an output" for w in read[piece.name] if w.is_graph_output()}
        if found:
            elsewhere[piece.name] = found
    return Sharing(twins, elsewhere)


def aligning_cuts(flow: Dataflow, pieces: Sequence[Piece], sharing: Sharing) -> frozenset[ir.Value]:
    """Values at which to cut so that all uses of shared weights lie in pieces that are alike, where that can be.

    A piece may have grown at the first or the last layer, by what comes before or behind: cut as at another one, all
    are alike. Empty where no piece has its like at all uses of its shared matrices.
    """
    uses: dict[ir.Value, set[ir.Node]] = defaultdict(set)
    for piece in pieces:
        for node in piece.nodes:
            for weight in weights_of(node) if flow.is_stream(node.outputs[0]) else ():
                uses[weight].add(node)
    found: set[ir.Value] = set()
    settled: set[ir.Value] = set()
    for piece in sorted(pieces, key=lambda piece: len(piece.nodes)):
        matrices = [weight for weight in sharing.elsewhere.get(piece.name, {}) if is_matrix(weight)]
        if not piece.distillable or not matrices or piece.exit is None or not settled.isdisjoint(matrices):
            continue
        places = list(_disjoint(piece, [*_own(piece), *_images(flow, piece)]))
        covered = {value.producer() for pairs in places for value in pairs.values()}
        if len(places) > 1 and all(uses[weight] <= covered for weight in matrices):
            assert piece.entry is not None
            found.update(pairs[end] for pairs in places for end in (piece.entry, piece.exit))
            settled.update(matrices)
    return frozenset(found)


def _own(piece: Piece) -> list[Pairs]:
    """A piece as its own image."""
    values = [value for node in piece.nodes for value in node.outputs]
    assert piece.entry is not None
    return [{value: value for value in (piece.entry, *values)}]


def _images(flow: Dataflow, piece: Piece) -> Iterator[Pairs]:
    """Everywhere else in the model where the same is computed with the same weights."""
    assert piece.exit is not None
    last = piece.exit.producer()
    for node in flow.graph:
        if last is not None and node is not last and node.op_type == last.op_type:
            position = last.outputs.index(piece.exit)
            pairs = correspondence(flow, piece, node.outputs[position]) if position < len(node.outputs) else None
            if pairs is not None:
                yield pairs


def _disjoint(piece: Piece, places: Iterable[Pairs]) -> Iterator[Pairs]:
    """Places of what corresponds to a piece that have no node in common with an earlier one."""
    given = {piece.entry, *piece.context}
    taken: set[ir.Node] = set()
    for pairs in places:
        made = (other.producer() for one, other in pairs.items() if one not in given)
        own = {node for node in made if node is not None}
        if taken.isdisjoint(own):
            taken |= own
            yield pairs


def unlike_sharers(pieces: Sequence[Piece], sharing: Sharing) -> list[list[Piece]]:
    """Distillable pieces that share a matrix and are not alike, those together that hang together by such matrices."""
    by_weight: dict[ir.Value, list[Piece]] = defaultdict(list)
    for piece in pieces:
        for weight in sharing.elsewhere.get(piece.name, {}):
            if piece.distillable and is_matrix(weight):
                by_weight[weight].append(piece)
    links = nx.Graph()
    for members in by_weight.values():
        links.add_edges_from((members[0].name, other.name) for other in members[1:])
    together = [[piece for piece in pieces if piece.name in names] for names in nx.connected_components(links)]
    return sorted(together, key=lambda members: pieces.index(members[0]))


def _find_twins(
    flow: Dataflow,
    pieces: Sequence[Piece],
    read: Mapping[str, Mapping[ir.Value, None]],
    readers: Mapping[ir.Value, Sequence[str]],
) -> dict[str, tuple[str, Pairs]]:
    by_name = {piece.name: piece for piece in pieces}
    twins: dict[str, tuple[str, Pairs]] = {}
    for piece in pieces:
        if not piece.distillable or piece.name in twins:
            continue
        shared = [weight for weight in read[piece.name] if is_matrix(weight) and len(readers[weight]) > 1]
        behind = readers[shared[0]] if shared else ()
        for name in behind[behind.index(piece.name) + 1 :] if shared else ():
            other = by_name[name]
            if name in twins or not other.distillable or _matrices(read[name]) != _matrices(read[piece.name]):
                continue
            assert other.exit is not None
            pairs = correspondence(flow, piece, other.exit)
            if pairs is not None and _covers(pairs, piece, other):
                twins[name] = piece.name, pairs
    return twins


def _matrices(weights: Iterable[ir.Value]) -> set[ir.Value]:
    return {weight for weight in weights if is_matrix(weight)}


def _covers(pairs: Pairs, piece: Piece, other: Piece) -> bool:
    """Whether the values that correspond to a piece's are those of another piece, with the same ends."""
    assert piece.entry is not None
    ends = pairs[piece.entry] is other.entry and {pairs[value] for value in piece.context} == set(other.context)
    return ends and {pairs[node.outputs[0]] for node in piece.nodes} == {node.outputs[0] for node in other.nodes}


def exits_before(flow: Dataflow, pieces: Sequence[Piece]) -> dict[str, int]:
    """For each piece, those of whose exits something that it reads is computed: bits by their place in the list."""
    bits = {piece.exit: 1 << place for place, piece in enumerate(pieces)}
    before: dict[ir.Value, int] = {}

    def reached(value: ir.Value) -> int:
        return before.get(value, 0) | bits.get(value, 0)

    for node in flow.graph:
        found = 0
        for value in reads(node):
            found |= reached(value)
        before.update(dict.fromkeys(node.outputs, found))
    ends = {piece.name: [v for v in (piece.entry, *piece.context) if v is not None] for piece in pieces}
    return {name: reduce(or_, map(reached, values), 0) for name, values in ends.items()}


def weights_in(nodes: Iterable[ir.Node]) -> dict[ir.Value, None]:
    """The weights that these nodes read, in order."""
    return dict.fromkeys(weight for node in nodes for weight in weights_of(node))


def is_matrix(weight: ir.Value) -> bool:
    """Whether a weight has two axes or more, so that it is worth being one; vectors (biases, norms) may become two."""
    return sum(size > 1 for size in dims(weight) or ()) > 1


def correspondence(flow: Dataflow, piece: Piece, exit_: ir.Value) -> Pairs | None:
    """Values that are computed up to `exit_` as those of the piece are up to its exit, with the very same weights.

    Returns:
        From each value of the piece, its entry and its context, to the one that corresponds; None where something is
        computed otherwise.
    """
    if piece.entry is None or piece.exit is None or not _alike(piece.exit, exit_):
        return None
    match = _Match(flow, frozenset((piece.entry, *piece.context)))
    match.waiting.append((piece.exit, exit_))
    while match.waiting:
        if not match.step(*match.waiting.pop()):
            return None
    return match.pairs


@dataclass
class _Match:
    """Two computations, followed backwards side by side."""

    flow: Dataflow
    given: frozenset[ir.Value]
    """Where the first of them begins."""
    pairs: dict[ir.Value, ir.Value] = field(default_factory=dict)
    back: dict[ir.Value, ir.Value] = field(default_factory=dict)
    waiting: list[tuple[ir.Value | None, ir.Value | None]] = field(default_factory=list)

    def step(self, one: ir.Value | None, other: ir.Value | None) -> bool:
        """Compare two values; whether they can correspond. What they are computed from waits to be compared."""
        if one is None or other is None:
            return one is other
        if one in self.pairs:
            return self.pairs[one] is other
        constant = self.flow.kinds.get(one) is Kind.CONSTANT
        if constant or self.flow.kinds.get(other) is Kind.CONSTANT:
            return constant and _same_constant(one, other)
        if self.back.setdefault(other, one) is not one:
            return False
        self.pairs[one] = other
        return _alike(one, other) if one in self.given else self._go_on(one, other)

    def _go_on(self, one: ir.Value, other: ir.Value) -> bool:
        before, behind = one.producer(), other.producer()
        if before is None or behind is None or not _same_operator(before, behind):
            return False
        if before.outputs.index(one) != behind.outputs.index(other):
            return False
        self.waiting += zip(before.inputs, behind.inputs, strict=True)
        self.waiting += ((a, b) for a, b in zip(before.outputs, behind.outputs, strict=True) if a.uses())
        return True


def _alike(one: ir.Value, other: ir.Value) -> bool:
    """Whether two values can be read in each other's place, as far as type and number of axes tell."""
    if (
        one.dtype != other.dtype
        or sample_axis(one) != sample_axis(other)
        or (one.shape is None) != (other.shape is None)
    ):
        return False
    return one.shape is None or other.shape is None or len(one.shape) == len(other.shape)


def _same_constant(one: ir.Value, other: ir.Value) -> bool:
    """Whether two constants are one: the same matrix, or equal numbers otherwise (exporters repeat those of a norm)."""
    if one is other:
        return True
    if (is_weight(one) or is_weight(other)) and (is_matrix(one) or is_matrix(other)):
        return False
    a, b = constant_of(one), constant_of(other)
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return np.array_equal(a.numpy(), b.numpy())


def _same_operator(one: ir.Node, other: ir.Node) -> bool:
    if (one.op_type, one.domain, len(one.inputs)) != (other.op_type, other.domain, len(other.inputs)):
        return False
    if len(one.outputs) != len(other.outputs):
        return False
    if any(True for node in (one, other) for _ in sub_graphs(node)) or set(one.attributes) != set(other.attributes):
        return False
    return all(_same_attribute(attribute, other.attributes[name]) for name, attribute in one.attributes.items())


def _same_attribute(one: ir.Attr, other: ir.Attr) -> bool:
    if one.type != other.type:
        return False
    if one.type == ir.AttributeType.TENSOR:
        a, b = one.as_tensor(), other.as_tensor()
        return a.dtype == b.dtype and np.array_equal(a.numpy(), b.numpy())
    return bool(one.value == other.value)
