"""A partitioned teacher: its neighbourhoods, and what is asked of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import or_

import onnx_ir as ir

from ndonnx.graph.bound import BoundShapes, bind
from ndonnx.graph.costs import Cost, parameters_of
from ndonnx.graph.dataflow import Dataflow
from ndonnx.graph.interface import NOWHERE, Interface, first_sizes, sample_axis, samples_back
from ndonnx.graph.macs import sample_cost
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.graph.working_copy import working_copy
from ndonnx.partition.channels.group import ChannelGroups, FrozenWidth
from ndonnx.partition.channels.groups import frozen_widths
from ndonnx.partition.sharing import (
    exits_before,
)
from ndonnx.partition.slices import extract, renamed, with_copies


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
    """Weights of the neighbourhood that a student leaves as they are."""

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


def boundary(neighbourhoods: Iterable[Neighbourhood]) -> list[str]:
    """Names of the values at the ends of these neighbourhoods, each once, in order."""
    names: dict[str, None] = {}
    for n in neighbourhoods:
        assert n.entry is not None and n.exit is not None
        names.update(dict.fromkeys(value.name or "" for value in (n.entry, *n.context, n.exit)))
    return list(names)


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
        """Neighbourhoods that can be shrunk."""
        return [n for n in self.neighbourhoods if n.distillable]

    @property
    def trained(self) -> list[Neighbourhood]:
        """Neighbourhoods that have a student of their own: of several with one set of weights the first."""
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
        """Neighbourhoods that can be shrunk, each behind all that it depends on, the places of a student together
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
