"""The table of `ndonnx evaluate --require`: what was required, what was found, and whether that is enough."""

from __future__ import annotations

import ndonnx
from ndonnx.runtime.units import part_text

from .tables import metric_text, print_text, table_of

_PARTS = ("accuracy", "agreement", "drop")
"""Measures that are told as percentages."""


def print_requirements(found: ndonnx.Evaluation) -> None:
    """A row for each requirement, then one line of how many fell short; nothing where nothing was required."""
    if not found.requirements:
        return
    print_text(table_of(("required", ">found", ">95% interval", "kept"), map(_row, found.requirements)))
    fell = len(found.missed)
    print_text(f"{fell} of {len(found.requirements)} requirements not kept" if fell else "all requirements kept")


def _row(verdict: ndonnx.Verdict) -> tuple[str, str, str, str]:
    text = part_text if verdict.measure in _PARTS else metric_text
    interval = "" if verdict.interval is None else " to ".join(map(text, verdict.interval))
    where = "" if verdict.output is None else f" ('{verdict.output}')"
    return verdict.requirement + where, text(verdict.found), interval, "yes" if verdict.kept else "NO"
