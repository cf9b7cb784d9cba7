"""One line of a table of overheads: a median, its floor, and whether it is what was asked for."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

FIXED = "fixed"


AT_MOST = {"distil": 1.15, FIXED: 1.0}


AT_LEAST = {"capture": 0.85, "workers": 1.6}


@dataclass(frozen=True)
class Measured:
    """One line of the table: medians of the seconds, and of the paired ratios."""

    measurement: str
    part: str
    """A slice's name; `all` where there are no parts, or for their sum."""
    sdk_seconds: float
    floor_seconds: float
    ratio: float
    ratios: tuple[float, ...]
    """Of every repetition."""
    target: str

    @property
    def met(self) -> bool:
        """Whether the ratio is what was asked for."""
        if self.measurement in AT_MOST:
            return self.ratio <= AT_MOST[self.measurement]
        return self.ratio >= AT_LEAST[self.measurement]

    def row(self) -> tuple[str, ...]:
        """As the table prints it."""
        name = f"{self.measurement} {self.part}" if self.part != "all" else self.measurement
        met = "yes" if self.met else "no"
        return name, f"{self.sdk_seconds:.2f}", f"{self.floor_seconds:.2f}", f"{self.ratio:.3f}", self.target, met


def measured_line(
    measurement: str, part: str, pairs: Sequence[tuple[float, float]], ratios: Sequence[float]
) -> Measured:
    sdk, floor = (statistics.median(side) for side in zip(*pairs, strict=True))
    limit = f"<= {AT_MOST[measurement]}" if measurement in AT_MOST else f">= {AT_LEAST[measurement]}"
    return Measured(measurement, part, sdk, floor, statistics.median(ratios), tuple(ratios), limit)
