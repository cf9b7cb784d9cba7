"""The table of a search: what each candidate costs and loses, alone in its neighbourhood's place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

TEACHER = "teacher"
"""The candidate that leaves a neighbourhood as the teacher has it; every neighbourhood has it."""
INT8 = "int8"
"""The teacher's own slice in 8 bits; behind a `+` any other candidate in 8 bits."""
BITS = {INT8: 8}
"""Bits of the numbers that the last word of a candidate asks for."""
_BELIEVED = (0.2, 5.0)
"""Factors between what slices in 8 bits save alone and together that are believed; beyond, all save the same part."""


def bits_of(candidate: str) -> int:
    """Bits of the numbers in what a candidate's name stands for."""
    return BITS.get(candidate.rpartition("+")[2].strip(), 32)


def in_float(candidate: str) -> str:
    """The name of what a candidate is in float: `width 0.5` for `width 0.5 + int8`, `teacher` for `int8`."""
    return candidate if bits_of(candidate) == 32 else candidate.rpartition("+")[0].strip() or TEACHER


@dataclass(frozen=True)
class Option:
    """One candidate in one neighbourhood.

    `costs` are those of the slice, by name (`params`, `macs`, `size`, `latency`), in any unit that is the same for all.
    `drop` is the loss in quality of the whole when this neighbourhood alone is replaced (section 5 of the paper), as it
    was measured: by noise it may be below 0. `rounding` is the part of it that comes of fewer bits.
    """

    neighbourhood: str
    candidate: str
    costs: Mapping[str, float] = field(hash=False)
    drop: float
    rounding: float = 0.0

    @property
    def loss(self) -> float:
        """The drop that a search reckons with, at least 0: alone, a student beats its teacher by luck only."""
        return max(self.drop, 0.0)


@dataclass(frozen=True)
class Choice:
    """A candidate for every neighbourhood, with the costs of the whole model and the sum of the losses."""

    candidates: Mapping[str, str] = field(hash=False)
    totals: Mapping[str, float] = field(hash=False)
    drop: float
    """Sum of the neighbourhoods' losses (clipped drops); an estimate, since drops are not additive."""


