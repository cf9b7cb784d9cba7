"""What the measurements of a search share: work that is kept, quality on --eval, and the costs of uniform students."""

from __future__ import annotations

import argparse
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

import ndonnx
from benchmarks.common import Notes, Stopwatch, Subject
from ndonnx.config.recipe import Recipe
from ndonnx.errors import UsageError
from ndonnx.graph import slice_cost
from ndonnx.metrics.evaluation import Evaluation
from ndonnx.partition import Neighbourhood, Partition
from ndonnx.partition.removable import kept_width
from ndonnx.runtime.fingerprints import fingerprint, fingerprint_file
from ndonnx.runtime.run_directory import RunDir
from ndonnx.students.cutting import shrink

MULTIPLIERS = [number / 1000 for number in range(1, 1000)]
"""From which the uniform one is taken."""
_NOISE = 1e-9
"""Rounding of a share."""

Row: TypeAlias = dict[str, Any]


@dataclass
class Bench:
    """A subject, the folder where its measurements are kept, and what was asked for."""

    subject: Subject
    run: RunDir
    options: argparse.Namespace

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.run.path

    def once(self, kind: str, recipe: Recipe, measure: Callable[[], Row]) -> Row:
        """A measurement, or what it was found to be before.

        Args:
            kind: what is measured.
            recipe: all that it depends on besides the model and the data.
            measure: returns what JSON knows.

        Returns:
            What was measured; `continued` tells whether it had been begun and was interrupted.
        """
        entry = self.run.entry(kind, fingerprint(self._given, recipe.model_dump(mode="json")))
        if not entry.done:
            continued = entry.path.is_dir()
            entry.begin()
            entry.commit(measure() | {"continued": continued})
        return entry.meta()

    def compress(self, recipe: Recipe, run: Path, output: Path) -> Row:
        """A search by its public verb: what it reached, what it says of that, how long it took."""
        output.parent.mkdir(parents=True, exist_ok=True)
        before, clock = trained_in(run), Stopwatch()
        subject = self.subject
        result = ndonnx.compress(
            subject.model, data=subject.data, recipe=recipe, output=output, run_dir=run, progress=Notes()
        )
        seconds, target = clock.seconds, result.report.target
        assert target is not None
        return {
            "shares": target.reached,
            "missed": target.missed,
            "measure": target.quality,
            "held_out": target.samples,
            "drop": target.drop if math.isfinite(target.drop) else None,
            "bound": target.bound if math.isfinite(target.bound) else None,
            "seconds": seconds,
            "there": before,
            "trained": trained_in(run) - before,
        }

    def evaluate(self, student: Path) -> Evaluation:
        """A student on --eval, beside the teacher."""
        subject = self.subject
        assert subject.judge is not None
        return ndonnx.evaluate(student, subject.judge, teacher=subject.model, recipe=subject.recipe)

    @cached_property
    def teacher(self) -> Evaluation:
        """The teacher on --eval."""
        return self.evaluate(self.subject.model)

    def quality(self, student: Path) -> float:
        """Accuracy on --eval, or agreement with the teacher where there are no labels."""
        return quality_in(self.measure, self.evaluate(student))

    @property
    def measure(self) -> str:
        """What quality is, by what --eval holds."""
        return "agreement" if self.teacher.accuracy is None else "accuracy"

    @cached_property
    def _given(self) -> list[str]:
        subject = self.subject
        specs = [spec for spec in (subject.data, subject.judge) if spec is not None]
        sources = [subject.open(spec).fingerprint() for spec in specs]
        return [version("ndonnx-compress"), fingerprint_file(subject.model), *sources]


def trained_in(run: Path) -> int:
    """Students in a run directory."""
    return sum(1 for _ in run.glob("students/*/done.json"))


def quality_in(measure: str, found: Evaluation) -> float:
    """Accuracy, agreement, or what is left of 1 by the NMSE.

    Raises:
        UsageError: --eval does not tell.
    """
    value = {"accuracy": found.accuracy, "agreement": found.agreement, "nmse": found.nmse}[measure]
    if value is None:
        why = "has no labels" if measure == "accuracy" else "gets no class scores from the model"
        raise UsageError(f"--eval {why}: {measure} cannot be judged by it; give data as those of --data")
    return 1 - value if measure == "nmse" else value


class UniformCosts:
    """What students with one multiplier cost, by cutting the teacher's weights; nothing is trained."""

    def __init__(self, parts: Partition, cost: str) -> None:
        whole = parts.whole
        self._parts = parts
        self._attribute = "parameters" if cost == "params" else "macs"
        self._whole = getattr(whole, self._attribute)
        self._saved: dict[tuple[str, tuple[int, ...]], int] = {}

    def share(self, keep: float, round_to: int | None) -> float:
        """Part of the teacher's cost."""
        return 1 - sum(self._saving(n, keep, round_to) for n in self._parts.distillable) / (self._whole or 1)

    def largest(self, budget: float, round_to: int | None) -> float | None:
        """The largest multiplier whose student costs at most so much; None where the smallest costs more."""
        fitting = bisect_right(MULTIPLIERS, budget + _NOISE, key=lambda keep: self.share(keep, round_to))
        return MULTIPLIERS[fitting - 1] if fitting else None

    def _saving(self, n: Neighbourhood, keep: float, round_to: int | None) -> int:
        assert n.groups is not None
        groups = n.groups.groups
        widths = tuple(kept_width(group.width, keep, round_to) for group in groups)
        key = n.name, widths
        if key not in self._saved:
            kept = np.zeros(n.groups.units, dtype=bool)
            for group, width in zip(groups, widths, strict=True):
                kept[group.start : group.start + width] = True
            shrunk = slice_cost(shrink(self._parts.slice_of(n), n.groups, kept))
            self._saved[key] = getattr(self._parts.cost(n), self._attribute) - getattr(shrunk, self._attribute)
        return self._saved[key]


def training_text(found: Mapping[str, Any]) -> str:
    """What a search trained, and its seconds."""
    there = f" ({found['there']} were there)" if found["there"] and found["trained"] else ""
    trains = f"trains {found['trained']} students{there}" if found["trained"] else "trains nothing"
    return f"{trains}, {seconds_text(found)} s"


def seconds_text(found: Mapping[str, Any]) -> str:
    """Seconds, as a lower bound where some went by before an interruption."""
    return f"{'> ' if found['continued'] else ''}{found['seconds']:.1f}"
