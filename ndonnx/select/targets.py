"""What a search is asked for: parts of the teacher's costs, and the largest drop in quality."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ndonnx.errors import RecipeError

COSTS = ("params", "macs", "size", "latency")
"""What a target may be set for: weights held, multiply-accumulates and milliseconds a sample, bytes of the file."""

_NUMBER = re.compile(r"\s*(\d+\.?\d*(?:e-?\d+)?|\.\d+(?:e-?\d+)?)\s*(%?)\s*", re.IGNORECASE)


def parse_target(target: str | Iterable[str]) -> dict[str, float]:
    """Read `params=0.5,latency=60%`, in one text or several, as parts of the whole teacher, 0 to 1.

    Raises:
        RecipeError: an entry is not `COST=PART`, its cost is unknown or there twice, or its part is not above 0 and
            at most 1.
    """
    shares: dict[str, float] = {}
    for text in [target] if isinstance(target, str) else target:
        for entry in text.split(","):
            cost, equals, part = (piece.strip() for piece in entry.partition("="))
            share = _part(part)
            if not equals or cost not in COSTS or share is None or not 0 < share <= 1:
                raise RecipeError(
                    f"target '{entry.strip()}': expected COST=PART of the teacher's, as params=0.5 or latency=60%; "
                    f"COST is one of {', '.join(COSTS)}, PART above 0 and at most 1"
                )
            if cost in shares:
                raise RecipeError(
                    f"target '{entry.strip()}': {cost} has the target {shares[cost]:g} already; name it once"
                )
            shares[cost] = share
    return shares


def parse_drop(drop: str | float) -> float:
    """Read `1%` or `0.01` as the largest drop in quality, 0 to below 1 (0.01 is one point of accuracy).

    Raises:
        RecipeError: it is neither, or not from 0 to below 1.
    """
    value = _part(str(drop))
    if value is None or not 0 <= value < 1:
        raise RecipeError(f"max-drop '{drop}': expected a part from 0 to below 1, as 0.01, or a percentage, as 1%")
    return value


def _part(text: str) -> float | None:
    """`0.5` or `50%` as 0.5; None where it is neither."""
    if found := _NUMBER.fullmatch(text):
        return float(found[1]) / (100 if found[2] else 1)
    return None
