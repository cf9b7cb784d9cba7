"""One cell of a table: a student made by ND or by a baseline, judged, and timed. A cell that fails says why."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import ndonnx
from benchmarks import common
from benchmarks.common import Notes, Stopwatch, Subject
from benchmarks.end_to_end import EndToEnd, Images, Loss, starting_student
from benchmarks.paper.scales import Scale
from benchmarks.time_to_quality import Judge, Point
from ndonnx.config.recipe import Recipe, make_recipe
from ndonnx.errors import NdonnxError, UsageError
from ndonnx.report import CompressReport
from ndonnx.runtime.fingerprints import fingerprint
from ndonnx.teacher import make_session

BATCH = 128
"""Images of a baseline's step."""
FIRST_CHECKPOINT = 0.1
"""Part of a baseline's budget at which it is judged first, where it is judged more than once."""
_FINISHING = {"inputs": "teacher", "finetune_steps": 0, "finetune_samples": 2, "finetune_lr": 1.0, "temperature": 1.0}
"""Settings on which the students themselves do not depend: their values in the name of a run directory."""


@dataclass(frozen=True)
class Cell:
    """What a way of making a student came to."""

    quality: float | None = None
    """Accuracy, or agreement with the teacher where there are no labels; None where it failed."""
    seconds: float | None = None
    """Wall time of everything but the judging."""
    stages: Mapping[str, float] = field(default_factory=dict)
    """The seconds by stage, for ND."""
    note: str = ""
    """Why it failed, or what has to be known of it."""
    curve: tuple[Point, ...] = ()
    """Of a baseline that is judged more than once."""
    path: Path | None = None
    """Of a hardened teacher."""


