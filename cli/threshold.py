"""`ndonnx threshold`: how much error a model tolerates, and where."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import ndonnx
from ndonnx.errors import UsageError

from . import options
from .outcome import DONE, job
from .settings import given, option, takes

if TYPE_CHECKING:
    from ndonnx import ThresholdReport

Amplitudes = Annotated[
    str | None,
    option(
        "--amplitudes",
        "A,A",
        "Amplitudes of the noise, as fractions of each value's standard deviation.",
        "0.05,0.1,0.2,0.4,0.8,1.6",
    ),
]
Repeats = Annotated[int | None, option("--repeats", "N", "Number of draws of the noise at each amplitude.", "3")]
Multipliers = Annotated[
    str | None,
    option("--keep", "K,K", "Fractions of inner channels that untrained students keep, above 0 to 1.", "0.25,0.5,0.75"),
]
MaxDrop = Annotated[
    str, option("--max-drop", "DROP", "Loss of quality that one neighbourhood may cost, as 1% or 0.01.", "1%")
]
Samples = Annotated[
    int, option("--samples", "N", "Maximum number of samples on which the loss of quality is measured.", "2000")
]


@takes("granularity", "cut", "freeze", "simplify", "round_to", "seed", "cache_budget")
def threshold(
    context: typer.Context,
    model: options.Model,
    data: options.Data = None,
    output: Annotated[
        str | None,
        options.folder("Folder for figures, tables and the document.", "MODEL-threshold in this folder"),
    ] = None,
    recipe: options.RecipeFile = None,
    input_settings: options.InputSettings = None,
    shapes: options.Shapes = None,
    amplitudes: Amplitudes = None,
    repeats: Repeats = None,
    multipliers: Multipliers = None,
    tolerated: MaxDrop = "1%",
    held_out: Samples = 2000,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Measure how much error each neighbourhood of MODEL tolerates, and all together: with noise, and with students."""
    settings = ndonnx.load_recipe(recipe, **given(context))
    if data is None:
        raise UsageError(f"--data is missing: give {options.SOURCES}")
    target = Path(output) if output is not None else Path(f"{Path(model).stem}-threshold")
    sizes, keeps = _numbers("--amplitudes", amplitudes), _numbers("--keep", multipliers)

    from .tables import print_json  # noqa: PLC0415 - rich is not for `--help`

    with job(quiet, verbose) as progress:
        report = ndonnx.threshold(
            model,
            data=data,
            recipe=settings,
            samples=held_out,
            amplitudes=sizes,
            repeats=repeats,
            keep=keeps,
            max_drop=tolerated,
            output=target,
            progress=progress,
        )
    if json:
        print_json(report.to_json())
    else:
        _print(report, target)
    return DONE


def _numbers(flag: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{flag}: expected numbers, as 0.25,0.5; found {text!r}") from error


def _print(report: ThresholdReport, folder: Path) -> None:
    """What each neighbourhood tolerates and what its students lose; below, what noise at many places does."""
    from ndonnx.runtime.units import seconds_text  # noqa: PLC0415

    from .tables import nmse_text, print_text, table_of  # noqa: PLC0415

    multipliers = sorted({found.keep for found in report.width})
    drops = {(found.name, found.keep): found.drop for found in report.width}
    of_students = {found.name: found for found in report.student_tolerances}
    rows = []
    for found in report.tolerances:
        limits = (
            "" if one is None else f"over {nmse_text(one.largest)}" if one.nmse is None else nmse_text(one.nmse)
            for one in (found, of_students.get(found.name))
        )
        sensitivity = "" if found.sensitivity is None else nmse_text(found.sensitivity)
        lost = [drops.get((found.name, multiplier)) for multiplier in multipliers]
        rows.append((found.name, *limits, sensitivity, *("" if drop is None else f"{drop:.4f}" for drop in lost)))
    heads = [
        ">tolerates NMSE of noise",
        ">of students",
        ">sensitivity",
        *(f">drop at k={multiplier:g}" for multiplier in multipliers),
    ]
    print_text(table_of(["neighbourhood", *heads], rows))
    joint = [curve for curve in report.noise if curve.where != "one" and curve.scale == "relative"]
    if joint:
        amplitudes = [f">{point.amplitude:g}" for point in joint[0].points]
        told = [(curve.where, *(f"{point.drop:.4f}" for point in curve.points)) for curve in joint]
        print_text(table_of(["noise behind", *amplitudes], told))
    for name, reason in report.kept.items():
        print_text(f"{name}: not measured, {reason}")
    print_text(
        f"drops in {report.metric} on {report.samples} samples; each neighbourhood's NMSE is what costs "
        f"{report.max_drop:g}; took {seconds_text(report.seconds)}"
    )
    print_text(f"figures and tables written to {folder}")
