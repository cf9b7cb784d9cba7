"""Which runs of atoms become neighbourhoods: a dynamic programme along every chain.

A run counts the weights of those of its atoms that a channel group reaches, so a stem that
gains nothing by joining a unit stays outside. An atom may instead be entered, and the chains
nested in it partitioned. Weights that are covered count for a choice, large pieces a little
against it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from ndonnx.graph.costs import parameters_of
from ndonnx.graph.dataflow import Dataflow
from ndonnx.partition.channels.rules.linear import RULES as LINEAR
from ndonnx.partition.channels.rules.movement import RULES as MOVEMENT
from ndonnx.partition.channels.rules.pointwise import RULES as POINTWISE
from ndonnx.partition.channels.rules.statistics import RULES as STATISTICS
from ndonnx.partition.regions import Atom, Chain
from ndonnx.partition.runs import LONGEST_RUN, Run, Runs, is_trailing

_PENALTY = 4
"""A run with the part `s` of the model's weights is worth `s - s² / _PENALTY`.

So whatever is covered counts, and of two choices that cover much the same the one in smaller
pieces wins: a U-Net is opened, but an attention does not lose its value projection."""

_TWO_NEIGHBOURHOODS = 4
"""Nodes with weights that two neighbourhoods have at the least: each makes channels and sums over them."""

_LARGE_LEFTOVER = 0.1
"""Part of the model's weights from which a leftover joins what follows it wherever it stands."""

_UNDERSTOOD = {*LINEAR, *MOVEMENT, *POINTWISE, *STATISTICS, "Shape", "Size"}
"""Operators that a leftover may be made of: what no rule knows might keep the whole neighbourhood from training."""


@dataclass(frozen=True, eq=False, slots=True)
class Choice:
    """What a stretch of a chain is worth, and the runs in it (as a tree, so that adding copies nothing)."""

    value: int = 0
    number: int = 0
    nodes: int = 0
    touched: int = 0
    """Elements of the weights that have an axis in a channel group."""
    parts: tuple[Choice | Run, ...] = ()

    def __add__(self, other: Choice) -> Choice:
        if not self.parts or not other.parts:
            return self if self.parts else other
        return Choice(
            self.value + other.value,
            self.number + other.number,
            self.nodes + other.nodes,
            self.touched + other.touched,
            (self, other),
        )

    @property
    def rank(self) -> tuple[int, int, int]:
        """Better is: more value, then more runs, then fewer nodes."""
        return self.value, self.number, -self.nodes

    def runs(self) -> list[Run]:
        """The runs in order."""
        found: list[Run] = []
        stack: list[Choice | Run] = [self]
        while stack:
            part = stack.pop()
            if isinstance(part, Run):
                found.append(part)
            else:
                stack.extend(reversed(part.parts))
        return found


@dataclass(frozen=True, eq=False, slots=True)
class _Segment:
    """A step along a chain: a run, or one atom that is entered or left out."""

    start: int
    stop: int
    choice: Choice
    run: Run | None = None


