"""`ndonnx compress`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import ndonnx
from ndonnx.errors import UsageError

from . import options
from .outcome import interruptible, results_only, verdict


def compress(
    model: options.Model,
    data: options.Data = None,
    data_free: options.DataFree = False,
    eval_data: options.Eval = None,
    output: Annotated[str | None, options.output("MODEL-student.onnx in this folder")] = None,
    recipe: options.RecipeFile = None,
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
    run_dir: options.RunDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Write a smaller student of MODEL, distilled neighbourhood by neighbourhood."""
    settings = ndonnx.load_recipe(
        recipe,
        method=method,
        keep=keep,
        sparsity=sparsity,
        swap=swap or None,
        student=student,
        round_to=round_to,
        granularity=granularity,
        cut=cut or None,
        freeze=freeze or None,
        init=init,
        target=target or None,
        max_drop=max_drop,
        data_free=data_free or None,
        inputs=inputs,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        optimiser=optimiser,
        warmup=warmup,
        look_ahead=look_ahead,
        look_ahead_weights=look_ahead_weights or None,
        finetune_steps=finetune_steps,
        finetune_samples=finetune_samples,
        augment=augment,
        finetune_lr=finetune_lr,
        temperature=temperature,
        label_weight=label_weight,
        threshold=threshold,
        time_budget=time_budget,
        holdout=holdout,
        samples=samples,
        parity=parity,
        seed=seed,
        workers=workers,
        executor=executor,
        device=device,
        precision=precision,
        cache_budget=cache_budget,
    )
    if data is None and not settings.data_free and settings.inputs != "noise":
        raise UsageError(f"--data is missing: give {options.SOURCES}; --data-free works without data")
    student_path = Path(output) if output is not None else Path(f"{Path(model).stem}-student.onnx")
    folder = Path(run_dir) if run_dir is not None else student_path.with_suffix(".run")

    from .progress import telling  # noqa: PLC0415 - rich's bars are not for `--help`
    from .tables import print_json, print_report  # noqa: PLC0415

    with interruptible(folder), results_only(), telling(quiet, verbose) as progress:
        progress.stage("start")  # what is imported now takes seconds
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
