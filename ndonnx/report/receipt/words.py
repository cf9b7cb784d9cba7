"""Numbers and reasons as people read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ndonnx.report.receipt.document import number
from ndonnx.runtime import units

LEFT_OPEN = "left open"
"""How a setting is told that the user left to the run."""


def count_text(value: Any) -> str:
    """`156,210`, and from ten million on `11.7 M`; empty where there is no number."""
    return _told(value, units.count_text)


def bytes_text(value: Any) -> str:
    """`626.4 kB`; empty where there is no number."""
    return _told(value, units.bytes_text)


def seconds_text(value: Any) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`, `2 h 10 min`; empty where there is no number."""
    return _told(value, units.seconds_text)


def _told(value: Any, text: Callable[[float], str]) -> str:
    found = number(value)
    return "" if found is None else text(found)


def digits_text(value: Any, digits: int = 3) -> str:
    """So many digits that count; empty where there is no number."""
    found = number(value)
    return "" if found is None else f"{found:.{digits}g}"


def part_text(value: Any) -> str:
    """A part of one, as `99.6%`; empty where there is no number."""
    return _told(value, units.part_text)


def share_text(part: Any, whole: Any) -> str:
    """One number as a part of another one, `0.51`; empty where there is none."""
    one, all_ = number(part), number(whole)
    return "" if one is None or not all_ else f"{one / all_:.2f}"


def range_text(low: str, high: str) -> str:
    """`98.6% to 99.9%`; empty where an end is."""
    return f"{low} to {high}" if low and high else ""


_PLAIN = (
    (
        "no width to shrink inside: its channels reach",
        "All of its channels are seen from outside, as in a stem or a head.",
    ),
    ("no width to shrink inside", "Channels cannot be followed through an operator inside, so none can be taken out."),
    ("holds no weights", "It only pools, reshapes or rearranges; there is nothing to make smaller."),
    ("frozen:", "The user asked to leave it as it is."),
    ("shares the weight", "Another part of the model reads the same weights in another way."),
    ("with its student", "Its student would have stood beside the teacher's weights, and made the file larger."),
    ("does not convert to torch", "It holds an operator that cannot be trained here."),
    ("the converted slice differs", "Its copy for training did not answer exactly enough as the original."),
    ("the loss became", "Its training diverged."),
    ("the worker process died", "The machine gave up on its training."),
    ("out of memory", "The machine gave up on its training."),
    ("nothing to distil", "It holds trees or the like, without channels."),
    ("the search keeps", "The search found more to gain elsewhere."),
)
"""Beginnings of reasons, each with what it means to somebody who does not know the method."""


def plain_reason(reason: str) -> str:
    """What a reason for keeping a neighbourhood means in plain words; empty where it says so itself."""
    return next((words for start, words in _PLAIN if reason.startswith(start)), "")
