"""Sizes of axes as numbers, names, and products of the two; `None` stands for a size that is not known."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable

Size = int | str
"""A number, or the name of a dynamic size, or a product written as `64*batch`."""

_PRODUCT = re.compile(r"[\w.]+(\*[\w.]+)*")
_MADE_UP = re.compile(r"unk__\d+")


def is_made_up(name: str) -> bool:
    """Whether a name is one that ONNX's inference gives to a size that it does not know."""
    return _MADE_UP.fullmatch(name) is not None


def factors(size: Size) -> tuple[int, Counter[str]]:
    """A size as a number times names; what is no plain product (`a + 1`) is one name."""
    if isinstance(size, int):
        return size, Counter()
    if not _PRODUCT.fullmatch(size):
        return 1, Counter([size])
    parts = size.split("*")
    return math.prod(int(part) for part in parts if part.isdecimal()), Counter(p for p in parts if not p.isdecimal())


def product(sizes: Iterable[Size | None]) -> Size | None:
    """How many elements axes of these sizes hold together; None where one of them is unknown."""
    number, names = 1, Counter[str]()
    for size in sizes:
        if size is None:
            return None
        times, more = factors(size)
        number, names = number * times, names + more
    return _written(number, names)


def quotient(whole: Size | None, part: Size | None) -> Size | None:
    """The whole divided by the part; None where that is no size for sure."""
    if whole is None or part is None:
        return None
    (number, names), (divisor, taken) = factors(whole), factors(part)
    if divisor == 0 or number % divisor or taken - names:
        return None
    return _written(number // divisor, names - taken)


def add(a: Size | None, b: Size | None) -> Size | None:
    """Sum of two sizes."""
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    return b if a == 0 else a if b == 0 else None


def subtract(a: Size | None, b: Size | None) -> Size | None:
    """Difference of two sizes."""
    if isinstance(a, int) and isinstance(b, int):
        return a - b
    return a if b == 0 else 0 if a is not None and a == b else None


def divide(a: Size | None, b: Size | None) -> Size | None:
    """Quotient of two sizes without its fraction; none of negative numbers, which languages round differently."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if a >= 0 and b > 0 else None
    return quotient(a, b)


def remainder(a: Size | None, b: Size | None) -> Size | None:
    """Rest of a division of two sizes."""
    if isinstance(a, int) and isinstance(b, int):
        return a % b if a >= 0 and b > 0 else None
    return 0 if quotient(a, b) is not None else None


def equal(a: Size | None, b: Size | None) -> bool | None:
    """Whether two sizes are the same; None where that is open."""
    if a is None or b is None:
        return None
    if a == b:
        return True
    if isinstance(a, int) and isinstance(b, int):
        return False
    # A dynamic size is not negative.
    return False if any(isinstance(size, int) and size < 0 for size in (a, b)) else None


def broadcast(a: Size | None, b: Size | None) -> Size | None:
    """Size of an axis at which two operands meet."""
    if b in (a, 1):
        return a
    if a == 1:
        return b
    # A dynamic size beside a number above one is either that number or one.
    return next((size for size in (a, b) if isinstance(size, int) and size > 1), None)


def _written(number: int, names: Counter[str]) -> Size | None:
    if not names or number == 0:
        return number
    parts = sorted(names.elements())
    if len(parts) == 1 and number == 1:
        return parts[0]
    if not all(_PRODUCT.fullmatch(part) for part in parts):
        return None
    return "*".join([str(number), *parts] if number != 1 else parts)
