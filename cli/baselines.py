"""The table of `--baselines`: teacher, student, and what there is without this library."""

from __future__ import annotations

import ndonnx
from ndonnx.runtime.units import bytes_text

from .tables import measured, milliseconds_text, print_text, table_of


def print_baselines(found: ndonnx.Baselines) -> None:
    """A row for each model, then how the times were taken."""
    teacher = found.rows[0]
    columns = ("model", ">bytes", ">of the teacher's", ">p50", ">of the teacher's", "fidelity", "how, or why not")
    print_text(table_of(columns, [_row(row, teacher) for row in found.rows]))
    threads = f"{found.threads} thread{'s' * (found.threads != 1)}"
    print_text(f"timed by turns in {found.processes} processes with {threads}, batches of {found.batch_size}")


def _row(row: ndonnx.BaselineRow, teacher: ndonnx.BaselineRow) -> tuple[str, ...]:
    size = "" if row.bytes is None else bytes_text(row.bytes)
    share = "" if row.bytes is None or not teacher.bytes else f"{row.bytes / teacher.bytes:.2f}"
    speed, ratio = "", ""
    if row.speed is not None:
        speed = milliseconds_text(row.speed.latency.p50_ms)
        if (over := row.speed.ratio) is not None:
            ratio = f"{over.median:.2f} ({over.low:.2f} to {over.high:.2f})"
    told = [] if row.fidelity is None else measured(row.fidelity)
    words = "; ".join(f"{name}: {value}" for name, value in told[:_MEASURES])
    return row.name, size, share, speed, ratio, words, row.reason or row.how or ""


_MEASURES = 2
"""Measures that are told of a model; JSON tells all."""
