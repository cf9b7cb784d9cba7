"""The trade-off curve: choices of which none is both cheaper and better than another."""

from __future__ import annotations

import math
from itertools import pairwise

from ndonnx.select.milp import solve
from ndonnx.select.table import Choice, Table


def pareto(table: Table, cost: str, count: int, least: float | None = None, most: float | None = None) -> list[Choice]:
    """The best choices for evenly spread bounds on a cost, from cheap to dear.

    None of them costs and loses no less than another, and the teacher is none of them. Where several bounds have the
    same answer, the widest gaps between answers are searched for more, until there are `count` or no more.

    Args:
        table: what there is to choose from.
        cost: the cost to trade quality for.
        count: how many are wanted.
        least: the lowest bound, absolute. None, or what cannot be reached: the least that any choice costs.
        most: the highest. None: a step below the teacher's cost.

    Raises:
        SearchError: `most` cannot be reached.
    """
    whole = table.teacher.totals[cost]
    low = max(table.least(cost), least if least is not None else -math.inf)
    high = most if most is not None else whole - (whole - low) / (count + 1)
    bounds = [low + (high - low) * i / max(count - 1, 1) for i in range(count)] if count > 1 else [high]
    # The teacher is the upper end of a curve that is not bounded above.
    found = [table.teacher] if most is None else []
    for bound in bounds:
        _add(found, solve(table, bounds={cost: bound}), cost)
    _fill(table, cost, count, found)
    return [choice for choice in found if choice.totals[cost] < whole]


def _add(found: list[Choice], choice: Choice, cost: str) -> bool:
    """Put a choice at its place on the curve, unless one there is as good; whether it was put there."""
    if any(other.totals[cost] <= choice.totals[cost] and other.drop <= choice.drop for other in found):
        return False
    found[:] = [other for other in found if other.totals[cost] < choice.totals[cost] or other.drop < choice.drop]
    found.append(choice)
    found.sort(key=lambda each: each.totals[cost])
    return True


def _fill(table: Table, cost: str, count: int, found: list[Choice]) -> None:
    """Look into the widest gap between two choices for a third, again and again."""
    empty: set[tuple[float, float]] = set()
    whole = table.teacher.totals[cost]
    while sum(choice.totals[cost] < whole for choice in found) < count:
        places = [choice.totals[cost] for choice in found]
        gaps = [gap for gap in pairwise(places) if gap not in empty]
        if not gaps:
            return
        left, right = max(gaps, key=lambda gap: gap[1] - gap[0])
        # Where the middle has none but the left one, the best that is cheaper than the right one may still be another.
        for bound in ((left + right) / 2, math.nextafter(right, left)):
            if _add(found, solve(table, bounds={cost: bound}), cost):
                break
        else:
            empty.add((left, right))
