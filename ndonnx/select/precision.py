"""Which pieces of a quantised model go back to float: quality against cost, each move measured on the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

CLEAR = 0.05
"""Part by which one choice must be better than another to be preferred: timings differ by as much by themselves."""


@dataclass(frozen=True)
class Measured:
    """A whole student: how good it is, and what it costs."""

    loss: float
    """How far its answers are from the teacher's; less is better."""
    time: float
    """Its latency as a part of the float student's."""
    size: float
    """Its bytes, in the same way."""

    @property
    def cost(self) -> float:
        """Time and size together: who asks for 8 bits asks for both."""
        return (self.time + self.size) / 2


@dataclass(frozen=True)
class Merit:
    """One figure for quality and cost, less is better: the loss, and what is reckoned beside it, times the cost.

    So a move is worth it that lowers the loss by a larger part than it raises the cost. Beside the loss by quantisation
    stands a loss that is there anyhow: that of the float student. Where this is less, as of the teacher itself, it is
    as much as makes the float student as good as the cheapest one: those in between have to be better than both.
    """

    beside: float
    before: float
    """Loss of the float student."""

    @classmethod
    def between(cls, float_loss: float, cheapest: Measured) -> Merit:
        """For students between the cheapest one and the one in float."""
        more, cost = max(0.0, cheapest.loss - float_loss), cheapest.cost
        even = more * (cost / (1 - cost) if cost < 1 else 1.0)
        return cls(max(float_loss, even), float_loss)

    def of(self, found: Measured) -> float:
        """The figure of a student."""
        return found.cost * (self.beside + max(0.0, found.loss - self.before))

    def is_better(self, one: Measured, other: Measured) -> bool:
        """Whether one student is clearly better than another one."""
        if not (math.isfinite(one.loss) and math.isfinite(other.loss)):
            return math.isfinite(one.loss)
        return self.of(one) < (1 - CLEAR) * self.of(other)


@dataclass(frozen=True)
class Move:
    """A piece that was tried in float."""

    piece: int
    found: Measured
    taken: bool


@dataclass(frozen=True)
class GivenBack:
    """Pieces that go back to float."""

    pieces: tuple[int, ...]
    found: Measured
    moves: tuple[Move, ...] = field(default_factory=tuple)


_MOST_REFUSED = 3
"""Moves in a row that were not worth it, after which no more are tried: those that follow promise less."""


def give_back(
    order: Sequence[int],
    whole: Measured,
    merit: Merit,
    measure: Callable[[tuple[int, ...], tuple[int, ...]], tuple[Measured, Measured] | None],
) -> GivenBack:
    """Give pieces back to float, one after the other, as long as that is worth it.

    Args:
        order: numbers of the pieces, those first that promise most.
        whole: all of them quantised.
        merit: by which moves are compared.
        measure: measures the student with the first pieces in float beside the one with the second, both timed in turn;
            None ends the choice, as when time is up.
    """
    taken: tuple[int, ...] = ()
    best, moves, refused = whole, list[Move](), 0
    for piece in order:
        pair = measure((*taken, piece), taken)
        if pair is None:
            break
        found, before = pair
        better = merit.is_better(found, before)
        moves.append(Move(piece, found, better))
        taken, best, refused = ((*taken, piece), found, 0) if better else (taken, before, refused + 1)
        if refused == _MOST_REFUSED:
            break
    return GivenBack(taken, best, tuple(moves))