class Table:
    """All options of all neighbourhoods, in order; the teacher's comes first in each.

    Args:
        options: among them the teacher's for each neighbourhood, with drop 0. All name the same costs.
        fixed: what the rest of the model costs, 0 where it is not named. It may be below 0: slices timed one by one may
            take longer than the whole.
        aliases: other names of options, as `{("n02", "width 0.8"): "width 0.7"}`; one of an option that is not there
            is no name.

    Raises:
        ValueError: a neighbourhood lacks the teacher's option or has an option twice, costs differ in their names, a
            number is not finite, or a cost is below 0.
    """

    def __init__(
        self,
        options: Iterable[Option],
        fixed: Mapping[str, float] | None = None,
        aliases: Mapping[tuple[str, str], str] | None = None,
    ) -> None:
        self._aliases = dict(aliases or {})
        self._options: dict[str, dict[str, Option]] = {}
        for option in options:
            row = self._options.setdefault(option.neighbourhood, {})
            if option.candidate in row:
                raise ValueError(f"{_called(option)}: is there twice")
            row[option.candidate] = option
        for name, row in self._options.items():
            if TEACHER not in row or row[TEACHER].drop != 0:
                raise ValueError(f"{name}: expected an option '{TEACHER}' with drop 0 among {', '.join(row)}")
            self._options[name] = {TEACHER: row[TEACHER], **row}
        first = next(iter(self), None)
        self.costs = tuple(first.costs if first is not None else fixed or {})
        """Names of the costs."""
        self.fixed = dict.fromkeys(self.costs, 0.0) | dict(fixed or {})
        """What the rest of the model costs."""
        self._check()

    def _check(self) -> None:
        if set(self.fixed) != set(self.costs) or not all(map(math.isfinite, self.fixed.values())):
            raise ValueError(f"fixed costs: expected finite numbers for {', '.join(self.costs)}, found {self.fixed}")
        for option in self:
            if set(option.costs) != set(self.costs):
                raise ValueError(f"{_called(option)}: costs {sorted(option.costs)}, expected {sorted(self.costs)}")
            if not all(math.isfinite(cost) and cost >= 0 for cost in option.costs.values()):
                raise ValueError(f"{_called(option)}: costs must be finite and at least 0, found {dict(option.costs)}")
            if not math.isfinite(option.drop):
                raise ValueError(f"{_called(option)}: the drop must be finite, found {option.drop}")

    def __iter__(self) -> Iterator[Option]:
        return (option for row in self._options.values() for option in row.values())

    @property
    def neighbourhoods(self) -> tuple[str, ...]:
        """Names, in order."""
        return tuple(self._options)

    def options(self, neighbourhood: str) -> tuple[Option, ...]:
        """The options of a neighbourhood, the teacher's first."""
        return tuple(self._options[neighbourhood].values())

    def choose(self, candidates: Mapping[str, str]) -> Choice:
        """The choice of these candidates, by any of their names; a neighbourhood that is not named keeps the teacher's.

        Raises:
            KeyError: a neighbourhood, or a candidate of it, is not in the table.
        """
        if strange := [name for name in candidates if name not in self._options]:
            raise KeyError(strange[0])
        chosen = {name: row[self._name(name, candidates.get(name, TEACHER))] for name, row in self._options.items()}
        return Choice(
            candidates={name: option.candidate for name, option in chosen.items()},
            # Rounded once, at the end: whether a bound holds must not depend on the order of a sum.
            totals={
                cost: math.fsum([self.fixed[cost], *(option.costs[cost] for option in chosen.values())])
                for cost in self.costs
            },
            drop=math.fsum(option.loss for option in chosen.values()),
        )

    @property
    def teacher(self) -> Choice:
        """The teacher as a choice."""
        return self.choose({})

    def uniform(self, candidate: str) -> Choice:
        """One candidate wherever it is an option, the teacher's elsewhere: the baseline of the paper's figure 3."""
        return self.choose({name: candidate for name in self._options if self._is_option(name, candidate)})

    def knows(self, candidate: str) -> bool:
        """Whether it is an option, under this or another name, in any neighbourhood."""
        return any(self._is_option(name, candidate) for name in self._options)

    def _is_option(self, neighbourhood: str, candidate: str) -> bool:
        return self._name(neighbourhood, candidate) in self._options[neighbourhood]

    def _name(self, neighbourhood: str, candidate: str) -> str:
        return self._aliases.get((neighbourhood, candidate), candidate)

    def total(self, choice: Choice, cost: str) -> float:
        """What the whole model costs with this choice."""
        return choice.totals[cost]

    def share(self, choice: Choice, cost: str) -> float:
        """A choice's cost as a fraction of the teacher's; 1 where the teacher costs nothing."""
        whole = self.teacher.totals[cost]
        return choice.totals[cost] / whole if whole else 1.0

    def bounds(self, shares: Mapping[str, float]) -> dict[str, float]:
        """Parts of the teacher's costs, as `parse_target` reads them, as absolute bounds.

        Raises:
            KeyError: the table has no such cost.
        """
        whole = self.teacher.totals
        return {cost: share * whole[cost] for cost, share in shares.items()}

    def least(self, cost: str) -> float:
        """The lowest that any choice can cost."""
        cheapest = (min(option.costs[cost] for option in row.values()) for row in self._options.values())
        return math.fsum([self.fixed[cost], *cheapest])

    def corrected(self, cost: str, factor: float) -> Table:
        """A table in which each option saves `factor` times as much of a cost, at most all of it.

        For a cost that does not add up, as latency: `factor` is what a measured whole student saves, divided by what
        was predicted.
        """
        return Table((self._corrected(option, cost, factor) for option in self), self.fixed, self._aliases)

    def rounded(self, factor: float) -> Table:
        """A table in which fewer bits lose `factor` times as much, beside what the students lose in float."""
        options = (
            replace(o, drop=o.drop + (factor - 1) * o.rounding, rounding=factor * o.rounding) if o.rounding else o
            for o in self
        )
        return Table(options, self.fixed, self._aliases)

    def of_bits(self, least: int) -> Table:
        """A table without the options of fewer bits than these."""
        kept = (option for option in self if bits_of(option.candidate) >= least)
        return Table(kept, self.fixed, self._aliases)

    def sped_up(self, part: float) -> Table:
        """A table in which 8 bits save as much latency as they do where all of the teacher is in them.

        Alone, a slice in 8 bits also pays for what it reads and makes in float, which neighbours in 8 bits do not.

        Args:
            part: latency of the teacher in 8 bits, as a part of that in float.
        """
        whole, row = self.teacher.totals["latency"], self._options.items()
        saved = sum(o[TEACHER].costs["latency"] - o[INT8].costs["latency"] for _, o in row if INT8 in o)
        factor = (1 - part) * whole / saved if saved > 0 else math.inf
        if not _BELIEVED[0] <= factor <= _BELIEVED[1]:
            return Table((self._at_part(option, part) for option in self), self.fixed, self._aliases)
        return Table((self._sped_up(option, factor) for option in self), self.fixed, self._aliases)

    def _sped_up(self, option: Option, factor: float) -> Option:
        before = self._in_float(option)
        now = max(0.0, before - factor * (before - option.costs["latency"]))
        return replace(option, costs={**option.costs, "latency": now})

    def _at_part(self, option: Option, part: float) -> Option:
        before = self._in_float(option)
        now = part * before if bits_of(option.candidate) < 32 else before
        return replace(option, costs={**option.costs, "latency": now})

    def _in_float(self, option: Option) -> float:
        """Latency of what an option is in float; its own where that is no option."""
        held = self._options[option.neighbourhood].get(in_float(option.candidate), option)
        return held.costs["latency"]

    def _corrected(self, option: Option, cost: str, factor: float) -> Option:
        before = self._options[option.neighbourhood][TEACHER].costs[cost]
        now = max(0.0, before - factor * (before - option.costs[cost]))
        return replace(option, costs={**option.costs, cost: now})


def undominated(options: Sequence[Option], costs: Iterable[str]) -> list[Option]:
    """The options of one neighbourhood that a search may need, in order.

    Left out is what costs and loses no less than another, counting the named costs only; of equals the first stays.
    """
    counting = tuple(costs)
    measures = [(option.loss, *(option.costs[cost] for cost in counting)) for option in options]
    return [
        option
        for i, (option, mine) in enumerate(zip(options, measures, strict=True))
        if not any(
            all(a <= b for a, b in zip(other, mine, strict=True)) and (other != mine or j < i)
            for j, other in enumerate(measures)
            if j != i
        )
    ]


def _called(option: Option) -> str:
    return f"{option.neighbourhood}, {option.candidate}"
