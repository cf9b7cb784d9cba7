"""`ndonnx inspect`: the partition of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import ndonnx

from . import options
from .outcome import DONE, job
from .settings import given, takes

Check = Annotated[
    bool,
    typer.Option("--check", help="Also convert and shrink every neighbourhood, as before training, and compare."),
]

Svg = Annotated[str | None, typer.Option("--svg", metavar="FILE.svg", help="Also draw it, from top to bottom.")]


@takes("granularity", "cut", "freeze", "simplify", "task")
def inspect(
    context: typer.Context,
    model: options.Model,
    recipe: options.RecipeFile = None,
    input_settings: options.InputSettings = None,
    shapes: options.Shapes = None,
    check: Check = False,
    data: options.Data = None,
    svg: Svg = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Show the neighbourhoods of MODEL: where it can be cut, and what each piece holds and costs; with --data also
    what the data are taken for."""
    settings = ndonnx.load_recipe(recipe, **given(context))
    from .tables import print_inspection, print_json  # noqa: PLC0415 - rich is not for `--help`

    with job(quiet or not check, verbose and check) as progress:
        inspection = ndonnx.inspect(model, settings, check=check, data=data, progress=progress)
        if svg is not None:
            inspection.write_svg(Path(svg))
    if json:
        print_json(inspection.to_json())
    else:
        print_inspection(inspection)
    return DONE
