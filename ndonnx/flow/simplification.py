"""The teacher simplified before it is partitioned, as far as it answers the same and is no slower.

The decision is kept in the run directory, so that a continued run takes the same one: what was timed may come out
otherwise the next time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ndonnx.config.recipe import Recipe
from ndonnx.data import DataSource
from ndonnx.flow.run import Teacher, files_key
from ndonnx.graph.dataflow import draws_random
from ndonnx.graph.passes.simplification.simplify import RULES, change_key, nodes_in, simplify
from ndonnx.metrics.latency import Ratio, time_beside
from ndonnx.report import SimplifiedReport
from ndonnx.runtime.fingerprints import fingerprint
from ndonnx.runtime.progress import Estimate, Progress
from ndonnx.runtime.run_directory import RunDir
from ndonnx.teacher import make_session
from ndonnx.teacher.batches import whole_batches
from ndonnx.teacher.sessions import REFUSALS

Arrays = Mapping[str, NDArray[Any]]

_SAMPLES = 4
"""On which the answers are compared."""
_TOLERANCE = 1e-5
"""Largest difference of an answer, relative to the largest value of the output."""
_OWN = 4
"""The same, in multiples of what the teacher's answers differ by with and without onnxruntime's own optimisations."""
_SLOWER = 1.0
"""Ratio of times above which the simplified model is slower, if the low end of its interval lies there, twice."""


def simplified(
    teacher: Teacher, source: DataSource, recipe: Recipe, progress: Progress, directory: RunDir | None = None
) -> Teacher:
    """The teacher with its `model` simplified, where the recipe asks for that and nothing speaks against it.

    Args:
        teacher: opened; its file is never modified.
        source: a few samples of which are answered by both.
        recipe: `simplify`, and the values that `cut` and `freeze` name, which stay.
        progress: told what came of it, in one line.
        directory: in which the decision is kept. None: it is taken anew each time.
    """
    if not recipe.simplifies or draws_random(teacher.model.graph):
        return teacher
    keep = sorted({*recipe.cut, *recipe.freeze})
    whole = simplify(teacher.model, keep)
    if whole is teacher.model:
        return teacher
    decision = _decision(teacher, whole, keep, source, directory)
    return _told(decision.applied(teacher, whole, keep), progress)


@dataclass(frozen=True)
class _Decision:
    """Which rules are applied, and what was measured of them."""

    rules: tuple[str, ...]
    difference: float | None
    latency_ratio: float | None
    reason: str | None = None

    def applied(self, teacher: Teacher, whole: ir.Model, keep: Sequence[str]) -> Teacher:
        """The teacher with these rules applied."""
        model = teacher.model
        if self.rules:
            model = whole if self.rules == tuple(RULES) else simplify(teacher.model, keep, self.rules)
        report = SimplifiedReport(nodes_in(teacher.model), nodes_in(model), **asdict(self))
        return replace(teacher, model=model, simplified=report, change=change_key(teacher.model, model))


def _decision(
    teacher: Teacher, whole: ir.Model, keep: Sequence[str], source: DataSource, directory: RunDir | None
) -> _Decision:
    """What was decided before in this run directory, or what is decided now."""
    key = fingerprint(files_key(teacher), source.fingerprint(), *keep, change_key(teacher.model, whole))
    entry = None if directory is None else directory.entry("simplified", key)
    if entry is not None and entry.done:
        found = entry.meta()
        return _Decision(**found | {"rules": tuple(found["rules"])})
    decided = _Trial.of(teacher, keep, source).decide(whole)
    if entry is not None:
        entry.begin()
        entry.commit(asdict(decided))
    return decided


@dataclass(frozen=True)
class _Trial:
    """The teacher's own answers to a few samples, and what simplified ones are held against."""

    teacher: Teacher
    keep: Sequence[str]
    feeds: Sequence[Arrays]
    """As the model takes them, batch by batch."""
    answers: Sequence[Sequence[NDArray[Any]]]
    allowed: Sequence[tuple[float, float]]
    """By output: the largest difference, and the scale that it is told in."""
    one: Arrays
    """One sample, or a batch of the size that the model fixes, for timing."""

    @classmethod
    def of(cls, teacher: Teacher, keep: Sequence[str], source: DataSource) -> _Trial:
        """Run the teacher."""
        batches = whole_batches(source, _SAMPLES, samples=_SAMPLES)
        feeds = [teacher.interface.feeds(batch) for batch in batches]
        answers = _answers(teacher.path, feeds)
        plain = _answers(teacher.path, feeds, optimise=False)
        allowed = []
        for at in range(len(answers[0]) if answers else 0):
            scale = max(_largest(batch[at]) for batch in answers)
            own = max(_difference(one[at], other[at]) for one, other in zip(answers, plain, strict=True))
            allowed.append((max(_TOLERANCE * scale, _OWN * own if np.isfinite(own) else 0.0), scale))
        one = teacher.interface.feeds(next(whole_batches(source, 1, samples=1)))
        return cls(teacher, keep, feeds, answers, allowed, one)

    def decide(self, whole: ir.Model) -> _Decision:
        """Which rules may be applied: all if they answer the same, else one by one; none if that is slower."""
        rules, model, reason = tuple(RULES), whole, None
        found = self.differs(model)
        if found is None:
            rules, model = self._one_by_one()
            found, left_out = self.differs(model), [rule for rule in RULES if rule not in rules]
            reason = f"the answers differed by more than rounding with {' and '.join(left_out)}"
        if not rules:
            return _Decision((), None, None, reason)
        slower = self._slower(model)
        if slower.low > _SLOWER:
            slower = min(slower, self._slower(model), key=lambda timed: timed.low)  # once more, before it is believed
        if slower.low > _SLOWER:
            return _Decision((), found, slower.median, f"it takes {slower.median:.2f} of the time")
        return _Decision(rules, found, slower.median, reason)

    def _one_by_one(self) -> tuple[tuple[str, ...], ir.Model]:
        rules: list[str] = []
        model = self.teacher.model
        for rule in RULES:
            tried = simplify(self.teacher.model, self.keep, [*rules, rule])
            if self.differs(tried) is not None:
                rules, model = [*rules, rule], tried
        return tuple(rules), model

    def differs(self, model: ir.Model) -> float | None:
        """The largest difference of an answer, relative to its scale; None where it is more than rounding."""
        try:
            answers = _answers(model, self.feeds)
        except REFUSALS:
            return None
        found = 0.0
        for theirs, ours in zip(self.answers, answers, strict=True):
            for one, other, (allowed, scale) in zip(theirs, ours, self.allowed, strict=True):
                difference = _difference(one, other)
                if not difference <= allowed:
                    return None
                found = max(found, difference / scale if scale else 0.0)
        return found

    def _slower(self, model: ir.Model) -> Ratio:
        """Time of a run over that of the teacher's file, in turn."""
        return time_beside(model, self.teacher.path, self.one)


