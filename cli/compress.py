"""`ndonnx compress`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import ndonnx
from ndonnx.errors import UsageError

from . import options
from .outcome import job, verdict


def compress(
    context: typer.Context,
    model: options.Model,
    data: options.Data = None,
    data_free: options.DataFree = False,
    eval_data: options.Eval = None,
    output: Annotated[str | None, options.output("MODEL-student.onnx in this folder")] = None,
    recipe: options.RecipeFile = None,
    input_settings: options.InputSettings = None,
    shapes: options.Shapes = None,
    method: options.Method = None,
    keep: options.Keep = None,
    sparsity: options.Sparsity = None,
    swap: options.Swap = None,
    student: options.Student = None,
    round_to: options.RoundTo = None,
    granularity: options.Granularity = None,
    cut: options.Cut = None,
    freeze: options.Freeze = None,
    init: options.Init = None,
    target: options.Target = None,
    max_drop: options.MaxDrop = None,
    inputs: options.Inputs = None,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    lr: options.Lr = None,
    optimiser: options.Optimiser = None,
    warmup: options.Warmup = None,
    look_ahead: options.LookAhead = None,
    look_ahead_weights: options.LookAheadWeights = None,
    finetune_steps: options.FinetuneSteps = None,
    finetune_samples: options.FinetuneSamples = None,
    augment: options.Augment = None,
    finetune_lr: options.FinetuneLr = None,
    temperature: options.Temperature = None,
    label_weight: options.LabelWeight = None,
    threshold: options.Threshold = None,
    time_budget: options.TimeBudget = None,
    holdout: options.Holdout = None,
    samples: options.Samples = None,
    parity: options.Parity = None,
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
    """Write a smaller student of MODEL, distilled neighbourhood by neighbourhood."""
    settings = ndonnx.load_recipe(recipe, **options.given(context))
    if data is None and not settings.data_free and settings.inputs != "noise":
        raise UsageError(f"--data is missing: give {options.SOURCES}; --data-free works without data")
    student_path = Path(output) if output is not None else Path(f"{Path(model).stem}-student.onnx")
    folder = Path(run_dir) if run_dir is not None else student_path.with_suffix(".run")

    from .tables import print_json, print_report  # noqa: PLC0415 - rich is not for `--help`

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
    return verdict(report)
