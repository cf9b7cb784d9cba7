"""Flags that several commands have and that are no keys of a recipe: files in, files out, what is printed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ndonnx.config.panel import Panel

from .settings import TELL, option

SOURCES = "a .npz, .npy or .parquet file, a directory of images, or module:function"

Model = Annotated[str, typer.Argument(metavar="MODEL", help="The ONNX file; never modified.", show_default=False)]

# What goes in and out
Data = Annotated[
    str | None, typer.Option("--data", metavar="SRC", help=f"Inputs to run on: {SOURCES}; leaves makes pictures up.")
]
Eval = Annotated[
    str | None,
    option(
        "--eval",
        "SRC",
        "Data for the final comparison; labels give accuracy.",
        "samples of --data that nothing else sees",
    ),
]
RecipeFile = Annotated[
    str | None, typer.Option("--recipe", metavar="FILE.toml", help="Recipe; a flag goes before what it says.")
]
InputSettings = Annotated[
    list[str] | None,
    option(
        "--input",
        "NAME=VALUE",
        "Value that an input has for all samples (sr=16000, scales=0.6,1,0.8), or with NAME:axis=1 the axis of its "
        "samples. Repeatable.",
        "as the data have it",
    ),
]
Shapes = Annotated[
    list[str] | None,
    option(
        "--shape",
        "NAME=N,N",
        "Sizes of an input that the model leaves open, for synthetic data, costs and timings. Repeatable.",
        "found by trying",
    ),
]
RunDir = Annotated[
    str | None,
    option(
        "--run-dir",
        "DIR",
        "Directory in which the run keeps its state, to continue from.",
        "beside the output",
        Panel.RUN,
    ),
]

# What it tells
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.", rich_help_panel=TELL)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.", rich_help_panel=TELL)]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Also tell how long each stage took, and more steps.", rich_help_panel=TELL),
]


def output(default: str) -> Any:
    """`-o FILE.onnx`, where the student goes."""
    return typer.Option(
        "--output", "-o", metavar="FILE.onnx", help=f"Where the student is written. (default: {default})"
    )


def folder(text: str, default: str) -> Any:
    """`-o DIR`, where a command writes several files."""
    return typer.Option("--output", "-o", metavar="DIR", help=f"{text} (default: {default})")
