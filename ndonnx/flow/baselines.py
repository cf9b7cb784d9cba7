"""A run's student beside the baselines that its recipe names, on rows that no training and no choice has seen."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from ndonnx.flow.run import Run
from ndonnx.graph import save
from ndonnx.metrics.baselines import CALIBRATION, Baselines, Comparison, Material
from ndonnx.metrics.latency import Plan, plan_for
from ndonnx.runtime.machine import usable_cores

_FOLDER = "baselines"


def beside_baselines(run: Run, student: ir.Model, written: Path | None) -> Baselines | None:
    """Teacher, student and baselines in one comparison; None where the recipe names no baseline.

    The baselines stay in the run directory.

    Args:
        run: its training rows give ranges, the rows that choose a calibration are those of all choices.
        student: the finished student.
        written: its file. None: it was not written, and is for the comparison.
    """
    if not run.recipe.baselines:
        return None
    folder = run.directory.path / _FOLDER
    folder.mkdir(exist_ok=True)
    if written is None:
        written = folder / "student.onnx"
        save(student, written)
    material = Material(
        run.teacher.path,
        folder,
        run.split.to_fit(CALIBRATION),
        run.split.to_choose(),
        run.recipe.task,
        run.recipe.metric,
    )
    students = {"student": written}
    comparison = Comparison(run.teacher.path, students, run.judge, run.recipe, run.progress)
    plan, feeds = plan_for(
        {"teacher": run.teacher.path, **students},
        run.judge,
        run.recipe.model_inputs,
        Plan((1,), ("cpu",), usable_cores()),
    )
    return comparison.run(run.recipe.baselines, material, plan, feeds)
