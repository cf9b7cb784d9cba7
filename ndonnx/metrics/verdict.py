"""What became of a requirement: a value that had to be reached, and the one that was measured."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ndonnx.distill.tasks.intervals import Interval


@dataclass(frozen=True)
class Verdict:
    """A requirement, what was found, and whether it was kept."""

    requirement: str
    """As it was written, `agreement>=99%`."""
    measure: str
    output: str | None
    """The output that was measured; None: the whole model."""
    sign: str
    required: float
    found: float
    """Inf where the model's answers broke."""
    interval: Interval | None
    """95% confidence interval of `found`; the verdict goes by `found` alone."""
    kept: bool

    def to_json(self) -> dict[str, Any]:
        """As a mapping for JSON, with None for a value that is not finite."""
        return asdict(self) | {"found": self.found if math.isfinite(self.found) else None}