class Chooser:
    """The dynamic programme over the chains of one dataflow.

    Args:
        flow: what the chains were found in.
        chains: the outermost ones.
        cuts: values that must be boundaries.
        frozen: values whose producers are kept, so that no leftover with one of them joins a run.
    """

    def __init__(
        self,
        flow: Dataflow,
        chains: Sequence[Chain],
        cuts: Collection[ir.Value] = (),
        frozen: Collection[ir.Value] = (),
    ) -> None:
        self._chains = chains
        self._runs = Runs(flow, chains, cuts)
        self._frozen = frozenset(frozen)
        self._total = max(1, parameters_of(flow.graph))

    def best(self) -> Choice:
        """The best choice of runs along all chains and inside their atoms."""
        outer_first = list(self._chains)
        outermost = set(outer_first)
        runs: list[list[dict[int, Run]]] = []
        for chain in outer_first:
            runs.append(self._runs.along(chain.atoms))
            for i, atom in enumerate(chain.atoms):
                if i + 1 not in runs[-1][i] or self._runs.inside[atom].weighted >= _TWO_NEIGHBOURHOODS:
                    outer_first.extend(atom.nested)
        choices: dict[Chain, Choice] = {}
        for chain, found in zip(reversed(outer_first), reversed(runs), strict=True):
            choices[chain] = self._along(chain.atoms, found, choices, chain in outermost)
        return _sum(choices[chain] for chain in self._chains)

    def _along(
        self, atoms: list[Atom], runs: list[dict[int, Run]], inner: dict[Chain, Choice], outermost: bool
    ) -> Choice:
        best = [Choice()]
        arriving: list[list[tuple[Choice, _Segment]]] = [[] for _ in range(len(atoms) + 1)]
        came: list[_Segment] = []
        for i, atom in enumerate(atoms):
            entered = _sum(inner[nested] for nested in atom.nested if nested in inner)
            whole = self._worth(runs[i][i + 1]) if i + 1 in runs[i] else None
            if whole is None or (entered.number > 1 and entered.rank > whole.rank):
                arriving[i + 1].insert(0, (best[i] + entered, _Segment(i, i + 1, entered)))
            for stop, run in runs[i].items():
                choice = self._worth(run)
                arriving[stop].append((best[i] + choice, _Segment(i, stop, choice, run)))
            total, segment = max(arriving[i + 1], key=lambda found: found[0].rank)
            best.append(total)
            came.append(segment)
            arriving[i + 1].clear()
        return _sum(segment.choice for segment in self._joined(atoms, _path(came), outermost))

    def _worth(self, run: Run) -> Choice:
        return Choice(worth(run.weights, self._total), 1, run.nodes, run.touched, (run,))

    def _joined(self, atoms: list[Atom], segments: list[_Segment], outermost: bool) -> list[_Segment]:
        """Let atoms that were left out join the run behind them.

        Kept between two neighbourhoods they would read what a student makes without being trained
        for it. A stem reads the data, and only joins when it holds much of the model.
        """
        reach = self._runs.reach(atoms)
        joined: list[_Segment] = []
        free = 0  # where the atoms begin that nothing has taken
        for segment in segments:
            if segment.choice.parts:
                between = free > 0 or not outermost
                starts = range(max(free, segment.stop - LONGEST_RUN), segment.start)
                longer = (
                    self._grown(atoms, start, segment, between) for start in starts if reach[start] >= segment.stop
                )
                joined.append(next((found for found in longer if found is not None), segment))
                free = segment.stop
        return joined

    def _grown(self, atoms: list[Atom], start: int, segment: _Segment, between: bool) -> _Segment | None:
        """A segment with the atoms from `start` before it; None where they do not belong into it."""
        leftover = atoms[start : segment.start]
        if segment.run is None or is_trailing(leftover[0]) or not self._runs.inside[leftover[0]].weighted:
            return None
        nodes = self._runs.nodes(leftover)
        if any(node.op_type not in _UNDERSTOOD for node in nodes):
            return None
        if any(value in self._frozen for node in nodes for value in node.outputs):
            return None
        size = self._runs.size(nodes)
        if not between and size < _LARGE_LEFTOVER * self._total:
            return None
        run = self._runs.run(atoms[start : segment.stop])
        if run is None:
            return None
        run = replace(run, weights=segment.run.weights + size)
        return _Segment(start, segment.stop, self._worth(run), run)


def worth(weights: int, total: int) -> int:
    """What it is worth to cover so many of all weights in one piece."""
    return weights * (_PENALTY * total - weights)


def _path(came: list[_Segment]) -> list[_Segment]:
    """The segments of the best way, from the step by which each place was reached."""
    back: list[_Segment] = []
    at = len(came)
    while at:
        back.append(came[at - 1])
        at = back[-1].start
    return back[::-1]


def _sum(choices: Iterable[Choice]) -> Choice:
    return sum(choices, Choice())
