"""The teacher as neighbourhoods: chosen runs with what joins them, and all the rest in kept pieces.

`regions.py` finds what can be cut out, `runs.py` what has a width to shrink inside, `choice.py` what is
worth taking.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from operator import or_

import onnx_ir as ir

from ndonnx.errors import UsageError
from ndonnx.graph.bound import BoundShapes, bind
from ndonnx.graph.costs import Cost, is_weight, parameters_of
from ndonnx.graph.dataflow import Dataflow, Kind, reads, real_inputs
from ndonnx.graph.interface import NOWHERE, Interface, first_sizes, sample_axis, samples_back
from ndonnx.graph.macs import sample_cost
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.graph.working_copy import working_copy
from ndonnx.partition.channels.groups import ChannelGroups, FrozenWidth, find_groups, frozen_widths
from ndonnx.partition.choice import Choice, Chooser, worth
from ndonnx.partition.layers import (
    LINEAR_OPERATORS,
    layer_runs,
    leftover_runs,
    why_left_out,
    why_left_over,
)
from ndonnx.partition.reasons import Why, no_width, why_kept
from ndonnx.partition.regions import around, find_chains
from ndonnx.partition.runs import TRAILING_OPS, Run, Runs
from ndonnx.partition.sharing import (
    Sharing,
    aligning_cuts,
    exits_before,
    find_sharing,
    is_matrix,
    unlike_sharers,
    weights_in,
)
from ndonnx.partition.slices import extract, is_opaque, region_nodes, renamed, with_copies
from ndonnx.runtime.gc_pause import collector_paused


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
    first: str | None = None
    """The neighbourhood that computes the same with the same weights and whose student stands here too; None: its own
    student."""
    names: Mapping[str, str] = field(default_factory=dict)
    """From the names of that neighbourhood's values to those of the values here."""
    elsewhere: frozenset[str] = frozenset()
    """Weights that something else reads too, in another way."""
    held: frozenset[str] = frozenset()
    """Those of them that a student leaves as they are."""

    @cached_property
    def parameters(self) -> int:
        """Elements of the weights inside."""
        return parameters_of(self.nodes)

    @property
    def distillable(self) -> bool:
        """Whether a method may be tried on it; one that needs a width may still find none."""
        return self.reason is None

    @cached_property
    def frozen(self) -> list[FrozenWidth]:
        """Widths inside that have to stay whole, with the operator to blame."""
        return frozen_widths(self.nodes)[0]

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
    interface: Interface = field(default_factory=Interface)
    """How the teacher and its students are fed, and where the samples lie in what they answer."""
    stated: Mapping[str, Sequence[int]] | None = None
    """Shape of each input that MACs are told for; None for one sample of the sizes that the model states."""

    @cached_property
    def shapes(self) -> BoundShapes:
        """The shapes of all values in numbers, for the stated ones of the inputs."""
        return bind(self.model, self.stated)

    @cached_property
    def whole(self) -> Cost:
        """Cost of the whole model, MACs for one sample."""
        return sample_cost(self.model.graph, self.shapes)

    @property
    def why_no_macs(self) -> str | None:
        """Why MACs cannot be told, in one line; None where they can."""
        if self.whole.macs is not None:
            return None
        if self.shapes.open:
            return f"MACs depend on sizes that nothing states: {', '.join(self.shapes.open)}"
        return "MACs cannot be told: shapes inside the model do not follow from those of its inputs"

    def cost(self, neighbourhood: Neighbourhood) -> Cost:
        """Cost of one neighbourhood, MACs for one sample."""
        return sample_cost(neighbourhood.nodes, self.shapes)

    def cost_of(self, model: ir.Model) -> Cost:
        """Cost of the teacher or of a whole student, MACs for one sample of the teacher's stated shapes."""
        working = working_copy(infer_shapes(model.clone()), self.interface)
        return sample_cost(working.graph, bind(working, self.stated))

    @property
    def distillable(self) -> list[Neighbourhood]:
        """Those that can be shrunk."""
        return [n for n in self.neighbourhoods if n.distillable]

    @property
    def trained(self) -> list[Neighbourhood]:
        """Those that have a student of their own: of several with one set of weights the first."""
        return [n for n in self.distillable if n.first is None]

    def uses(self, neighbourhood: Neighbourhood) -> list[Neighbourhood]:
        """All places of a neighbourhood's student, in order: itself, and those that share its weights."""
        return self._places[neighbourhood.first or neighbourhood.name]

    @cached_property
    def _places(self) -> dict[str, list[Neighbourhood]]:
        """All places of each student, by the name of its first neighbourhood."""
        found: dict[str, list[Neighbourhood]] = {}
        for n in self.distillable:
            found.setdefault(n.first or n.name, []).append(n)
        return found

    @property
    def shared(self) -> dict[str, str]:
        """Neighbourhoods whose student is that of another one, by name, with the name of that one."""
        return {n.name: n.first for n in self.distillable if n.first is not None}

    @cached_property
    def in_order(self) -> list[Neighbourhood]:
        """Those that can be shrunk so that each comes behind all that it depends on, the places of a student together
        where that can be."""
        if not self.shared:
            return self.distillable
        order: dict[str, Neighbourhood] = {}
        passed = 0
        for n in self.distillable:
            uses = self.uses(n) if n.first is None else [n]
            together = [use for use in uses if use is n or not self._before[use.name] & ~passed]
            for use in together if n.name not in order else []:
                order[use.name] = use
                passed |= self._bit[use.name]
        return list(order.values())

    def together(self, neighbourhood: Neighbourhood) -> bool:
        """Whether a place of a student can be reached when the first one is, without that student."""
        uses = self.uses(neighbourhood)
        own = reduce(or_, (self._bit[use.name] for use in uses))
        first, last = (self._position[n.name] for n in (uses[0], neighbourhood))
        between = self.in_order[first : last + 1]
        return not self._before[neighbourhood.name] & own and all(n in uses for n in between)

    @cached_property
    def _before(self) -> dict[str, int]:
        return exits_before(self.flow, self.distillable)

    @cached_property
    def _bit(self) -> dict[str, int]:
        return {n.name: 1 << place for place, n in enumerate(self.distillable)}

    @cached_property
    def _position(self) -> dict[str, int]:
        return {n.name: place for place, n in enumerate(self.in_order)}

    def coverage(self) -> tuple[float, float | None]:
        """Part of all parameters and of all MACs that lies in distillable neighbourhoods, 0 to 1.

        Weights that several of them read count once. None where the MACs cannot be told.
        """
        inside = sample_cost([node for n in self.distillable for node in n.nodes], self.shapes)
        parameters = inside.parameters / max(1, self.whole.parameters)
        if inside.macs is None or self.whole.macs is None:
            return parameters, None
        return parameters, inside.macs / max(1, self.whole.macs)

    def slice_of(self, neighbourhood: Neighbourhood) -> ir.Model:
        """The neighbourhood as a runnable model: inputs are the entry and the context, one output, samples first."""
        if neighbourhood.entry is None or neighbourhood.exit is None:
            raise ValueError(f"{neighbourhood.name} has no single entry and exit")
        inputs = [neighbourhood.entry, *neighbourhood.context]
        model = extract(self.model, neighbourhood.nodes, inputs, [neighbourhood.exit])
        copies = neighbourhood.groups.copies if neighbourhood.groups is not None else ()
        return with_copies(model, {(copy.node, copy.initializer): copy.name for copy in copies})

    def at(self, neighbourhood: Neighbourhood, student: ir.Model) -> ir.Model:
        """A student for one of its places (see `uses`), where values have other names and perhaps other sizes."""
        if neighbourhood.first is None:
            return student
        assert neighbourhood.entry is not None and neighbourhood.exit is not None
        ends = (neighbourhood.entry, *neighbourhood.context, neighbourhood.exit)
        shapes = {e.name or "": ir.Shape(first_sizes(e.shape, sample_axis(e))) for e in ends if e.shape is not None}
        return renamed(student, neighbourhood.names, shapes)

    def as_in_teacher(self, student: ir.Model) -> ir.Model:
        """A student of a slice with the samples of its ends where the teacher has them; itself if that is so."""
        names = {value.name for value in (*student.graph.inputs, *student.graph.outputs)}
        turned = {name: value for name, value in self._turned.items() if name in names}
        if not turned:
            return student
        axes = {name: sample_axis(value) for name, value in turned.items()}
        return samples_back(student.clone(), axes, {name: value.shape for name, value in turned.items()})

    @cached_property
    def _turned(self) -> dict[str, ir.Value]:
        """Ends of slices, by name, whose samples do not lie along the first axis."""
        ends = (value for n in self.distillable for value in (n.entry, *n.context, n.exit) if value is not None)
        return {value.name or "": value for value in ends if sample_axis(value) not in (0, NOWHERE)}


