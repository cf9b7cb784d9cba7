"""`ndonnx benchmark`: how fast a model answers, alone or in turn with another one."""

from __future__ import annotations

import typer

import ndonnx
from ndonnx.errors import UsageError

from . import options
from .outcome import DONE, job


def benchmark(
    context: typer.Context,
    model: options.Model,
    against: options.Against = None,
    data: options.Data = None,
    recipe: options.RecipeFile = None,
    input_settings: options.InputSettings = None,
    shapes: options.Shapes = None,
    batch_sizes: options.BatchSizes = "1,8,32",
    provider: options.Provider = None,
    threads: options.Threads = None,
    processes: options.Processes = 8,
    rounds: options.Rounds = None,
    compared: options.FidelitySamples = None,
    picture: options.Picture = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Measure in onnxruntime how fast MODEL loads and answers, and how much memory it takes; with data how well."""
    settings = ndonnx.load_recipe(recipe, **options.given(context))
    sizes = _whole_numbers(batch_sizes)

    from .speed import print_speed  # noqa: PLC0415 - rich is not for `--help`
    from .tables import print_json  # noqa: PLC0415

    with job(quiet, verbose) as progress:
        speed = ndonnx.benchmark(
            model,
            against=against,
            data=data,
            recipe=settings,
            batch_sizes=sizes,
            providers=provider or ["cpu"],
            threads=threads,
            processes=processes,
            rounds=rounds,
            samples=compared,
            picture=picture,
            progress=progress,
        )
    if json:
        print_json(speed.to_json())
    else:
        print_speed(speed)
    return DONE


def _whole_numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
        raise UsageError(f"--batch-sizes: expected whole numbers from 1 on, as 1,8,32; found {text!r}")
    return [int(part) for part in parts]
