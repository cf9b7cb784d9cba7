"""`ndonnx evaluate`: how good a model is, alone or beside a teacher."""

from __future__ import annotations

from typing import Annotated

import typer

import ndonnx
from ndonnx.errors import UsageError

from . import options
from .outcome import DONE, TARGET_MISSED, job
from .settings import given, option, takes

Teacher = Annotated[
    str | None, typer.Option("--teacher", metavar="FILE.onnx", help="Also measure agreement with it, and the error.")
]
Require = Annotated[
    list[str] | None,
    typer.Option(
        "--require",
        metavar="METRIC>=VALUE",
        help="What has to hold (also <=, >, <), as agreement>=99% or latency<=0.6: accuracy, agreement, cosine, "
        "divergence, error, max-error, metric, drop, and of the teacher's latency and size. Exit code 3 where it does "
        "not. Repeatable.",
    ),
]
Junit = Annotated[
    str | None, typer.Option("--junit", metavar="FILE.xml", help="Also write what was required as JUnit XML.")
]
Threads = Annotated[
    int | None, option("--threads", "N", "Number of threads while latency is measured.", "all usable cores")
]
Processes = Annotated[
    int, option("--processes", "N", "Number of processes in each of which latency is measured anew.", "8")
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
    require: Require = None,
    junit: Junit = None,
    threads: Threads = None,
    processes: Processes = 8,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Measure the accuracy of MODEL on labelled data, or how far it is from a teacher on any data, and require it."""
    settings = ndonnx.load_recipe(recipe, **given(context))
    if data is None:
        raise UsageError(
            f"--data is missing: give {options.SOURCES}; --data leaves with a --teacher works without data"
        )

    from .requirements import print_requirements  # noqa: PLC0415 - rich is not for `--help`
    from .tables import print_evaluation, print_json  # noqa: PLC0415

    with job(quiet, verbose) as progress:
        found = ndonnx.evaluate(
            model,
            data,
            teacher=teacher,
            require=require or (),
            junit=junit,
            threads=threads,
            processes=processes,
            recipe=settings,
            progress=progress,
        )
    if json:
        print_json({"model": model, "teacher": teacher, "data": data, "metrics": found.to_json()})
    else:
        print_evaluation(model, found)
        print_requirements(found)
    return TARGET_MISSED if found.missed else DONE
