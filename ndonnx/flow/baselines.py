"""A student beside the baselines that are named for it, on rows that no training and no choice has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from ndonnx.config.recipe import Recipe
from ndonnx.data import DataSource
from ndonnx.data.split import Split
from ndonnx.flow.prepare import NOTHING_MORE, Request, held_out_for, open_all
from ndonnx.flow.run import Run
from ndonnx.graph import save
from ndonnx.metrics.baselines import CALIBRATION, Baselines, Comparison, Material
from ndonnx.metrics.latency import Plan, plan_for
from ndonnx.runtime.machine import usable_cores
from ndonnx.runtime.progress import Progress

_FOLDER = "baselines"


@dataclass(frozen=True)
class _Beside:
    """A student, and the rows of the run that made it: those of the training give ranges, those of all choices choose
    a calibration."""

    teacher: Path
    student: Path
    split: Split
    comparison_data: DataSource
    recipe: Recipe

    def baselines(self, kinds: Sequence[str], folder: Path, progress: Progress) -> Baselines:
        """The comparison; the baselines' files stay in the folder."""
        fits, chooses = self.split.to_fit(CALIBRATION), self.split.to_choose()
        material = Material(self.teacher, folder, fits, chooses, self.recipe.task, self.recipe.metric)
        students = {"student": self.student}
        plan = Plan((1,), ("cpu",), usable_cores())
        models = {"teacher": self.teacher, **students}
        plan, feeds = plan_for(models, self.comparison_data, self.recipe.model_inputs, plan)
        return Comparison(self.teacher, students, self.comparison_data, self.recipe, progress).run(
            kinds, material, plan, feeds
        )


def beside_baselines(run: Run, student: ir.Model, written: Path | None) -> Baselines:
    """Teacher, student and the baselines that the recipe names in one comparison; they stay in the run directory.

    Args:
        run: the run that made the student.
        student: the finished student.
        written: its file. None: it was not written, and is for the comparison.
    """
    folder = run.directory.path / _FOLDER
    folder.mkdir(exist_ok=True)
    if written is None:
        written = folder / "student.onnx"
        save(student, written)
    found = _Beside(run.teacher.path, written, run.split, run.comparison_data, run.recipe)
    return found.baselines(run.recipe.baselines, folder, run.progress)


def beside_baselines_later(
    kinds: Sequence[str], request: Request, recipe: Recipe, folder: Path, progress: Progress
) -> Baselines:
    """The same comparison for a run that is over: the data are opened again, and its rows drawn as they were then.

    Args:
        kinds: of baselines.
        request: what the run was given; its output is the student.
        recipe: of the run.
        folder: run directory.
        progress: told what goes on.

    Raises:
        UsageError: the model, the student or the data cannot be read any more.
    """
    assert request.output is not None
    searched = bool(recipe.target) or recipe.max_drop is not None
    promised = recipe.max_drop is not None
    held_out = held_out_for(recipe, request.data, promised=promised) if searched else NOTHING_MORE
    opened = open_all(request, recipe, held_out=held_out)
    files = folder / _FOLDER
    files.mkdir(exist_ok=True)
    found = _Beside(request.model, request.output, opened.split, opened.comparison_data, recipe)
    return found.baselines(kinds, files, progress)
