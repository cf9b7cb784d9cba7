"""`ndonnx report`: finished runs as a page and as a table."""

from __future__ import annotations

from typing import Annotated

import typer

import ndonnx

from . import options
from .outcome import DONE, job
from .settings import Changed, given, takes

Runs = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN...", help="Run directories, or their report.json; several are compared.", show_default=False
    ),
]
Output = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="FILE.html", help="Where the page goes. (default: beside report.json)"),
]
_BASELINES = (
    "Models to make and measure now, beside each student, and to add to its report: onnxruntime's INT8 with calibrated "
    "ranges (`int8`), with ranges found at every run (`dynamic`), half precision (`fp16`), separated by commas."
)


@takes(Changed("baselines", _BASELINES))
def report(
    context: typer.Context,
    runs: Runs,
    output: Output = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Write a finished RUN as one HTML file that a reviewer can read and sign, and as a Markdown table beside it."""
    settings = ndonnx.load_recipe(**given(context))

    from .tables import print_text  # noqa: PLC0415 - rich is not for `--help`

    with job(quiet, verbose) as progress:
        written = ndonnx.write_report(*runs, output=output, baselines=settings.baselines, progress=progress)
    print_text(f"report written to {written.html}\nfor a pull request {written.markdown}")
    return DONE