@dataclass
class Lab:
    """Makes cells for one teacher; those asked for twice are made once."""

    subject: Subject
    scale: Scale
    folder: Path
    teacher: float = 0.0
    """Quality of the teacher."""
    labelled: bool = False
    """Whether quality is accuracy."""
    rates: dict[str, dict[str, float]] = field(default_factory=dict)
    """Held-out loss by learning rate, of every sweep of a baseline."""
    _cells: dict[str, Cell] = field(default_factory=dict)
    _students: dict[Path, dict[str, float]] = field(default_factory=dict)
    """Seconds that the students in a run directory took."""
    _images: tuple[Images, float] | None = None
    _judge: Judge | None = None

    def __post_init__(self) -> None:
        """Judge the teacher, and count the images."""
        assert self.subject.judge is not None
        found = ndonnx.evaluate(self.subject.model, self.subject.judge, recipe=self.subject.recipe)
        self.labelled = found.accuracy is not None
        self.teacher = 1.0 if found.accuracy is None else found.accuracy
        samples = common.count_samples(self.subject.open(self.subject.data), self.scale.samples or sys.maxsize)
        self.scale = replace(self.scale, samples=samples)

    def recipe(self, **settings: Any) -> Recipe:
        """The recipe of the command line with a table's settings over it.

        Raises:
            RecipeError: a setting is out of range.
        """
        samples = self.scale.samples
        own = {"samples": samples, "finetune_samples": samples, "steps": self.scale.steps, "finetune_steps": 0}
        return make_recipe(self.subject.recipe.model_dump() | {"time_budget": None} | own | settings, "table")

    def nd(self, model: Path | None = None, **settings: Any) -> Cell:
        """One call of `compress`: of the teacher or of `model`, by the recipe with these settings."""

        def make() -> Cell:
            recipe = self.recipe(**settings)
            teacher = model or self.subject.model
            own = recipe.model_copy(update=_FINISHING if recipe.inputs in {"teacher", "refit"} else {})
            run_dir = self.folder / fingerprint(str(teacher), own.model_dump(mode="json"))
            # Noise needs no data either: with them, no others are made up for the last check.
            report = ndonnx.compress(
                teacher,
                data=None if recipe.data_free else self.subject.data,
                eval_data=self.subject.judge,
                recipe=recipe,
                run_dir=run_dir,
                progress=Notes(),
            ).report
            return self._of(report, run_dir)

        return self._once(f"ND of {(model or self.subject.model).name}", settings, make)

    def baseline(self, name: str, loss: Loss, init: str, keep: float, seconds: float, *, judged: bool = False) -> Cell:
        """A whole student trained from one start, in as many seconds, set-up included.

        Args:
            name: of the baseline.
            loss: what it is trained on.
            init: its starting weights.
            keep: its multiplier k.
            seconds: ND's, which the scale's factors multiply.
            judged: whether it is judged on its way, at each of the scale's factors.
        """

        def make() -> Cell:
            images, swept = self._training_images()
            recipe = self.recipe(keep=keep, init=init)
            clock = Stopwatch()
            student = starting_student(self.subject, recipe, images, self.folder / "start")
            # Random weights need no data: only the other starts are paid for.
            clock = Stopwatch(swept + (0.0 if init == "random" else clock.seconds))
            trainer = EndToEnd(student, images.training(recipe.holdout), images.logits, recipe, self._batch(), loss)
            setup = clock.seconds
            rate = self._rate(trainer, name, keep)
            points: list[Point] = []
            factors = self.scale.baseline_factors
            for factor in factors if judged else factors[-1:]:
                points += self._train(trainer, name, rate, factor * seconds, setup, judged=judged)
            return Cell(points[-1].quality, points[-1].seconds, note="", curve=tuple(points))

        return self._once(name, {"k": keep, "seconds": round(seconds, 1)}, make)

    def hardened(self) -> Cell:
        """The teacher, hardened; its path goes into `nd`."""

        def make() -> Cell:
            path = self.folder / "hardened.onnx"
            clock = Stopwatch()
            report = ndonnx.harden(
                self.subject.model,
                data=self.subject.data,
                noise=self.scale.noise,
                steps=self.scale.harden_steps,
                recipe=self.recipe(),
                output=path,
                eval_data=self.subject.judge,
                progress=Notes(),
            ).report
            found = report.metrics["hardened"]
            note = f"held-out loss under noise {report.loss_start:.4g} → {report.loss:.4g}"
            return Cell(self._quality(found), clock.seconds, note=note, path=path)

        return self._once("hardening", {"noise": self.scale.noise, "steps": self.scale.harden_steps}, make)

    def difference(self, cell: Cell) -> float | None:
        """From the teacher, in points."""
        return None if cell.quality is None else 100 * (cell.quality - self.teacher)

    def _once(self, name: str, settings: Mapping[str, Any], make: Callable[[], Cell]) -> Cell:
        """The cell, made now or before; one that fails does not stop the others."""
        key = f"{name} {', '.join(f'{key}={value}' for key, value in settings.items())}".strip()
        if key not in self._cells:
            try:
                cell = make()
            except NdonnxError as error:
                cell = Cell(note=" ".join(str(error).split()))
            except Exception as error:  # an hour of other cells is at stake; the table and stderr tell of the bug
                traceback.print_exc()
                cell = Cell(note=f"a bug: {type(error).__name__}: {' '.join(str(error).split())}")
            self._cells[key] = cell
            told = f"{common.percent(cell.quality)} {cell.seconds or 0:.1f} s {cell.note}".strip()
            Notes().note(f"{key}: {told}")
        return self._cells[key]

    def _of(self, report: CompressReport, run_dir: Path) -> Cell:
        """A cell of a report; students that an earlier cell trained are paid for here too."""
        made = [n for n in report.neighbourhoods if n.status != "kept"]
        if not made:
            reasons = [n.reason for n in report.neighbourhoods if n.reason is not None]
            raise UsageError(f"nothing was distilled: {reasons[0] if reasons else 'there is no neighbourhood'}")
        stages = {stage: spent for stage, spent in asdict(report.seconds).items() if stage not in {"total", "evaluate"}}
        if any(n.status == "distilled" for n in made) or run_dir not in self._students:
            self._students[run_dir] = {stage: stages[stage] for stage in ("capture", "distil")}
        stages |= self._students[run_dir]
        note = ""
        if report.finetune is not None and report.finetune.reason is not None:
            note = f"not fine-tuned: {report.finetune.reason}"
        return Cell(self._quality(report.metrics["student"]), sum(stages.values()), stages, note)

    def _quality(self, found: ndonnx.Evaluation) -> float:
        quality = found.accuracy if self.labelled else found.agreement
        if quality is None:
            raise UsageError("the student gives no class scores, so neither accuracy nor agreement can be told")
        return quality

    def _training_images(self) -> tuple[Images, float]:
        """Images and teacher's logits, and the seconds that it took to get them."""
        if self._images is None:
            clock = Stopwatch()
            images = Images(self.subject, self.subject.data, self.folder / "images", self.scale.samples)
            self._images = images, clock.seconds
        return self._images

    def _judged(self) -> Judge:
        if self._judge is None:
            assert self.subject.judge is not None
            self._judge = Judge(self.subject, self.subject.judge, self.folder / "judge")
        return self._judge

    def _batch(self) -> int:
        fixed = make_session(self.subject.model).get_inputs()[0].shape[0]
        return fixed if isinstance(fixed, int) else BATCH

    def _rate(self, trainer: EndToEnd, name: str, keep: float) -> float:
        """The learning rate with the least loss on held-out training images, after a short training with each."""
        key = name if self.scale.sweep_once else f"{name} k={keep:g}"
        if key not in self.rates:
            losses = trainer.sweep(self.scale.learning_rates, self.scale.sweep_seconds)
            self.rates[key] = {f"{rate:g}": loss for rate, loss in losses.items()}
        return float(min(self.rates[key], key=self.rates[key].__getitem__))

    def _train(
        self, trainer: EndToEnd, name: str, rate: float, budget: float, setup: float, *, judged: bool
    ) -> list[Point]:
        length = max(budget - setup, 0.1 * budget)
        count = self.scale.checkpoints if judged else 1
        stops = np.geomspace(FIRST_CHECKPOINT * length, length, count).tolist() if count > 1 else [length]
        clock = Stopwatch(setup)
        points: list[Point] = []

        def visit(steps: int) -> None:
            accuracy, agreement = self._judged().score(trainer.model())
            points.append(Point(name, f"{budget:.0f} s", clock.seconds, steps, accuracy, agreement))

        trainer.train(rate, length, clock, stops, visit)
        return points
