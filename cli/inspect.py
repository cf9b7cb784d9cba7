"""`ndonnx inspect`: the partition of a model."""

from __future__ import annotations

from pathlib import Path

import ndonnx

from . import options
from .outcome import DONE, interruptible, results_only


def inspect(
    model: options.Model,
    recipe: options.RecipeFile = None,
    granularity: options.Granularity = None,
    cut: options.Cut = None,
    freeze: options.Freeze = None,
    svg: options.Svg = None,
    json: options.Json = False,
) -> int:
    """Show the neighbourhoods of MODEL: where it can be cut, and what each piece holds and costs."""
    settings = ndonnx.load_recipe(recipe, granularity=granularity, cut=cut or None, freeze=freeze or None)

    from .tables import print_inspection, print_json  # noqa: PLC0415 - rich is not for `--help`

    with interruptible(), results_only():
        inspection = ndonnx.inspect(model, settings)
        if svg is not None:
            inspection.write_svg(Path(svg))
    if json:
        print_json(inspection.to_json())
    else:
        print_inspection(inspection)
    return DONE