@collector_paused()
def partition(
    model: ir.Model,
    *,
    granularity: str = "block",
    cut: Sequence[str] = (),
    freeze: Sequence[str] = (),
    around: frozenset[str] = frozenset(),
) -> Partition:
    """Partition a working copy (constants folded) into neighbourhoods.

    Args:
        model: as `ndonnx.graph.working_copy` makes it; not changed.
        granularity: `block`, the smallest regions with a width to shrink inside; `layer`, one linear
            operator each.
        cut: values that must be boundaries; a region with one of them inside is entered or split.
        freeze: values whose producing neighbourhood is kept.
        around: operators around whose weights there are to be regions even where no width is inside, as student
            methods want them that need none.

    Raises:
        UsageError: a `cut` or `freeze` value is not in the model, or the granularity is unknown.
    """
    if granularity not in ("block", "layer"):
        raise UsageError(f"granularity '{granularity}' is not known; use 'block' or 'layer'")
    known = {value.name for value in (*model.graph.inputs, *model.graph.initializers.values())}
    known.update(value.name for node in model.graph for value in node.outputs)
    for name in (*cut, *freeze):
        if name not in known:
            raise UsageError(f"value '{name}' (cut or freeze) is not in the model; `ndonnx inspect` lists the names")
    if granularity == "layer":
        flow, choice = Dataflow.of(model.graph), None
    else:
        flow, choice = _choose_stream(model)
    by_name = {value.name: value for value in flow.kinds}
    cuts, frozen = (frozenset(by_name[name] for name in names) for names in (cut, freeze))
    if choice is None:
        runs = layer_runs(flow, cuts, LINEAR_OPERATORS | around)
        named = _name(_with_rest(flow, runs, cuts | _ends_of_shared(runs), frozen, why_left_out))
        return Partition(model, flow, tuple(_marked(named, find_sharing(flow, named))), Interface.of(model))
    if cuts or frozen:
        choice = Chooser(flow, find_chains(flow), cuts, frozen).best()
    return Partition(model, flow, tuple(_settled(flow, choice.runs(), cuts, frozen, around)), Interface.of(model))


