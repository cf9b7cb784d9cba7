"""Promising a drop: students are chosen by some samples, and tested on others that no choice has seen.

All the freedom that a search has is spent on the samples by which it chooses. The tests come afterwards, in an order
that is fixed before the first of them: the student that is expected to lose least comes first, and the first that fails
ends them. So a false promise needs one test to go wrong, that of the first student in the row that loses too much, and
each test may have the whole error that is allowed: looking several times costs nothing. Where already the first student
fails, a smaller loss is aimed at once more; that is another row of tests, and for it a part of the error was kept back.
See docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

S = TypeVar("S")

ERROR = 0.05
"""Probability of a false promise that all tests of a run have together."""
_NOW = 0.8
"""Part of the error that is left which a row of tests has, where another one may have to follow."""
_ROOM = 0.5
"""Part of the allowed drop under which there is room for a smaller student."""
_CARE = 0.8
"""Part of what would just do that is allowed next. With these two a simulated search with 20,000 samples beside its
training, a third of them to choose by, keeps 99% of its promises and uses most of what is allowed."""
_STEEP = 1.5
"""Power of a correction: a drop grows more slowly than the divergence that causes it."""
_MOST = 4.0
"""Times as much that is allowed next at most."""
_SAFER = 0.5
"""Part of its allowance that the student after a failed test has."""
_TRIES = 6
"""Allowances that are tried for a student that is not among those that failed."""


def first_confidence(attempts: int) -> float:
    """The confidence of a run's first tests, where so many corrections may follow the first student."""
    return 1 - ERROR * (_NOW if attempts else 1.0)


def least_bound(attempts: int, samples: int) -> float:
    """The bound that a run's first tests give of a drop in accuracy or agreement without a single difference."""
    return -math.log(1 - first_confidence(attempts)) / samples


@dataclass
class Promise(Generic[S]):
    """The search for a small student whose drop is under a limit, with 95% confidence.

    Attributes:
        found: every student that was looked at, in order.
    """

    max_drop: float
    """The limit, in the unit of the measure."""
    attempts: int
    """Corrections after the first proposal, a student after a failed test among them."""
    propose: Callable[[float], S]
    """A student for an allowance: the larger, the smaller the student. It sees nothing of the tests."""
    expected: Callable[[S], float]
    """What a test of the student should give as its bound, by the samples that choose. It sees nothing of the tests."""
    bound: Callable[[S, float], float]
    """The test: the upper bound of the student's drop, at this confidence, on samples that nothing else sees."""
    key: Callable[[S], Hashable]
    """What tells students apart."""
    is_last: Callable[[S], bool] = lambda student: False
    """Whether nothing smaller than this student is wanted or to be had."""
    found: list[S] = field(default_factory=list)
    _allowed: dict[Hashable, float] = field(default_factory=dict)
    """The allowance of each, by its key."""

    def keep(self, allowed: float, first: S | None = None) -> list[S]:
        """Students for which the promise holds, from the one that should lose least; none where there is none.

        Args:
            allowed: the first allowance.
            first: a student that is there already and would do, whatever its allowance.
        """
        left, proposals = ERROR, self.attempts + 1
        if first is not None:
            self._add(first, allowed)
        if first is None or self.expected(first) > self.max_drop:
            proposals -= self._choose(allowed, proposals)
        row = sorted(self.found, key=self.expected)
        while row:
            error = left * (_NOW if proposals else 1.0)
            passed = self._tested(row, 1 - error)
            if passed:
                return passed
            left -= error
            row = [safer] if proposals and (safer := self._safer()) is not None else []
            proposals -= 1
        return []

    @property
    def nearest(self) -> S:
        """The student that should lose least."""
        return min(self.found, key=self.expected)

    def _choose(self, allowed: float, most: int) -> int:
        """Propose students until one should just do, at most so many; how many there were."""
        low, high = 0.0, math.inf
        for number in range(1, most + 1):
            student = self.propose(allowed)
            self._add(student, allowed)
            expected = self.expected(student)
            if expected <= self.max_drop:
                if expected >= _ROOM * self.max_drop or self.is_last(student):
                    return number
                low = max(low, allowed)
                more = allowed * min(_MOST, self._ratio(expected) ** _STEEP * _CARE)
                allowed = math.sqrt(low * high) if more >= high else max(more, 1.1 * allowed)
            else:
                high = min(high, allowed)
                less = allowed * min(_CARE, self._ratio(expected) ** _STEEP * _CARE)
                allowed = math.sqrt(low * high) if less <= low else less
        return most

    def _ratio(self, expected: float) -> float:
        return min(_MOST, self.max_drop / expected) if expected > 0 else _MOST

    def _tested(self, row: list[S], confidence: float) -> list[S]:
        """The students of a row before the first whose test fails."""
        passed = []
        for student in row:
            if self.bound(student, confidence) > self.max_drop:
                break
            passed.append(student)
        return passed

    def _safer(self) -> S | None:
        """A student that should lose less than all that were found; None where there is none."""
        allowed = self._allowed[self.key(self.nearest)]
        for _ in range(_TRIES):
            allowed *= _SAFER
            student = self.propose(allowed)
            if self._add(student, allowed):
                return student
        return None

    def _add(self, student: S, allowed: float) -> bool:
        """Keep a student; whether it is a new one."""
        key = self.key(student)
        if key in self._allowed:
            return False
        self.found.append(student)
        self._allowed[key] = allowed
        return True
