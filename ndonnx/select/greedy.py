"""The paper's choice (section 5): in each neighbourhood the smallest candidate that loses little alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ndonnx.errors import SearchError
from ndonnx.select.table import Choice, Table


def greedy(table: Table, x: float, cost: str) -> Choice:
    """In each neighbourhood the cheapest option whose loss alone is at most `x`, which is at least 0.

    Of equally cheap ones that with the lowest loss, then the first.
    """
    chosen = {}
    for name in table.neighbourhoods:
        allowed = [option for option in table.options(name) if option.loss <= x]
        chosen[name] = min(allowed, key=lambda option: (option.costs[cost], option.loss)).candidate
    return table.choose(chosen)


def greedy_to(table: Table, bounds: Mapping[str, float], cost: str | None = None) -> Choice:
    """The greedy choice of the smallest `x` that keeps every bound.

    Args:
        table: what there is to choose from.
        bounds: the most that the whole model may cost, absolute, by cost.
        cost: by which "cheapest" is meant. None: the first that is bounded.

    Raises:
        SearchError: no `x` does.
    """
    cost = cost or next(iter(bounds))
    choice = table.teacher
    for choice in _choices(table, cost):
        if keeps(choice, bounds):
            return choice
    over = next(name for name, bound in bounds.items() if choice.totals[name] > bound)
    raise SearchError(
        f"no threshold of the greedy choice reaches {said(table, bounds)}: with the candidates of least {cost} "
        f"everywhere, {said(table, {over: choice.totals[over]})} are left; allow more, or add smaller candidates"
    )


def greedy_under(table: Table, max_drop: float, cost: str, bounds: Mapping[str, float] | None = None) -> Choice:
    """The cheapest greedy choice whose losses sum to at most `max_drop`, and which keeps every bound if there are any.

    Raises:
        SearchError: none keeps them.
    """
    allowed = [choice for choice in _choices(table, cost) if choice.drop <= max_drop and keeps(choice, bounds or {})]
    if not allowed:
        raise SearchError(
            f"no threshold of the greedy choice reaches {said(table, bounds or {})} with a summed drop of at most "
            f"{max_drop:.4g}; allow a larger drop or more of the cost, or add candidates"
        )
    return min(allowed, key=lambda choice: (choice.totals[cost], choice.drop))


def keeps(choice: Choice, bounds: Mapping[str, float]) -> bool:
    """Whether a choice costs no more than the bounds say, exactly."""
    return all(choice.totals[cost] <= bound for cost, bound in bounds.items())


def said(table: Table, totals: Mapping[str, float]) -> str:
    """Costs of the whole model in words, as parts of the teacher's."""
    whole = table.teacher.totals
    return " and ".join(
        f"{cost} {total / whole[cost]:.1%} of the teacher's" if whole[cost] else f"{cost} {total:.4g}"
        for cost, total in totals.items()
    )


def _choices(table: Table, cost: str) -> Iterator[Choice]:
    """Every choice that some threshold makes, from the strictest to the laxest."""
    return (greedy(table, x, cost) for x in sorted({0.0, *(option.loss for option in table)}))
