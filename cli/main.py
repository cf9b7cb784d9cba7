"""The command `ndonnx`: its sub-commands, and what becomes of their errors."""

from __future__ import annotations

import io
import itertools
import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.main import get_command

import ndonnx
from ndonnx.errors import NdonnxError, SearchError, UsageError

from .benchmark import benchmark
from .compress import compress
from .demo import demo
from .evaluate import evaluate
from .harden import harden
from .inspect import inspect
from .outcome import BAD_INPUT, BUG, DONE, INTERRUPTED, TARGET_MISSED, Interrupted
from .report import report
from .search import search
from .threshold import threshold

_COMPLETING = "_NDONNX_COMPLETE"
_COMMANDS = (compress, inspect, evaluate, benchmark, search, threshold, harden, report)


def _start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> int:
    """Make a trained ONNX model smaller and faster without its training code, by neighbourhood distillation."""
    if version:
        print(f"ndonnx {ndonnx.__version__}")
        raise typer.Exit(DONE)
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(BAD_INPUT)
    return DONE


def build_app(asked: str | None = None) -> typer.Typer:
    """The command `ndonnx` with all its flags, those of the settings that are declared when it is called among them.

    Args:
        asked: the one sub-command whose flags are needed; the others can only be listed. None: all.
    """
    made = typer.Typer(
        context_settings={"help_option_names": ["-h", "--help"]},
        invoke_without_command=True,
    )
    made.callback()(_start)
    for command in _COMMANDS:
        wanted = asked is None or command.function.__name__ == asked
        made.command()(command.build() if wanted else command.listed())
    made.command()(demo)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; only a bug leaves with an exception.

    Args:
        arguments: what stands behind `ndonnx`. None: the arguments of this process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name must not end a run because a terminal lacks a letter
    # Without a handler, Python prints what libraries warn of; what matters of it, the commands say themselves.
    if not logging.getLogger().handlers:
        logging.getLogger().addHandler(logging.NullHandler())
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        _load_methods(arguments)
        completed = _COMPLETING in os.environ  # the shell asks, and what it asks about stands in other variables
        asked = None if completed else next((text for text in arguments if not text.startswith("-")), "")
        return get_command(build_app(asked)).main(arguments, prog_name="ndonnx", standalone_mode=False) or DONE
    except (typer.TyperException, NdonnxError, MemoryError) as error:
        return _fail(*_told(error))
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        return INTERRUPTED


def _load_methods(arguments: Sequence[str]) -> None:
    """Import the student methods that are named on the line, so that the settings that they declare are flags too."""
    named = [after for flag, after in itertools.pairwise(arguments) if flag == "--method"]
    named += [text.removeprefix("--method=") for text in arguments if text.startswith("--method=")]
    if named:
        ndonnx.load_methods(named)


def _told(error: typer.TyperException | NdonnxError | MemoryError) -> tuple[str, int]:
    """What is said of an error, and the exit code."""
    if isinstance(error, typer.TyperException):
        return f"{error.format_message()} (see --help)", BAD_INPUT
    if isinstance(error, MemoryError):
        told = f" ({error})" if str(error) else ""
        return f"there is too little memory for this{told}; give it more, or a smaller --batch-size", BAD_INPUT
    code = TARGET_MISSED if isinstance(error, SearchError) else BAD_INPUT if isinstance(error, UsageError) else BUG
    return str(error), code


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())
    # What a hostile file holds must not reach the terminal as a control sequence.
    print("error: " + "".join(c if c.isprintable() else repr(c)[1:-1] for c in line), file=sys.stderr)
    return code
