"""What an `Einsum` multiplies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

_REST = "."
"""Stands for the axes of an ellipsis, which follow it by number from the last one."""


def contractions(equation: str, shapes: Sequence[Sequence[int]]) -> int:
    """Multiply-accumulates of an einsum, its operands taken together one after the other, as onnxruntime does.

    A product that sums over nothing counts 0, as `Mul` does.

    Raises:
        ValueError: the equation does not fit the shapes.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = [_indices(term, len(shape)) for term, shape in zip(left.split(","), shapes, strict=True)]
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for index, size in zip(term, shape, strict=True):
            sizes[index] = max(size, sizes.get(index, 1))
    kept = set(_output(right, terms) if arrow else _implicit(terms))
    total, at_hand = 0, set(terms[0])
    for position, term in enumerate(terms[1:], start=1):
        needed = kept.union(*terms[position + 1 :])
        together = at_hand | set(term)
        at_hand = together & needed
        if at_hand != together:
            total += math.prod(sizes[index] for index in together)
    return total


def _indices(term: str, rank: int) -> list[str]:
    """An index for each axis; those of an ellipsis are counted from the last one, so that broadcasting aligns them."""
    before, dots, behind = term.partition("...")
    free = rank - len(before) - len(behind)
    if free < 0 or (free and not dots):
        raise ValueError(f"einsum: '{term}' does not fit {rank} axes")
    return [*before, *(f"{_REST}{place}" for place in range(free, 0, -1)), *behind]


def _output(right: str, terms: Sequence[Sequence[str]]) -> list[str]:
    rest = [index for term in terms for index in term if index.startswith(_REST)]
    return [*right.replace(_REST, ""), *(rest if _REST in right else ())]


def _implicit(terms: Sequence[Sequence[str]]) -> list[str]:
    """Without an arrow the output has the indices that occur once, and those of an ellipsis."""
    counted = Counter(index for term in terms for index in term)
    return [index for index, count in counted.items() if count == 1 or index.startswith(_REST)]
