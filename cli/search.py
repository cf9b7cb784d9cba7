"""`ndonnx search`: the trade-off curve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import ndonnx
from ndonnx.errors import UsageError

from . import options
from .outcome import DONE, job, reached
from .settings import Changed, given, takes

Pareto = Annotated[
    int,
    typer.Option(
        "--pareto",
        metavar="N",
        min=0,
        help="Number of students on the trade-off curve. (default: 5)",
        show_default=False,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Tell what is in the library and what would be trained. (default: off)")
]


@takes(
    "search.candidates",
    Changed(
        "bits",
        "Bits of weights and activations: with 8 every candidate has a twin in 8 bits as well (width 0.5 + int8), for "
        "onnxruntime on CPUs, and the search chooses which pieces are in 8 bits.",
        "32",
    ),
    Changed(
        "target",
        "Fraction of the teacher's cost that the student is to have, with params, macs, size or latency as the cost "
        "(params=0.5).",
        "none, the trade-off curve alone",
    ),
    "max_drop",
    "search.quality",
    "search.solver",
    "round_to",
    "granularity",
    "cut",
    "freeze",
    "simplify",
    "init",
    "data_free",
    Changed(
        "inputs",
        "Training inputs of a neighbourhood: the teacher's activations (teacher), or those and then a closed-form fit "
        "on the students' (refit).",
        "teacher before a fine-tuning, else refit",
    ),
    "search.steps",
    "batch_size",
    "lr",
    Changed("finetune_steps", "Number of fine-tuning steps of each whole student against the teacher's outputs.", "0"),
    "samples",
    "search.samples",
    Changed(
        "threshold",
        "Error budgets of the neighbourhoods, a file that ndonnx threshold wrote: a student of --target or --max-drop "
        "beyond them is reported.",
        "no report",
    ),
    "seed",
    "workers",
    "executor",
    "ray_address",
    "device",
    "precision",
    "cache_budget",
    "memory_budget",
)
def search(
    context: typer.Context,
    model: options.Model,
    data: options.Data = None,
    eval_data: options.Eval = None,
    output: Annotated[
        str | None,
        options.folder("Folder for the students, table and picture.", "MODEL-search in this folder"),
    ] = None,
    recipe: options.RecipeFile = None,
    input_settings: options.InputSettings = None,
    shapes: options.Shapes = None,
    pareto: Pareto = 5,
    dry_run: DryRun = False,
    run_dir: options.RunDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Train students of many sizes, and write those of the best trade-offs between cost and quality."""
    settings = ndonnx.load_recipe(recipe, **given(context))
    if data is None and not settings.data_free:
        raise UsageError(f"--data is missing: give {options.SOURCES}; --data-free works without data")
    folder = Path(output) if output is not None else Path(f"{Path(model).stem}-search")
    kept = Path(run_dir) if run_dir is not None else folder.with_name(f"{folder.name}.run")

    from .curve import print_search  # noqa: PLC0415 - rich is not for `--help`
    from .tables import print_json  # noqa: PLC0415

    with job(quiet, verbose, kept) as progress:
        result = ndonnx.search(
            model,
            data=data,
            recipe=settings,
            output=folder,
            pareto=pareto,
            eval_data=eval_data,
            run_dir=kept,
            dry_run=dry_run,
            progress=progress,
        )
    if json:
        print_json(result.report.to_json())
    else:
        print_search(result.report, dry_run=dry_run)
    return DONE if dry_run else reached(result.missed)
