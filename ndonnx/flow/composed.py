"""Correcting a choice by what it comes to as a whole: predictions add up, composed students do not.

What single candidates lose and save orders them rightly and sizes them wrongly. So a choice is composed and measured:
its bytes, its latency, and its loss in float and in 8 bits. The table is corrected by what was found, and the next
choice is made of the corrected table. The best of all that were measured counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from ndonnx.errors import SearchError
from ndonnx.select import INT8, Choice, Table

_MOST_ROUNDING = 8.0
"""Factor by which one measurement corrects what 8 bits lose, at most, either way."""


@dataclass(frozen=True)
class Composed:
    """A choice as one whole student, as it was searched."""

    loss: float
    """As of the options in the table; inf where it could not be had."""
    loss_in_float: float
    """The same of the student all in float."""
    size: float
    """Bytes of its file."""
    latency: float
    """As a part of the teacher's; 1 where nobody asked."""

    def to_json(self) -> dict[str, float | None]:
        """For a document, which has no Inf: null stands for it."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}

    @classmethod
    def of_json(cls, found: Mapping[str, Any]) -> Self:
        """What `to_json` has written."""
        return cls(**{name: math.inf if value is None else float(value) for name, value in found.items()})


@dataclass(frozen=True)
class Corrections:
    """Chooses for targets, with every choice measured as a whole."""

    shares: Mapping[str, float]
    """Parts of the teacher's costs to reach."""
    measure: Callable[[Choice], Composed]
    attempts: int
    """Corrections after the first choice."""

    def best(
        self,
        table: Table,
        choose: Callable[[Table], Choice],
        nearest: Callable[[Table], Choice],
        rivals: Iterable[Choice] = (),
    ) -> tuple[Choice, Composed]:
        """The choice that is within the targets and loses least, of all that were measured.

        Args:
            table: what there is to choose from.
            choose: a choice from a table that was corrected.
            nearest: the same where the targets cannot be reached.
            rivals: other choices that are measured too, so that the answer is no worse than any of them.

        Raises:
            SearchError: the targets cannot be reached, already by the uncorrected table.
        """
        measured = [(choice, self.measure(choice)) for choice in self._choices(table, choose, nearest)]
        measured += [(choice, self.measure(choice)) for choice in rivals]
        return min(measured, key=lambda pair: self._rank(table, pair[1]))

    def _choices(
        self, table: Table, choose: Callable[[Table], Choice], nearest: Callable[[Table], Choice]
    ) -> Iterable[Choice]:
        before: Choice | None = None
        for _ in range(self.attempts + 1):
            try:
                choice, out_of_reach = choose(table), False
            except SearchError:
                if before is None:
                    raise
                choice, out_of_reach = nearest(table), True
            if before is not None and choice.candidates == before.candidates:
                return
            yield choice
            if out_of_reach:
                return
            before, table = choice, self.corrected(table, choice, self.measure(choice))

    def corrected(self, table: Table, choice: Choice, found: Composed) -> Table:
        """A table by which this choice is predicted as it was measured."""
        if not math.isfinite(found.loss):
            return table
        rounding = self._rounding(table, choice, found)
        for cost, part in self._measured(table, found).items():
            saving = 1 - table.share(choice, cost)
            if saving > 0 and part < 1:
                table = table.corrected(cost, (1 - part) / saving)
        return table.rounded(rounding)

    def _measured(self, table: Table, found: Composed) -> dict[str, float]:
        """Parts of the teacher's costs that were measured, of those with a target."""
        parts = {"size": found.size / (table.teacher.totals["size"] or 1.0), "latency": found.latency}
        return {cost: part for cost, part in parts.items() if cost in self.shares}

    def _rounding(self, table: Table, choice: Choice, found: Composed) -> float:
        """How many times as much 8 bits lose beside what is lost in float, as was predicted."""
        chosen = [
            o for name in table.neighbourhoods for o in table.options(name) if choice.candidates[name] == o.candidate
        ]
        rounding = sum(max(0.0, option.rounding) for option in chosen)
        in_float = sum(max(0.0, option.loss - max(0.0, option.rounding)) for option in chosen)
        if min(rounding, in_float, found.loss_in_float) <= 0:
            return 1.0
        factor = max(0.0, found.loss - found.loss_in_float) / rounding / (found.loss_in_float / in_float)
        return min(_MOST_ROUNDING, max(1 / _MOST_ROUNDING, factor))

    def _rank(self, table: Table, found: Composed) -> tuple[float, float]:
        """Less is better: how far over the targets, then the loss."""
        return max(1.0, self.over(table, found)), found.loss

    def over(self, table: Table, found: Composed) -> float:
        """How many times as much as its target the cost is that is furthest over, as far as it was measured."""
        return max((part / self.shares[cost] for cost, part in self._measured(table, found).items()), default=0.0)


def everywhere_in_bits(table: Table) -> Choice:
    """The teacher in 8 bits wherever that is an option: what a user has without any student."""
    return table.uniform(INT8)