def _ends_of_shared(layers: Iterable[Run]) -> frozenset[ir.Value]:
    """Exits of layers that share their weight. What follows does not join them: at other places it may be another."""
    return frozenset(run.exit for run in layers if run.shares)


def _settled(
    flow: Dataflow,
    runs: list[Run],
    cuts: frozenset[ir.Value],
    frozen: frozenset[ir.Value],
    operators: frozenset[str],
) -> list[Neighbourhood]:
    """The runs as neighbourhoods, in which what shares weights is alike, or one neighbourhood, as far as possible.

    Layers of these operators that the runs leave over are neighbourhoods too.
    """

    ends: frozenset[ir.Value] = frozenset()

    def assembled(runs: list[Run]) -> tuple[list[Neighbourhood], Sharing]:
        left = leftover_runs(flow, runs, operators, cuts | ends) if operators else []
        why = why_left_over if operators else no_width
        named = _name(_with_rest(flow, [*runs, *left], cuts | ends | _ends_of_shared(left), frozen, why))
        return named, find_sharing(flow, named)

    found, sharing = assembled(runs)
    if not sharing.elsewhere:
        return _marked(found, sharing)
    chains = find_chains(flow)
    if ends := aligning_cuts(flow, found, sharing):
        runs = Chooser(flow, chains, cuts | ends, frozen).best().runs()
        found, sharing = assembled(runs)
    tool = Runs(flow, chains, cuts)
    for _ in range(len(runs)):
        merged = _merged(flow, tool, runs, found, sharing, frozen)
        if merged is None:
            break
        runs = merged
        found, sharing = assembled(runs)
    return _marked(found, sharing)


