"""`ndonnx harden`: a teacher that tolerates errors inside, so that its students may be worse."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import ndonnx
from ndonnx.config.panel import Panel
from ndonnx.errors import UsageError

from . import options
from .outcome import DONE, job
from .settings import Changed, given, option, takes

if TYPE_CHECKING:
    from ndonnx import HardenReport

Noise = Annotated[
    float | None,
    option(
        "--noise",
        "FRACTION",
        "Standard deviation of the noise, as a fraction of each activation's own.",
        "0.3",
        Panel.TRAIN,
    ),
]
Steps = Annotated[
    int | None,
    option(
        "--steps",
        "N",
        "Number of optimizer steps of the whole model.",
        "the recipe's finetune_steps, else 2000",
        Panel.TRAIN,
    ),
]


@takes(
    "granularity",
    "cut",
    "freeze",
    "batch_size",
    Changed(
        "finetune_lr",
        "Peak learning rate, relative to the root mean square of each weight. Default: 0.01.",
        flag="--lr",
    ),
    "warmup",
    "task",
    Changed("temperature", "Softmax temperature of the distillation loss."),
    Changed("label_weight", "Weight of the labels' cross-entropy in the loss; the distillation loss has the rest."),
    "holdout",
    Changed("finetune_samples", "Maximum number of training samples, drawn at random.", flag="--samples"),
    "parity",
    "seed",
    "executor",
    "ray_address",
    "device",
    "precision",
    "cache_budget",
    "memory_budget",
)
def harden(
    context: typer.Context,
    model: options.Model,
    data: options.Data = None,
    eval_data: options.Eval = None,
    output: Annotated[str | None, options.output("MODEL-hardened.onnx in this folder")] = None,
    recipe: options.RecipeFile = None,
    input_settings: options.InputSettings = None,
    shapes: options.Shapes = None,
    noise: Noise = None,
    harden_steps: Steps = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Train MODEL to answer the same with noise on its inner activations, before it is compressed."""
    settings = ndonnx.load_recipe(recipe, **given(context))
    if data is None:
        raise UsageError(f"--data is missing: give {options.SOURCES}")
    target = Path(output) if output is not None else Path(f"{Path(model).stem}-hardened.onnx")

    from .tables import print_json  # noqa: PLC0415 - rich is not for `--help`

    with job(quiet, verbose) as progress:
        stated = {} if noise is None else {"noise": noise}
        report = ndonnx.harden(
            model,
            data=data,
            steps=harden_steps,
            recipe=settings,
            output=target,
            eval_data=eval_data,
            progress=progress,
            **stated,
        ).report
    if json:
        print_json(report.to_json())
    else:
        _print(report)
    return DONE


def _print(report: HardenReport) -> None:
    """What noise did before and after, and what it cost without any."""
    from ndonnx.runtime.units import part_text, seconds_text  # noqa: PLC0415

    from .tables import make_console, nmse_text, plain  # noqa: PLC0415

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