def _answers(model: ir.Model | Path, feeds: Sequence[Arrays], *, optimise: bool = True) -> list[list[NDArray[Any]]]:
    session = make_session(model, threads=1, optimise=optimise)  # one: the same sums each time
    return [session.run(None, dict(batch)) for batch in feeds]


def _largest(answer: object) -> float:
    if not _is_numbers(answer):
        return 0.0
    finite = np.abs(np.asarray(answer, np.float64))
    return float(np.max(finite, initial=0.0, where=np.isfinite(finite)))


def _difference(one: object, other: object) -> float:
    """The largest difference of two answers; infinite where they are of another shape, or not both are finite."""
    if not _is_numbers(one) or not _is_numbers(other):
        return 0.0 if _is_same(one, other) else np.inf
    theirs, ours = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if theirs.shape != ours.shape or not np.array_equal(np.isfinite(theirs), np.isfinite(ours)):
        return np.inf
    finite = np.isfinite(theirs)
    return float(np.max(np.abs(theirs[finite] - ours[finite]), initial=0.0))


def _is_numbers(answer: object) -> bool:
    return isinstance(answer, np.ndarray) and answer.dtype.kind in "fiub"


def _is_same(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return bool(np.array_equal(one, other))
    return isinstance(one, list) and isinstance(other, list) and all(map(_is_same, one, other))


def _told(teacher: Teacher, progress: Progress) -> Teacher:
    report = teacher.simplified
    assert report is not None
    if not report.rules:
        progress.note(f"the teacher is not simplified: {report.reason}")
        return teacher
    text = f"simplified: {report.nodes_before} nodes to {report.nodes_after}"
    if report.latency_ratio is not None:
        text += f", {report.latency_ratio:.2f} of the time"
    left = f"; {report.reason}" if report.reason else ""
    progress.note(Estimate(text + left))
    return teacher