def _merged(
    flow: Dataflow,
    tool: Runs,
    runs: list[Run],
    found: list[Neighbourhood],
    sharing: Sharing,
    frozen: frozenset[ir.Value],
) -> list[Run] | None:
    """The runs with some of them put together that share a weight in different ways; None where that gains nothing.

    Inside one neighbourhood the channels of a shared weight are followed through all its uses.
    """
    total = max(1, parameters_of(flow.graph))
    marked = _marked(found, sharing)
    for members in unlike_sharers(found, sharing):
        ends = [(n.entry, n.exit) for n in members if n.entry is not None and n.exit is not None]
        run = next((run for pair in around(flow, ends) if (run := tool.between(*pair)) is not None), None)
        if run is None:
            continue
        nodes, _ = region_nodes(flow, run.entry, run.exit)
        inside = set(nodes)
        if any(value in frozen for node in nodes for value in node.outputs):
            continue
        apart = [_touched(n) for n in marked if n.distillable and n.first is None and not inside.isdisjoint(n.nodes)]
        if worth(run.touched, total) > sum(worth(touched, total) for touched in apart):
            others = [other for other in runs if other.exit.producer() not in inside]
            return sorted([*others, run], key=lambda run: flow.order[run.exit.producer()])  # type: ignore[index]
    return None


def _touched(neighbourhood: Neighbourhood) -> int:
    """Elements of the weights that have an axis in a channel group."""
    reached = neighbourhood.groups.weights() if neighbourhood.groups is not None else set()
    weights = weights_in(neighbourhood.nodes)
    return sum(value.const_value.size for value in weights if value.name in reached and value.const_value is not None)


def _marked(found: list[Neighbourhood], sharing: Sharing) -> list[Neighbourhood]:
    """Neighbourhoods that know with whom they share a student, and which weights they have to leave alone."""
    if not sharing.twins and not sharing.elsewhere:
        return found
    by_name = {n.name: n for n in found}
    own = {n.name: _leaving_alone(n, sharing.elsewhere.get(n.name, {}), by_name) for n in found}
    marked = []
    for n in own.values():
        first, pairs = sharing.twins.get(n.name, (n.name, {}))
        if first == n.name:
            marked.append(n)
        elif (reason := own[first].reason) is not None:
            marked.append(replace(n, reason=reason))
        else:
            names = {one.name or "": other.name or "" for one, other in pairs.items()}
            marked.append(replace(n, first=first, names=names))
    return marked


def _leaving_alone(
    n: Neighbourhood, elsewhere: Mapping[ir.Value, str], by_name: Mapping[str, Neighbourhood]
) -> Neighbourhood:
    """A neighbourhood whose student does not touch the matrices that others read, nor the vectors if it need not.

    A vector whose channels go becomes two, the others' and the student's shorter one.
    """
    if not n.distillable or not elsewhere or n.groups is None or n.exit is None:
        return n
    matrices = [weight for weight in elsewhere if is_matrix(weight)]
    groups = find_groups(n.nodes, n.exit, matrices) if matrices else n.groups
    held = frozenset(w.name or "" for w in elsewhere if is_matrix(w) or w.name not in groups.weights())
    reason = None
    free = any(is_matrix(weight) and weight not in elsewhere for weight in weights_in(n.nodes))
    if matrices and ((n.groups.groups and not groups.groups) or not free):
        other = elsewhere[matrices[0]]
        how = "is kept" if other in by_name and not by_name[other].distillable else "computes something else with it"
        reason = f"shares the weight '{matrices[0].name}' with {other}, which {how}"
    return replace(n, groups=groups, elsewhere=frozenset(w.name or "" for w in elsewhere), held=held, reason=reason)


def _choose_stream(model: ir.Model) -> tuple[Dataflow, Choice]:
    """Try which inputs are the stream and keep the choice whose channel groups touch most weights.

    All inputs together first, then each alone with the others as context; where there are several but not many, also
    fewer and fewer of them as long as that helps: two towers, and a mask that one of them reads.
    """

    def tried(names: Sequence[str]) -> tuple[Dataflow, Choice]:
        flow = Dataflow.of(model.graph, names)
        return flow, Chooser(flow, find_chains(flow)).best()

    def without(names: Sequence[str]) -> list[list[str]]:
        return [[name for name in names if name != other] for other in names]

    def touched(found: tuple[Dataflow, Choice]) -> int:
        return found[1].touched

    names = [value.name or "" for value in real_inputs(model.graph)]
    best = found = tried(names)
    if len(names) > 1:
        best = max([best, *(tried([name]) for name in names)], key=touched)
    while 2 < len(names) <= _FEW_INPUTS:
        fewer = max((tried(rest) for rest in without(names)), key=touched)
        if touched(fewer) <= touched(found):
            break
        found, names = fewer, list(fewer[0].stream_inputs)
        best = max(best, found, key=touched)
    return best


