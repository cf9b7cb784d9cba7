"""Numbers as people read them: counts, bytes, seconds, parts."""

from __future__ import annotations


def count_text(value: float) -> str:
    """`156,210`, and from ten million on `11.7 M`."""
    for unit, scale in (("G", 1e9), ("M", 1e6)):
        if value >= 10 * scale:
            return f"{value / scale:,.1f} {unit}"
    return f"{value:,.0f}"


def bytes_text(value: float) -> str:
    """`626.4 kB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:,.1f} {unit}"
    return f"{value:,.0f} B"


def seconds_text(value: float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`, `2 h 10 min`."""
    if value < 10:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def part_text(value: float) -> str:
    """A part of one, as `99.6%`."""
    return f"{value:.1%}"
