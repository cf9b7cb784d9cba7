"""`ndonnx benchmark`: how fast a model answers, alone or in turn with another one."""

from __future__ import annotations

from typing import Annotated

import typer

import ndonnx
from ndonnx.errors import UsageError

from . import options
from .outcome import DONE, job
from .settings import Changed, given, option, takes

Against = Annotated[
    str | None, typer.Option("--against", metavar="FILE.onnx", help="Time this model too, by turns, and compare.")
]
BatchSizes = Annotated[
    str, option("--batch-sizes", "N,N", "Numbers of samples in a run, timed one after the other.", "1,8,32")
]
Providers = Annotated[
    list[str] | None,
    option("--provider", "cpu|cuda", "Execution provider of onnxruntime, or another one. Repeatable.", "cpu"),
]
Threads = Annotated[int | None, option("--threads", "N", "Number of threads inside one operator.", "all usable cores")]
Processes = Annotated[
    int,
    option(
        "--processes",
        "N",
        "Number of processes, one after the other, in each of which everything is loaded and timed anew.",
        "8",
    ),
]
Rounds = Annotated[
    int | None,
    option(
        "--rounds",
        "N",
        "Number of timed runs of each model in each process.",
        "what a second has room for, 3 to 30",
    ),
]
Samples = Annotated[
    int | None,
    option("--samples", "N", "Maximum number of samples on which the outputs are compared.", "all of --data"),
]
Picture = Annotated[
    str | None,
    typer.Option("--picture", metavar="FILE.png|svg", help="Also draw latency over batch sizes, and the ratio."),
]
_BASELINES = (
    "Models that stand beside, made of the one that is compared with: onnxruntime's INT8 with calibrated ranges "
    "(`int8`), with ranges found at every run (`dynamic`), half precision (`fp16`), separated by commas."
)


@takes(Changed("baselines", _BASELINES))
def benchmark(
    context: typer.Context,
    model: options.Model,
    against: Against = None,
    data: options.Data = None,
    recipe: options.RecipeFile = None,
    input_settings: options.InputSettings = None,
    shapes: options.Shapes = None,
    batch_sizes: BatchSizes = "1,8,32",
    provider: Providers = None,
    threads: Threads = None,
    processes: Processes = 8,
    rounds: Rounds = None,
    compared: Samples = None,
    picture: Picture = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Measure in onnxruntime how fast MODEL loads and answers, and how much memory it takes; with data how well."""
    settings = ndonnx.load_recipe(recipe, **given(context))
    sizes = _whole_numbers(batch_sizes)

    from .baselines import print_baselines  # noqa: PLC0415 - rich is not for `--help`
    from .speed import print_speed  # noqa: PLC0415
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
        if speed.baselines is not None:
            print_baselines(speed.baselines)
    return DONE


def _whole_numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
        raise UsageError(f"--batch-sizes: expected whole numbers from 1 on, as 1,8,32; found {text!r}")
    return [int(part) for part in parts]
