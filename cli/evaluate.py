"""`ndonnx evaluate`: how good a model is, alone or beside a teacher."""

from __future__ import annotations

from typing import Annotated

import typer

import ndonnx
from ndonnx.errors import UsageError

from . import options
from .outcome import DONE, job
from .settings import given, takes

Teacher = Annotated[
    str | None, typer.Option("--teacher", metavar="FILE.onnx", help="Also measure agreement with it, and the error.")
]


@takes("task", "metric")
def evaluate(
    context: typer.Context,
    model: options.Model,
    data: options.Data = None,
    teacher: Teacher = None,
    recipe: options.RecipeFile = None,
    input_settings: options.InputSettings = None,
    shapes: options.Shapes = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Measure the accuracy of MODEL on labelled data, or how far it is from a teacher on any data."""
    settings = ndonnx.load_recipe(recipe, **given(context))
    if data is None:
        raise UsageError(
            f"--data is missing: give {options.SOURCES}; --data leaves with a --teacher works without data"
        )

    from .tables import print_evaluation, print_json  # noqa: PLC0415 - rich is not for `--help`

    with job(quiet, verbose) as progress:
        found = ndonnx.evaluate(model, data, teacher=teacher, recipe=settings, progress=progress)
    if json:
        print_json({"model": model, "teacher": teacher, "data": data, "metrics": found.to_json()})
    else:
        print_evaluation(model, found)
    return DONE
