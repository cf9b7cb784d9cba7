"""Wall time by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Wall time by stage, in seconds; a stage entered twice adds up."""

    _spent: dict[str, float] = field(default_factory=dict)
    _began: float = field(default_factory=time.perf_counter)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time inside the `with` block to a stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent[stage] = self._spent.get(stage, 0.0) + time.perf_counter() - began

    def seconds(self) -> dict[str, float]:
        """The stages so far, and the total until now."""
        total = time.perf_counter() - self._began
        return {name: round(spent, 3) for name, spent in self._spent.items()} | {"total": round(total, 3)}
