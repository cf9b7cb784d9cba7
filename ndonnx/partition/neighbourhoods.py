"""From regions to neighbourhoods: cover most weights first, then have most neighbourhoods.

Along each chain of atoms a dynamic programme chooses the runs that become neighbourhoods. A
run counts the weights of those of its atoms that a channel group reaches, so a stem that
gains nothing by joining a unit stays outside. An atom may instead be entered, and the chains
nested in it partitioned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from ndonnx.errors import UsageError
from ndonnx.graph.costs import Cost, cost_of, is_weight
from ndonnx.graph.dataflow import Dataflow, Kind, reads, real_inputs
from ndonnx.partition.groups import ChannelGroups, find_groups
from ndonnx.partition.regions import Atom, Chain, find_chains
from ndonnx.partition.slices import extract, is_opaque, region_nodes

_EXTRA_WEIGHTED_ATOMS = 2
"""Weighted atoms by which a run may outgrow the shortest one with a width inside.

Enough for the projection that closes an inverted bottleneck."""

_COVER_TO_ENTER = 0.9
"""Part of an atom's weights that the neighbourhoods inside it must cover to be preferred to the
whole atom: enough to open a U-Net, too much to lose the value projection of an attention."""

_TRAILING_OPS = {
    "BatchNormalization", "Celu", "Clip", "Elu", "Gelu", "GroupNormalization", "HardSigmoid", "HardSwish",
    "InstanceNormalization", "LayerNormalization", "LeakyRelu", "Mish", "PRelu", "RMSNormalization", "Relu",
    "Selu", "Sigmoid", "SimplifiedLayerNormalization", "Softplus", "Softsign", "Swish", "Tanh",
    "ThresholdedRelu",
}  # fmt: skip
"""Operators that join the neighbourhood before them: its error is then measured behind them."""


@dataclass(frozen=True, eq=False)
class Neighbourhood:
    """A region chosen by the partition, or a piece of the teacher that is kept."""

    name: str
    entry: ir.Value | None
    exit: ir.Value | None
    context: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]
    groups: ChannelGroups | None
    reason: str | None
    """Why it is kept; None when it can be distilled."""

    @cached_property
    def cost(self) -> Cost:
        """Parameters and MACs."""
        return cost_of(self.nodes)

    @property
    def distillable(self) -> bool:
        """Whether there is a width to shrink inside."""
        return self.reason is None

    @property
    def widths(self) -> list[int]:
        """Number of units of each channel group."""
        return [group.width for group in self.groups.groups] if self.groups is not None else []


@dataclass(frozen=True, eq=False)
class Partition:
    """The teacher as neighbourhoods in topological order, kept pieces among them."""

    model: ir.Model
    """The working copy: constants folded, same value names as the teacher."""
    flow: Dataflow
    neighbourhoods: tuple[Neighbourhood, ...]

    @property
    def distillable(self) -> list[Neighbourhood]:
        """Those that can be shrunk."""
        return [n for n in self.neighbourhoods if n.distillable]

    def coverage(self) -> tuple[float, float]:
        """Part of all parameters and of all MACs that lies in distillable neighbourhoods, 0 to 1."""
        whole = cost_of(self.model.graph)
        inside = cost_of([node for n in self.distillable for node in n.nodes])
        return inside.parameters / max(1, whole.parameters), inside.macs / max(1, whole.macs)

    def slice_of(self, neighbourhood: Neighbourhood) -> ir.Model:
        """The neighbourhood as a runnable model: inputs are the entry and the context, one output."""
        if neighbourhood.entry is None or neighbourhood.exit is None:
            raise ValueError(f"{neighbourhood.name} has no single entry and exit")
        inputs = [neighbourhood.entry, *neighbourhood.context]
        return extract(self.model, neighbourhood.nodes, inputs, [neighbourhood.exit])


def partition(
    model: ir.Model, *, granularity: str = "block", cut: Sequence[str] = (), freeze: Sequence[str] = ()
) -> Partition:
    """Partition a working copy (constants folded) into neighbourhoods.

    Args:
        model: as `fold_constants` returns it; not changed.
        granularity: `block`, the smallest regions with a width to shrink inside.
        cut: values that must be boundaries; a region with one of them inside is entered or split.
        freeze: values whose producing neighbourhood is kept.

    Raises:
        UsageError: a `cut` or `freeze` value is not in the model, or the granularity is unknown.
    """
    if granularity != "block":
        raise UsageError(f"granularity '{granularity}' is not known; use 'block'")
    flow = _choose_stream(model)
    by_name = {value.name: value for value in flow.kinds}
    for name in (*cut, *freeze):
        if name not in by_name:
            raise UsageError(f"value '{name}' (cut or freeze) is not in the model; `ndonnx inspect` lists the names")
    cuts, frozen = (frozenset(by_name[name] for name in names) for names in (cut, freeze))
    chooser = _Chooser(flow, cuts)
    runs = [run for chain in find_chains(flow) for run in chooser.best(chain).runs]
    return Partition(model, flow, tuple(_name(_with_rest(flow, runs, cuts, frozen))))


def _choose_stream(model: ir.Model) -> Dataflow:
    """Try which inputs are the stream and keep the choice that covers most parameters.

    All inputs together first, then each alone with the others as context.
    """
    names = [value.name or "" for value in real_inputs(model.graph)]
    choices: list[list[str]] = [names] if len(names) == 1 else [names, *([name] for name in names)]
    flows = [Dataflow.of(model.graph, choice) for choice in choices]
    if len(flows) == 1:
        return flows[0]
    return max(flows, key=_covered)


def _covered(flow: Dataflow) -> int:
    chooser = _Chooser(flow, frozenset())
    return sum(chooser.best(chain).weights for chain in find_chains(flow))


@dataclass(frozen=True)
class _Run:
    entry: ir.Value
    exit: ir.Value
    groups: ChannelGroups


@dataclass(frozen=True)
class _Choice:
    """What a stretch of a chain is worth; compared by weights, then number, then fewest nodes."""

    weights: int = 0
    runs: tuple[_Run, ...] = ()
    nodes: int = 0

    def __add__(self, other: _Choice) -> _Choice:
        return _Choice(self.weights + other.weights, self.runs + other.runs, self.nodes + other.nodes)

    @property
    def rank(self) -> tuple[int, int, int]:
        return self.weights, len(self.runs), -self.nodes

    def opens(self, whole: _Choice) -> bool:
        """Whether going inside is better than taking an atom whole."""
        return len(self.runs) > 1 and self.weights >= _COVER_TO_ENTER * whole.weights


class _Chooser:
    """The dynamic programme over chains."""

    def __init__(self, flow: Dataflow, cuts: frozenset[ir.Value]) -> None:
        self.flow = flow
        self.cuts = cuts

    def best(self, chain: Chain) -> _Choice:
        """The best choice of runs along a chain and inside its atoms."""
        outer_first = [chain]
        for found in outer_first:
            outer_first.extend(nested for atom in found.atoms for nested in atom.nested)
        choices: dict[Chain, _Choice] = {}
        for found in reversed(outer_first):
            choices[found] = self._along(found, choices)
        return choices[chain]

    def _along(self, chain: Chain, inner: dict[Chain, _Choice]) -> _Choice:
        runs = self._runs(chain.atoms)
        best = [_Choice()]
        arriving: list[list[_Choice]] = [[] for _ in range(len(chain.atoms) + 1)]
        for i, atom in enumerate(chain.atoms):
            entered = sum((inner[nested] for nested in atom.nested), _Choice())
            whole = runs[i].pop(i + 1, None)
            step = entered if whole is None or entered.opens(whole) else whole
            arriving[i + 1].append(best[i] + step)
            for stop, choice in runs[i].items():
                arriving[stop].append(best[i] + choice)
            best.append(max(arriving[i + 1], key=lambda c: c.rank))
        return best[-1]

    def _runs(self, atoms: list[Atom]) -> list[dict[int, _Choice]]:
        """For each first atom, the worthwhile runs by where they stop.

        A run that holds two neighbourhoods side by side is none itself: it would be split.
        """
        weighted = [self._has_weights(atom) for atom in atoms]
        runs: list[dict[int, _Choice]] = [{} for _ in atoms]
        never = len(atoms) + 1
        first_stop = [never] * (never + 1)  # the earliest stop of any run that starts here or later
        for start in reversed(range(len(atoms))):
            for stop, choice in self._runs_from(atoms, weighted, start):
                first_stop[start] = min(first_stop[start], first_stop[start + 1], stop)
                if first_stop[first_stop[start]] > stop:
                    runs[start][stop] = choice
            first_stop[start] = min(first_stop[start], first_stop[start + 1])
        return runs

    def _runs_from(self, atoms: list[Atom], weighted: list[bool], start: int) -> Iterator[tuple[int, _Choice]]:
        """Runs that begin with atom `start`: the shortest with a width inside, and somewhat longer ones."""
        extra = stretch = found = 0
        for stop in range(start + 1, len(atoms) + 1):
            last = atoms[stop - 1]
            if self.cuts & last.inner or (stop > start + 1 and last.entry in self.cuts) or self._opaque(last):
                return
            stretch = 0 if weighted[stop - 1] else stretch + 1
            if stretch > _LONGEST_WEIGHTLESS_STRETCH or not weighted[start]:
                return
            if stretch:
                continue
            extra += bool(found)
            if extra > _EXTRA_WEIGHTED_ATOMS or stop - start > _LONGEST_RUN:
                return
            choice = self._worth(atoms[start:stop])
            if choice is not None:
                found += 1
                yield stop, choice

    def _worth(self, atoms: list[Atom]) -> _Choice | None:
        entry, exit_ = atoms[0].entry, atoms[-1].exit
        nodes, _ = region_nodes(self.flow, entry, exit_)
        if any(is_opaque(node) for node in nodes) or self._leaks(nodes, exit_):
            return None
        groups = find_groups(nodes, exit_)
        if not groups.groups:
            return None
        reached = groups.weights()
        weights = 0
        for atom in atoms:
            held = {value for node in self._nodes(atom) for value in reads(node) if is_weight(value)}
            if any(value.name in reached for value in held):
                weights += sum(value.const_value.size for value in held if value.const_value is not None)
        return _Choice(weights, (_Run(entry, exit_, groups),), len(nodes))

    def _leaks(self, nodes: list[ir.Node], exit_: ir.Value) -> bool:
        """Whether a shape inside the region is read outside it: shrinking would change what is read there."""
        own = set(nodes)
        for node in nodes:
            for value in node.outputs:
                if value is not exit_ and self.flow.is_stream(value):
                    for user in value.consumers():
                        if user not in own and self.flow.kinds.get(user.outputs[0]) is Kind.METADATA:
                            return True
        return False

    def _nodes(self, atom: Atom) -> list[ir.Node]:
        producers = dict.fromkeys(value.producer() for value in (*atom.inner, atom.exit))
        return [node for node in producers if node is not None]

    def _has_weights(self, atom: Atom) -> bool:
        return any(is_weight(value) for node in self._nodes(atom) for value in reads(node))

    def _opaque(self, atom: Atom) -> bool:
        return any(is_opaque(node) for node in self._nodes(atom))


_LONGEST_WEIGHTLESS_STRETCH = 64
"""Atoms without weights after which a run is not drawn out further."""
_LONGEST_RUN = 256
"""Atoms after which a run is given up."""


def _with_rest(
    flow: Dataflow, runs: list[_Run], cuts: frozenset[ir.Value], frozen: frozenset[ir.Value]
) -> list[Neighbourhood]:
    """Join trailing operators to the runs, and gather all other nodes into kept pieces."""
    found: list[Neighbourhood] = []
    taken: set[ir.Node] = set()
    barriers = cuts | {run.entry for run in runs}
    for run in runs:
        exit_ = _extend(flow, run.exit, barriers)
        nodes, context = region_nodes(flow, run.entry, exit_)
        made = (value for node in nodes for value in node.outputs)
        hit = next((value for value in made if value in frozen), None)
        reason = f"frozen: it makes '{hit.name}'" if hit is not None else None
        groups = find_groups(nodes, exit_)
        found.append(Neighbourhood("", run.entry, exit_, tuple(context), tuple(nodes), groups, reason))
        assert not any(node in taken and flow.is_stream(node.outputs[0]) for node in nodes)
        taken.update(nodes)
    rest = [n for n in flow.graph if n not in taken and flow.kinds[n.outputs[0]] not in (Kind.METADATA, Kind.CONSTANT)]
    pieces = [_kept(flow, piece) for piece in _connected(rest)]
    return sorted(found + pieces, key=lambda n: flow.order[n.nodes[0]])


def _extend(flow: Dataflow, exit_: ir.Value, barriers: frozenset[ir.Value]) -> ir.Value:
    """Move an exit behind the activations and norms that alone read it, up to a value that must be a boundary."""
    while exit_ not in barriers and not exit_.is_graph_output():
        users = [user for user in exit_.consumers() if flow.kinds.get(user.outputs[0]) is not Kind.METADATA]
        if len(users) != 1 or len(exit_.consumers()) != 1 or users[0].op_type not in _TRAILING_OPS:
            break
        if is_opaque(users[0]) or users[0] not in flow.order:
            break
        if flow.stream_reads(users[0]) != [exit_] or sum(1 for v in users[0].outputs if v.uses()) > 1:
            break
        exit_ = users[0].outputs[0]
    return exit_


def _connected(nodes: Iterable[ir.Node]) -> list[list[ir.Node]]:
    """Split nodes into pieces that hang together, each in topological order."""
    piece_of: dict[ir.Node, list[ir.Node]] = {}
    for node in nodes:
        before = [piece_of[p] for value in reads(node) if (p := value.producer()) in piece_of]
        piece = before[0] if before else []
        for other in before[1:]:
            if other is not piece:
                piece += other
                piece_of.update(dict.fromkeys(other, piece))
        piece.append(node)
        piece_of[node] = piece
    return list({id(piece): piece for piece in piece_of.values()}.values())


def _kept(flow: Dataflow, nodes: list[ir.Node]) -> Neighbourhood:
    nodes = sorted(nodes, key=flow.order.__getitem__)
    own = {value for node in nodes for value in node.outputs}
    inputs = list(dict.fromkeys(v for node in nodes for v in flow.stream_reads(node) if v not in own))
    outputs = [v for v in own if v.is_graph_output() or any(user.outputs[0] not in own for user in v.consumers())]
    outputs.sort(key=lambda value: value.name or "")
    return Neighbourhood(
        "", inputs[0] if inputs else None, outputs[-1] if outputs else None, (), tuple(nodes), None, _why_kept(nodes)
    )


def _why_kept(nodes: list[ir.Node]) -> str:
    opaque = next((node for node in nodes if is_opaque(node)), None)
    if opaque is not None:
        domain = f"{opaque.domain}::" if opaque.domain else ""
        return f"holds {domain}{opaque.op_type}, which cannot be trained"
    if cost_of(nodes).parameters == 0:
        return "holds no weights"
    return "no width to shrink inside: its channels reach its ends"


def _name(neighbourhoods: list[Neighbourhood]) -> list[Neighbourhood]:
    """Number them in order, so that the same teacher always gets the same names."""
    digits = max(2, len(str(len(neighbourhoods))))
    return [
        Neighbourhood(f"n{i:0{digits}d}", n.entry, n.exit, n.context, n.nodes, n.groups, n.reason)
        for i, n in enumerate(neighbourhoods, 1)
    ]
