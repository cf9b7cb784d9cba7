"""Runs of atoms that could become neighbourhoods: those with a width to shrink inside, and not much longer.

A longer run has all the widths of a shorter one inside it. So the shortest run with a width ends
no earlier the later it starts, and looking for it along a chain takes a number of looks that
grows with the chain, not with its square.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import onnx_ir as ir

from ndonnx.graph.costs import weights_of
from ndonnx.graph.dataflow import Dataflow, Kind
from ndonnx.graph.passes.fused_writer import is_inside_fused
from ndonnx.graph.shapes.lengths import Axes
from ndonnx.graph.shapes.targets import shape_readers
from ndonnx.partition.boundaries import can_be_boundary
from ndonnx.partition.channels.group import ChannelGroups
from ndonnx.partition.channels.groups import find_groups, shrinking_axes
from ndonnx.partition.regions import Atom, Chain
from ndonnx.partition.slices import is_opaque, is_region, region_nodes

LONGEST_RUN = 256
"""Atoms after which a run is given up."""

_EXTRA_ATOMS = 2
"""Weighted atoms, norms aside, by which a run may outgrow the shortest one with a width inside.

Enough for the projection that closes an inverted bottleneck."""

_PATIENCE = 8
"""Weighted atoms without a width after which a look is taken at all that could follow."""

_SMALL_ATOM, _GROWTH = 64, 1.25
"""Values up to which an atom may always be part of a run; above, it must have so many times the values of
the largest such atom inside it. Thus what nests without end costs little more than what does not."""

TRAILING_OPS = {
    "BatchNormalization", "Celu", "Clip", "Elu", "Gelu", "GroupNormalization", "HardSigmoid", "HardSwish",
    "InstanceNormalization", "LayerNormalization", "LeakyRelu", "Mish", "PRelu", "RMSNormalization", "Relu",
    "Selu", "Sigmoid", "SimplifiedLayerNormalization", "Softplus", "Softsign", "Swish", "Tanh",
    "ThresholdedRelu",
}  # fmt: skip
"""Operators that join the neighbourhood before them: its error is then measured behind them."""


@dataclass(frozen=True, eq=False, slots=True)
class Run:
    """A region that can be a neighbourhood."""

    entry: ir.Value
    exit: ir.Value
    groups: ChannelGroups
    weights: int
    """Elements of the weights of those of its atoms that a channel group reaches."""
    touched: int
    """Elements of the weights that themselves have an axis in a channel group."""
    nodes: int
    shares: bool = False
    """Whether something outside it reads a matrix of its, as far as that was looked for."""


@dataclass(frozen=True, slots=True)
class Inside:
    """What an atom holds, itself and nested."""

    values: int
    weighted: int
    """Nodes that read weights."""
    closed: bool
    """Whether it holds a `cut`, or something that cannot be trained."""
    largest: int
    """Values of the largest atom that may be part of a run: its own, or one nested in it."""

    @property
    def usable(self) -> bool:
        """Whether it may be part of a run."""
        return not self.closed and self.largest == self.values


class Runs:
    """Looks at the runs of one dataflow.

    Args:
        flow: what the chains were found in.
        chains: the outermost ones; what atoms hold is found out for all of them at once.
        cuts: values that no run may have inside.
    """

    def __init__(self, flow: Dataflow, chains: Iterable[Chain], cuts: Collection[ir.Value] = ()) -> None:
        self._flow = flow
        self._cuts = frozenset(cuts)
        self._held: dict[ir.Node, tuple[ir.Value, ...]] = {}
        self.inside: dict[Atom, Inside] = {}
        outer_first = [atom for chain in chains for atom in chain.atoms]
        for atom in outer_first:
            outer_first.extend(within for chain in atom.nested for within in chain.atoms)
        for atom in reversed(outer_first):
            self.inside[atom] = self._look_inside(atom)

    def _look_inside(self, atom: Atom) -> Inside:
        below = [within for chain in atom.nested for within in chain.atoms]
        nested = [self.inside[within] for within in below]
        own = _producers((*atom.loose, atom.exit))
        values = len(atom.loose) + sum(found.values + 1 for found in nested)
        largest = max((found.largest for found in nested), default=0)
        return Inside(
            values,
            sum(bool(self._weights(node)) for node in own) + sum(found.weighted for found in nested),
            any(map(is_opaque, own))
            or any(found.closed for found in nested)
            or not self._cuts.isdisjoint((*atom.loose, *(within.exit for within in below))),
            values if values <= _SMALL_ATOM or values >= _GROWTH * largest else largest,
        )

    def _weights(self, node: ir.Node) -> tuple[ir.Value, ...]:
        if node not in self._held:
            self._held[node] = tuple(weights_of(node))
        return self._held[node]

    def run(self, atoms: list[Atom], groups: ChannelGroups | None = None) -> Run | None:
        """These atoms as one run; None when there is no width inside, or it cannot be cut out.

        `groups` spares finding them again.
        """
        entry, exit_ = atoms[0].entry, atoms[-1].exit
        nodes, context = region_nodes(self._flow, entry, exit_)
        groups = self._groups_of(nodes, context, entry, exit_, groups)
        if groups is None:
            return None
        reached = groups.weights()
        weights: dict[ir.Value, None] = {}
        for atom in atoms:
            held = [value for node in self.nodes([atom]) for value in self._weights(node)]
            if any(value.name in reached for value in held):
                weights.update(dict.fromkeys(held))
        touched = (value for value in weights if value.name in reached)
        return Run(entry, exit_, groups, _size(weights), _size(touched), len(nodes))

    def between(self, entry: ir.Value, exit_: ir.Value) -> Run | None:
        """All from one value to another as one run, whatever atoms there are; None where that cannot be one."""
        if not is_region(self._flow, entry, exit_):
            return None
        nodes, context = region_nodes(self._flow, entry, exit_)
        made = {value for node in nodes for value in node.outputs}
        if not self._cuts.isdisjoint(made - {exit_}):
            return None
        groups = self._groups_of(nodes, context, entry, exit_, None)
        if groups is None:
            return None
        touched = _size({v: None for node in nodes for v in self._weights(node) if v.name in groups.weights()})
        return Run(entry, exit_, groups, touched, touched, len(nodes))

    def _groups_of(
        self,
        nodes: list[ir.Node],
        context: list[ir.Value],
        entry: ir.Value,
        exit_: ir.Value,
        groups: ChannelGroups | None,
    ) -> ChannelGroups | None:
        """The channel groups of nodes that can be cut out as a neighbourhood with a width inside; None of others."""
        if any(map(is_opaque, nodes)) or self._leaks(nodes, exit_):
            return None
        if not all(map(self.is_boundary, (entry, exit_))) or any(map(is_inside_fused, context)):
            return None
        groups = groups or find_groups(nodes, exit_)
        return groups if groups.groups else None

    def groups(self, atoms: list[Atom]) -> ChannelGroups:
        """The channel groups of a run."""
        nodes, _ = region_nodes(self._flow, atoms[0].entry, atoms[-1].exit)
        return find_groups(nodes, atoms[-1].exit)

    def nodes(self, atoms: Iterable[Atom]) -> list[ir.Node]:
        """Nodes that make the stream values of these atoms."""
        return _producers(value for atom in atoms for value in (*atom.inner, atom.exit))

    def size(self, nodes: Iterable[ir.Node]) -> int:
        """Elements of all weights that these nodes read."""
        return _size({value: None for node in nodes for value in self._weights(node)})

    def _leaks(self, nodes: list[ir.Node], exit_: ir.Value) -> bool:
        """Whether a length inside the region that shrinking changes is read outside it."""
        own = set(nodes)
        names = {node.outputs[0].name or "" for node in nodes}
        read: list[tuple[ir.Value, Axes]] = []
        for node in nodes:
            for value in node.outputs:
                if value is not exit_ and self._flow.is_stream(value):
                    read += [(value, axes) for name, axes in shape_readers(value).items() if name not in names]
                    for user in value.consumers():
                        if user not in own and self._flow.kinds.get(user.outputs[0]) is Kind.METADATA:
                            return True
        if not read:
            return False
        shrinking = shrinking_axes(nodes, exit_)
        return any(axes is None or axes & shrinking.get(value, frozenset()) for value, axes in read)

    def is_boundary(self, value: ir.Value) -> bool:
        """Whether a run may begin or end at a value, as far as the graph tells."""
        return can_be_boundary(value)

    def along(self, atoms: list[Atom]) -> list[dict[int, Run]]:
        """For each atom the worthwhile runs that begin with it, by where they stop.

        A run that holds two neighbourhoods side by side is none itself: it would be split.
        """
        line = _Line(self, atoms)
        runs: list[dict[int, Run]] = [{} for _ in atoms]
        never = len(atoms) + 1
        first_stop = [never] * (never + 1)  # the earliest stop of any run that starts here or later
        for start in reversed(range(len(atoms))):
            first_stop[start] = min(first_stop[start + 1], min(runs[start], default=never))
            for begin, stop, groups in line.stops(start):
                if first_stop[first_stop[start]] <= stop:
                    break
                run = self.run(atoms[begin:stop], groups)
                if run is not None:
                    runs[begin][stop] = run
                    if begin == start:
                        first_stop[start] = min(first_stop[start], stop)
        return runs

    def reach(self, atoms: list[Atom]) -> list[int]:
        """For each atom the last stop of a run that begins with it; the atom itself where there is none."""
        reach = [0] * len(atoms)
        for i in reversed(range(len(atoms))):
            if not self.inside[atoms[i]].usable:
                reach[i] = i
            elif i + 1 == len(atoms) or atoms[i + 1].entry in self._cuts:
                reach[i] = i + 1
            else:
                reach[i] = max(i + 1, reach[i + 1])
        return reach


class _Line:
    """Where runs along one chain may stop."""

    def __init__(self, runs: Runs, atoms: list[Atom]) -> None:
        self._runs = runs
        self._atoms = atoms
        self._reach = runs.reach(atoms)
        self._weighted = [i for i, atom in enumerate(atoms) if runs.inside[atom].weighted]
        self._before = list(accumulate((runs.inside[atom].weighted for atom in atoms), initial=0))
        self._index = {i: k for k, i in enumerate(self._weighted)}
        self._shortest = self._find_shortest()

    def stops(self, start: int) -> Iterator[tuple[int, int, ChannelGroups | None]]:
        """Ends of the shortest run with a width inside (and its groups), and of somewhat longer ones, in order.

        Ends that are no boundaries are moved outwards, over atoms without weights, or passed over.
        """
        begin = self._begin(start)
        if start not in self._shortest or begin is None:
            return
        shortest, groups = self._shortest[start]
        extra, counting = 0, False
        for i in self._weighted[self._index[shortest - 1] :]:
            extra += counting and not is_trailing(self._atoms[i])
            stop = self._end(i + 1)
            if max(i + 1, stop or 0) > min(self._last(start), self._reach[begin]) or extra > _EXTRA_ATOMS:
                return
            if stop is not None:
                counting = True
                yield begin, stop, groups if (begin, stop) == (start, shortest) else None

    def _begin(self, start: int) -> int | None:
        """The place at or before a start at which a run can begin; None where a weight is in between."""
        while not self._runs.is_boundary(self._atoms[start].entry):
            start -= 1
            if start < 0 or start in self._index:
                return None
        return start

    def _end(self, stop: int) -> int | None:
        """The place at or behind a stop at which a run can end; None where a weight is in between."""
        while not self._runs.is_boundary(self._atoms[stop - 1].exit):
            if stop == len(self._atoms) or stop in self._index:
                return None
            stop += 1
        return stop

    def _last(self, start: int) -> int:
        return min(self._reach[start], start + LONGEST_RUN)

    def _find_shortest(self) -> dict[int, tuple[int, ChannelGroups]]:
        """By start, where the shortest run with a width inside stops, and its groups."""
        found: dict[int, tuple[int, ChannelGroups]] = {}
        at = 0  # in `_weighted`: no shorter run than up to here has a width, wherever it starts
        for k, start in enumerate(self._weighted):
            at = max(at, k)
            while at < len(self._weighted) and (stop := self._weighted[at] + 1) <= self._last(start):
                if (groups := self._groups(start, stop)) is not None:
                    found[start] = stop, groups
                    break
                at += 1
                if at - k >= _PATIENCE:
                    at = self._ahead(start, at)
        return found

    def _ahead(self, start: int, at: int) -> int:
        """The first place, from `at` on, up to which a run from `start` has a width; the end of the look if none is."""
        end = bisect_right(self._weighted, min(start + 2 * LONGEST_RUN, self._reach[start]) - 1)
        if at >= end or self._groups(start, self._weighted[end - 1] + 1) is None:
            return max(at, end)
        places = range(at, end)
        return places[bisect_left(places, True, key=lambda i: self._groups(start, self._weighted[i] + 1) is not None)]

    def _groups(self, start: int, stop: int) -> ChannelGroups | None:
        """The groups of a run; None where it has none."""
        if self._before[stop] - self._before[start] < 2:  # one makes the channels, another sums over them
            return None
        groups = self._runs.groups(self._atoms[start:stop])
        return groups if groups.groups else None


def _producers(values: Iterable[ir.Value]) -> list[ir.Node]:
    return list(dict.fromkeys(node for value in values if (node := value.producer()) is not None))


def is_trailing(atom: Atom) -> bool:
    """Whether an atom is an operator that joins what is before it."""
    node = atom.exit.producer()
    return node is not None and node.op_type in TRAILING_OPS


def _size(weights: Iterable[ir.Value]) -> int:
    return sum(value.const_value.size for value in weights if value.const_value is not None)
