"""How much is kept where a time budget is given and nothing says how much: as much as still makes the student fast.

No weight is trained for it: how long a model takes follows from its sizes. Where the student is to be in 8 bits, it is
timed in 8 bits, and may be the whole teacher. What was decided stays in the run directory, as what is timed may come
out otherwise the next time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from ndonnx.assemble.quantise import Mode, Scheme, prepared, quantised
from ndonnx.assemble.quantise_ranges import measure_ranges
from ndonnx.assemble.splice import splice
from ndonnx.config.recipe import Recipe
from ndonnx.data import DataSource
from ndonnx.flow.run import Teacher, files_key
from ndonnx.metrics.check import any_units
from ndonnx.metrics.latency import time_beside
from ndonnx.partition import Neighbourhood, Partition
from ndonnx.partition.removable import step_of_integers
from ndonnx.runtime.faults import Fault, tried
from ndonnx.runtime.fingerprints import fingerprint
from ndonnx.runtime.progress import Progress
from ndonnx.runtime.run_directory import RunDir
from ndonnx.students.cutting import shrink
from ndonnx.teacher.batches import whole_batches

FAST_ENOUGH = 0.6
"""Part of the teacher's time: a student that takes no more keeps as much as that allows."""
_KEPT = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
"""Fractions that are tried, the default first: by halves, as more is never faster."""
_MODES: tuple[Mode, ...] = ("dynamic", "static")


def with_fast_keep(
    teacher: Teacher, parts: Partition, source: DataSource, recipe: Recipe, directory: RunDir, progress: Progress
) -> Recipe:
    """The recipe with `keep` said, where there is a time budget and the user left that open.

    Args:
        teacher: opened, and simplified where it is to be.
        parts: its partition.
        source: where a sample to time by is read.
        recipe: of the run.
        directory: where the decision is kept.
        progress: told what came of it, in one line.
    """
    if recipe.keep is not None or recipe.method != "width" or recipe.time_budget is None or not parts.distillable:
        return recipe
    cuts = [f"{n.name}: {n.exit.name if n.exit is not None else ''}" for n in parts.trained]
    key = fingerprint(files_key(teacher), source.fingerprint(), str(recipe.round_to), str(recipe.bits), *cuts)
    entry = directory.entry("keep", key)
    if not entry.done:
        entry.begin()
        trials = _Trials(teacher, parts, recipe, next(whole_batches(source, 1, samples=1)))
        in_bits = trials.in_bits()
        keep, time = trials.most(in_bits)
        times = {"time": time, "in_bits": in_bits}
        entry.commit({"keep": keep} | {name: t if math.isfinite(t) else None for name, t in times.items()})
    found = entry.meta()
    if found["keep"] != recipe.part_kept:
        progress.note(
            f"keep {found['keep']:g}: students of that width run in {found['time']:.2f} of the teacher's time here; "
            f"--keep {recipe.part_kept:g} makes a smaller one"
        )
    if not recipe.quantises and found["in_bits"] is not None and found["in_bits"] <= FAST_ENOUGH:
        progress.note(
            f"8 bits alone run in {found['in_bits']:.2f} of the teacher's time here: --bits 8 cuts nothing where that "
            "is enough"
        )
    kept: dict[str, Any] = {"keep": found["keep"]}
    if found["keep"] == 1:  # floats that are the teacher's have nothing to learn
        kept["steps"] = 0
    return recipe.model_copy(update=kept)


@dataclass(frozen=True)
class _Trials:
    """Times untrained students, in 8 bits where the recipe wants them so."""

    teacher: Teacher
    parts: Partition
    recipe: Recipe
    batch: Mapping[str, NDArray[Any]]
    """One sample."""

    def in_bits(self) -> float:
        """Part of its own time that the teacher takes in 8 bits, in the faster way to quantise it."""
        found = tried(lambda: self._in_bits_beside(self.teacher.model))
        return math.inf if isinstance(found, Fault) else found

    def most(self, in_bits: float) -> tuple[float, float]:
        """The largest fraction with which the student is fast enough, or the default; its part of the time.

        Args:
            in_bits: part of the time of the whole teacher in 8 bits.
        """
        if self.recipe.quantises and in_bits <= FAST_ENOUGH:
            return 1.0, in_bits
        low, high = 0, len(_KEPT)
        best = self._time(_KEPT[low])
        while best <= FAST_ENOUGH and high - low > 1:
            middle = (low + high) // 2
            time = self._time(_KEPT[middle])
            low, high, best = (middle, high, time) if time <= FAST_ENOUGH else (low, middle, best)
        return _KEPT[low], best

    def _time(self, keep: float) -> float:
        """Part of the teacher's time that an untrained student takes."""
        made = [tried(partial(self._shrunk, n, model, keep)) for n, model in self._slices]
        # What fails here has a job that will say so, and the teacher's own slice stays.
        students = {name: model for found in made if not isinstance(found, Fault) for name, model in found}
        found = tried(lambda: self._beside(splice(self.teacher.model, students, self.parts.shared)))
        return math.inf if isinstance(found, Fault) else found

    def _beside(self, whole: ir.Model) -> float:
        if self.recipe.quantises:
            return self._in_bits_beside(whole)
        return time_beside(whole, self.teacher.path, self._feeds).median

    def _in_bits_beside(self, whole: ir.Model) -> float:
        made = [tried(partial(self._in_bits, whole, mode)) for mode in _MODES]
        models = [model for model in made if not isinstance(model, Fault)]
        return min((time_beside(model, self.teacher.path, self._feeds).median for model in models), default=math.inf)

    @property
    def _feeds(self) -> Mapping[str, NDArray[Any]]:
        return self.teacher.interface.feeds(self.batch)

    def _in_bits(self, whole: ir.Model, mode: Mode) -> ir.Model:
        """A student in 8 bits; ranges have no influence on its time, so that those of one sample do."""
        base = prepared(whole, mode)
        if mode == "dynamic":
            return quantised(base, Scheme(mode))
        return quantised(
            base, Scheme(mode), measure_ranges(self.teacher.interface.applied(base), [self.batch], threads=1)
        )

    def _shrunk(self, n: Neighbourhood, model: ir.Model, keep: float) -> list[tuple[str, ir.Model]]:
        """An untrained student in each of its places."""
        assert n.groups is not None
        shrunk = shrink(model, n.groups, any_units(n.groups, keep, self._round_to(n)))
        return [(use.name, self.parts.as_in_teacher(self.parts.at(use, shrunk))) for use in self.parts.uses(n)]

    def _round_to(self, n: Neighbourhood) -> int | None:
        if not self.recipe.quantises or self.recipe.round_to is not None:
            return self.recipe.round_to
        return step_of_integers(n.widths)

    @cached_property
    def _slices(self) -> list[tuple[Neighbourhood, ir.Model]]:
        """What has a width, with its slice."""
        found = self.parts.trained
        return [(n, self.parts.slice_of(n)) for n in found if n.groups is not None and n.groups.groups]
