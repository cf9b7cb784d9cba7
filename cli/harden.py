"""`ndonnx harden`: a teacher that bears errors inside, so that its students may be worse."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import ndonnx
from ndonnx.errors import UsageError

from . import options
from .outcome import DONE, job

if TYPE_CHECKING:
    from ndonnx import HardenReport


def harden(
    context: typer.Context,
    model: options.Model,
    data: options.Data = None,
    eval_data: options.Eval = None,
    output: Annotated[str | None, options.output("MODEL-hardened.onnx in this folder")] = None,
    recipe: options.RecipeFile = None,
    input_settings: options.InputSettings = None,
    shapes: options.Shapes = None,
    granularity: options.Granularity = None,
    cut: options.Cut = None,
    freeze: options.Freeze = None,
    noise: options.Noise = None,
    harden_steps: options.HardenSteps = None,
    batch_size: options.BatchSize = None,
    finetune_lr: options.HardenLr = None,
    warmup: options.Warmup = None,
    temperature: options.Temperature = None,
    label_weight: options.LabelWeight = None,
    holdout: options.Holdout = None,
    finetune_samples: options.HardenSamples = None,
    parity: options.Parity = None,
    seed: options.Seed = None,
    executor: options.Executor = None,
    device: options.Device = None,
    precision: options.Precision = None,
    cache_budget: options.CacheBudget = None,
    memory_budget: options.MemoryBudget = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Train MODEL to answer the same with noise on its inner activations, before it is compressed."""
    settings = ndonnx.load_recipe(recipe, **options.given(context))
    if data is None:
        raise UsageError(f"--data is missing: give {options.SOURCES}")
    target = Path(output) if output is not None else Path(f"{Path(model).stem}-hardened.onnx")

    from .tables import print_json  # noqa: PLC0415 - rich is not for `--help`

    with job(quiet, verbose) as progress:
        given = {} if noise is None else {"noise": noise}
        report = ndonnx.harden(
            model,
            data=data,
            steps=harden_steps,
            recipe=settings,
            output=target,
            eval_data=eval_data,
            progress=progress,
            **given,
        ).report
    if json:
        print_json(report.to_json())
    else:
        _print(report)
    return DONE


def _print(report: HardenReport) -> None:
    """What noise did before and after, and what it cost without any."""
    from .tables import make_console, nmse_text, part_text, plain, seconds_text  # noqa: PLC0415

    lines = [
        f"noise of {report.noise:g} of the deviation on {len(report.values)} activations, {report.steps} steps, "
        f"{seconds_text(report.seconds)}",
        f"validation loss under noise: {nmse_text(report.loss_start)} → {nmse_text(report.loss)}, "
        f"NMSE of the output {nmse_text(report.nmse_start)} → {nmse_text(report.nmse)}",
    ]
    before, after = report.metrics["teacher"], report.metrics["hardened"]
    if before.accuracy is not None and after.accuracy is not None:
        lines.append(f"accuracy without noise: {part_text(before.accuracy)} → {part_text(after.accuracy)}")
    if after.agreement is not None:
        lines.append(f"agreement with the teacher without noise: {part_text(after.agreement)}")
    elif after.nmse is not None:
        lines.append(f"NMSE against the teacher without noise: {nmse_text(after.nmse)}")
    lines.append(f"hardened model written to {report.output}")
    console = make_console()
    for line in lines:
        console.out(plain(line), highlight=False)
