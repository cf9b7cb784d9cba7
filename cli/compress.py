"""`ndonnx compress`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import ndonnx
from ndonnx.errors import UsageError

from . import options
from .outcome import job, verdict
from .settings import given, takes_all


@takes_all
def compress(
    context: typer.Context,
    model: options.Model,
    data: options.Data = None,
    eval_data: options.Eval = None,
    output: Annotated[str | None, options.output("MODEL-student.onnx in this folder")] = None,
    recipe: options.RecipeFile = None,
    input_settings: options.InputSettings = None,
    shapes: options.Shapes = None,
    run_dir: options.RunDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Write a smaller student of MODEL, distilled neighbourhood by neighbourhood."""
    settings = ndonnx.load_recipe(recipe, **given(context))
    if data is None and not settings.data_free and settings.inputs != "noise":
        raise UsageError(f"--data is missing: give {options.SOURCES}; --data-free works without data")
    student_path = Path(output) if output is not None else Path(f"{Path(model).stem}-student.onnx")
    folder = Path(run_dir) if run_dir is not None else student_path.with_suffix(".run")

    from .baselines import print_baselines  # noqa: PLC0415 - rich is not for `--help`
    from .tables import print_json, print_report  # noqa: PLC0415

    with job(quiet, verbose, folder) as progress:
        report = ndonnx.compress(
            model,
            data=data,
            recipe=settings,
            output=student_path,
            eval_data=eval_data,
            run_dir=folder,
            progress=progress,
        ).report
    if json:
        print_json(report.to_json())
    else:
        print_report(report)
        if report.baselines is not None:
            print_baselines(report.baselines)
    return verdict(report)