_FEW_INPUTS = 6
"""Of more inputs, not every part is tried."""


def _with_rest(
    flow: Dataflow, runs: list[Run], cuts: frozenset[ir.Value], frozen: frozenset[ir.Value], why: Why
) -> list[Neighbourhood]:
    """Join trailing operators to the runs, and gather all other nodes into kept pieces: `why` says so of weights."""
    found: list[Neighbourhood] = []
    taken: set[ir.Node] = set()
    barriers = cuts | {run.entry for run in runs}
    for run in runs:
        exit_ = _extend(flow, run.exit, barriers)
        nodes, context = region_nodes(flow, run.entry, exit_)
        made = (value for node in nodes for value in node.outputs)
        hit = next((value for value in made if value in frozen), None)
        reason = f"frozen: it makes '{hit.name}'" if hit is not None else None
        groups = find_groups(nodes, exit_) if _brings_weights(flow, run.exit, exit_) else run.groups
        found.append(Neighbourhood("", run.entry, exit_, tuple(context), tuple(nodes), groups, reason))
        # What several read is computed again in each: numbers about shapes, and values of which only the shape is read.
        assert not any(node in taken and any(value in flow.flow for value in node.outputs) for node in nodes)
        taken.update(nodes)
    rest = [n for n in flow.graph if n not in taken and flow.kinds[n.outputs[0]] not in (Kind.METADATA, Kind.CONSTANT)]
    pieces = [_kept(flow, piece, why) for piece in _connected(rest)]
    return sorted(found + pieces, key=lambda n: flow.order[n.nodes[0]])


def _extend(flow: Dataflow, exit_: ir.Value, barriers: frozenset[ir.Value]) -> ir.Value:
    """Move an exit behind the activations and norms that alone read it, up to a value that must be a boundary."""
    while exit_ not in barriers and not exit_.is_graph_output():
        users = [user for user in exit_.consumers() if flow.kinds.get(user.outputs[0]) is not Kind.METADATA]
        if len(users) != 1 or len(exit_.consumers()) != 1 or users[0].op_type not in TRAILING_OPS:
            break
        if is_opaque(users[0]) or users[0] not in flow.order:
            break
        if flow.stream_reads(users[0]) != [exit_] or sum(1 for v in users[0].outputs if v.uses()) > 1:
            break
        exit_ = users[0].outputs[0]
    return exit_


def _brings_weights(flow: Dataflow, before: ir.Value, exit_: ir.Value) -> bool:
    """Whether an operator by which an exit was moved reads weights; an activation leaves the groups as they are."""
    while exit_ is not before:
        node = exit_.producer()
        if node is None or any(map(is_weight, node.inputs)):
            return True
        exit_ = flow.stream_reads(node)[0]
    return False


def _connected(nodes: Iterable[ir.Node]) -> list[list[ir.Node]]:
    """Split nodes into pieces that hang together, each in topological order."""
    piece_of: dict[ir.Node, list[ir.Node]] = {}
    for node in nodes:
        before = [piece_of[p] for value in reads(node) if (p := value.producer()) in piece_of]
        piece = max(before, key=len, default=[])
        for other in {id(other): other for other in before}.values():
            if other is not piece:
                piece += other
                piece_of.update(dict.fromkeys(other, piece))
        piece.append(node)
        piece_of[node] = piece
    return list({id(piece): piece for piece in piece_of.values()}.values())


def _kept(flow: Dataflow, nodes: list[ir.Node], why: Why) -> Neighbourhood:
    nodes = sorted(nodes, key=flow.order.__getitem__)
    own = {value for node in nodes for value in node.outputs}
    inputs = list(dict.fromkeys(v for node in nodes for v in flow.stream_reads(node) if v not in own))
    outputs = [v for v in own if v.is_graph_output() or any(user.outputs[0] not in own for user in v.consumers())]
    outputs.sort(key=lambda value: value.name or "")
    reason = why_kept(nodes, why)
    return Neighbourhood(
        "", inputs[0] if inputs else None, outputs[-1] if outputs else None, (), tuple(nodes), None, reason
    )


def _name(neighbourhoods: list[Neighbourhood]) -> list[Neighbourhood]:
    """Number them in order, so that the same teacher always gets the same names."""
    digits = max(2, len(str(len(neighbourhoods))))
    return [replace(n, name=f"n{i:0{digits}d}") for i, n in enumerate(neighbourhoods, 1)]
