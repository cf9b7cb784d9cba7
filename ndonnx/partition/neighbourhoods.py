"""The teacher as neighbourhoods: chosen runs with what joins them, and all the rest in kept pieces.

`regions.py` finds what can be cut out, `runs.py` what has a width to shrink inside, `choice.py` what is
worth taking.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from ndonnx.errors import UsageError
from ndonnx.graph.costs import is_weight, parameters_of
from ndonnx.graph.dataflow import Dataflow, Kind, reads, real_inputs
from ndonnx.graph.interface import Interface
from ndonnx.partition.channels.groups import find_groups
from ndonnx.partition.choice import Choice, Chooser, worth
from ndonnx.partition.layers import (
    LINEAR_OPERATORS,
    layer_runs,
    leftover_runs,
    why_left_out,
    why_left_over,
)
from ndonnx.partition.parts import Neighbourhood, Partition
from ndonnx.partition.reasons import Why, no_width, why_kept
from ndonnx.partition.regions import around, find_chains
from ndonnx.partition.runs import TRAILING_OPS, Run, Runs
from ndonnx.partition.sharing import (
    Sharing,
    aligning_cuts,
    find_sharing,
    is_matrix,
    unlike_sharers,
    weights_in,
)
from ndonnx.partition.slices import is_opaque, region_nodes
from ndonnx.runtime.gc_pause import gc_paused


@gc_paused()
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
