"""`ndonnx search`: the trade-off curve."""

from __future__ import annotations

from pathlib import Path

import typer

import ndonnx
from ndonnx.errors import UsageError

from . import options
from .outcome import DONE, job, reached


def search(
    context: typer.Context,
    model: options.Model,
    data: options.Data = None,
    data_free: options.DataFree = False,
    eval_data: options.Eval = None,
    output: options.SearchFolder = None,
    recipe: options.RecipeFile = None,
    input_settings: options.InputSettings = None,
    shapes: options.Shapes = None,
    candidates: options.Candidates = None,
    target: options.Target = None,
    max_drop: options.MaxDrop = None,
    pareto: options.Pareto = 5,
    quality: options.Quality = None,
    solver: options.Solver = None,
    dry_run: options.DryRun = False,
    round_to: options.RoundTo = None,
    granularity: options.Granularity = None,
    cut: options.Cut = None,
    freeze: options.Freeze = None,
    init: options.Init = None,
    inputs: options.Inputs = None,
    candidate_steps: options.CandidateSteps = None,
    batch_size: options.BatchSize = None,
    lr: options.Lr = None,
    finetune_steps: options.SearchFinetuneSteps = None,
    samples: options.Samples = None,
    held_out: options.HeldOut = None,
    threshold: options.SearchThreshold = None,
    seed: options.Seed = None,
    workers: options.Workers = None,
    executor: options.Executor = None,
    device: options.Device = None,
    precision: options.Precision = None,
    cache_budget: options.CacheBudget = None,
    memory_budget: options.MemoryBudget = None,
    run_dir: options.RunDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Train students of many sizes, and write those of the best trade-offs between cost and quality."""
    table = {"steps": candidate_steps, "quality": quality, "solver": solver, "samples": held_out}
    settings = ndonnx.load_recipe(recipe, **options.given(context), search=table | {"candidates": candidates or None})
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
