"""Quality over time, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Point:
    """A model on a curve: how it was made, in how many seconds, how good it is."""

    method: str
    budget: str
    seconds: float
    steps: int
    accuracy: float | None
    agreement: float

    @property
    def quality(self) -> float:
        """Accuracy, or agreement where there are no labels."""
        return self.agreement if self.accuracy is None else self.accuracy


def plot(path: Path, points: Sequence[Point], teacher: float) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - needed for --out only
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for method, budget in dict.fromkeys((p.method, "" if p.method == "ND" else p.budget) for p in points):
        own = [p for p in points if p.method == method and budget in {"", p.budget}]
        label = f"{method} {budget}".strip()
        axes.plot([p.seconds for p in own], [100 * p.quality for p in own], marker="o", markersize=3, label=label)
    axes.axhline(100 * teacher, linestyle="--", color="grey", label="teacher")
    axes.set_xscale("log")
    axes.set_xlabel("wall time in seconds")
    axes.set_ylabel("accuracy in %" if points[0].accuracy is not None else "agreement with the teacher in %")
    axes.grid(True, alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
