"""The whole student after every stage that can change it, of which the best is written: no stage makes it worse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import onnx_ir as ir

from ndonnx.data.subset import Remembered
from ndonnx.flow.run import Run
from ndonnx.metrics.evaluation import Batching, Evaluation, Reference, evaluate
from ndonnx.report import StageReport

_REMEMBERED = 128 * 2**20
"""Most bytes of samples, and of the teacher's answers, that stay in memory from one stage to the next."""
_MOST_SAMPLES = 1024
"""Samples of a comparison of stages: the standard error of an agreement is then a point and a half at worst."""


@dataclass(frozen=True)
class Stage:
    """A whole student."""

    name: str
    """`spliced`, `reconstructed`, `fine-tuned` or `quantised`; `teacher` where that is quantised itself."""
    model: ir.Model
    students: Mapping[str, ir.Model]
    """The slices as they stand in it, by neighbourhood; empty where they were trained on as a whole."""


@dataclass
class Stages:
    """Measures each stage on the rows by which all choices are made, and keeps the best."""

    run: Run
    best: Stage | None = None
    _found: list[tuple[Stage, Evaluation | None]] = field(default_factory=list)

    @cached_property
    def _rows(self) -> Remembered:
        """The samples by which all choices are made, read once for all stages."""
        return Remembered(self.run.split.to_choose(), _REMEMBERED)

    @property
    def samples(self) -> int:
        """Samples on which stages are measured, at most."""
        return self.run.schedule.stage_samples(_MOST_SAMPLES)

    def found(self, stage: Stage | None) -> Evaluation | None:
        """What a stage came to; None where nothing can be measured."""
        return next((each for kept, each in self._found if kept is stage), None)

    @cached_property
    def _teacher(self) -> Reference:
        """The teacher, which every stage is compared with."""
        return Reference(self.run.teacher.path, self._rows, _REMEMBERED)

    def add(self, stage: Stage, *, better: bool = False, asked: bool = False) -> None:
        """Take in a stage; it is the best where it is measured to be, or nothing can be measured.

        A later stage that is as good as an earlier one is not written: it has changed what it need not.

        Args:
            stage: a student that passed its checks.
            better: it is better by what the user asked for, which is more than to answer as the teacher does.
            asked: the user asked for what it is, whatever that costs.
        """
        metric = self.run.recipe.metric
        found = self.evaluate(stage.model) if self.run.float_outputs or metric else None
        before = self.found(self.best)
        self._found.append((stage, found))
        better = better and metric is None  # a metric of the user's own has the last word
        if asked or better or self.best is None or found is None or before is None or found.beats(before):
            self.best = stage

    def reports(self) -> tuple[StageReport, ...]:
        """What each stage came to; nothing where there was only one."""
        return tuple(
            StageReport(
                stage.name,
                None if found is None or not math.isfinite(found.loss) else found.loss,
                {} if found is None else found.outputs,
                stage is self.best,
                None if found is None else found.metric,
            )
            for stage, found in self._found
        )

    def evaluate(self, model: ir.Model, samples: int | None = None) -> Evaluation:
        """A student on the rows by which all choices are made, or on the first so many of them."""
        with self.run.clock.measure("evaluate"):
            return evaluate(
                model,
                self._rows,
                teacher=self._teacher,
                batching=Batching(samples=self.samples if samples is None else min(samples, self.samples)),
                tasks=self.run.recipe.task,
                metric=self.run.recipe.metric,
            )
