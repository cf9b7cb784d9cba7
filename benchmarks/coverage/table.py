"""The findings as people read them: a table in Markdown, the failures by operator, what is kept, a summary."""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common import percent
from benchmarks.coverage.findings import Coverage, Failure

SMALLEST_RATIO, LARGEST_RATIO = 0.35, 0.70
"""Share of the distillable weights that a student of half the width should have."""
_COLUMNS = (
    "model", "opens", "partition s", "nodes", "distillable", "weights", "largest", "parity", "trains", "identity",
    "student", "batch", "interface", "k=0.5", "failures",
)  # fmt: skip
_OPERATOR = re.compile(r"([A-Z]\w*) '[^']*': ")
_NAMES = re.compile(r"(?<!\w)'[^']*'|\b\d+(\.\d+)?(e-?\d+)?\b|\bn\d+\b")
"""What differs between failures of one cause: names and numbers."""


@dataclass(frozen=True)
class Cause:
    """Failures that are likely one: same stage, same operator, same words."""

    stage: str
    operator: str
    words: str
    count: int
    models: tuple[str, ...]
    example: str


def markdown(found: Sequence[Coverage]) -> str:
    """One row for each model; `-` where something was not measured."""
    rows = [_COLUMNS, *(_row(c) for c in found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(_padded(row, widths))} |" for row in (_COLUMNS, rule, *rows[1:]))


def causes(found: Sequence[Coverage]) -> list[Cause]:
    """Failures by cause, most frequent first."""
    grouped: dict[tuple[str, str, str], list[tuple[str, Failure]]] = defaultdict(list)
    for c in found:
        for failure in c.failures:
            operator = _OPERATOR.match(failure.reason)
            words = _NAMES.sub("~", failure.reason[operator.end() if operator else 0 :])
            grouped[failure.stage, operator[1] if operator else "", words[:160]].append((c.model, failure))
    made = [
        Cause(*key, len(cases), tuple(dict.fromkeys(model for model, _ in cases)), _told(*cases[0]))
        for key, cases in grouped.items()
    ]
    return sorted(made, key=lambda cause: -cause.count)


def kept_lines(found: Sequence[Coverage]) -> Iterator[str]:
    """Pieces with weights that are kept, by reason: how many, and the largest of them."""
    reasons = Counter(_NAMES.sub("~", piece.reason) for c in found for piece in c.kept)
    for reason, count in reasons.most_common():
        share, model, piece = max(
            ((p.share, c.model, p) for c in found for p in c.kept if _NAMES.sub("~", p.reason) == reason),
            key=lambda entry: entry[0],
        )
        operators = ", ".join(piece.operators[:6])
        yield f"kept {count} x: {reason}; largest: {model} {piece.name}, {percent(share)} of its weights ({operators})"


def summary(found: Sequence[Coverage]) -> dict[str, Any]:
    """Medians and extremes over the models, and how many passed every check."""
    shares = [c.share for c in found if c.share is not None]
    ratios = [c.ratio for c in found if c.ratio is not None]
    return {
        "models": len(found),
        "open": sum(c.opens for c in found),
        "clean": sum(c.clean for c in found),
        "share_median": statistics.median(shares) if shares else None,
        "share_min": min(shares, default=None),
        "largest_median": statistics.median(c.largest or 0.0 for c in found) if found else None,
        "slices": sum(c.distillable for c in found),
        "slices_at_parity": sum(c.parity for c in found),
        "slices_that_train": sum(c.trains for c in found),
        "slices_distilled": sum(c.distilled or 0 for c in found),
        "identity": sum(c.identity is True for c in found),
        "respliced": sum(c.respliced is True for c in found),
        "student_runs": sum(c.student_runs is True for c in found),
        "interface": sum(c.interface is True for c in found),
        "ratio_median": statistics.median(ratios) if ratios else None,
        "ratio_in_range": sum(SMALLEST_RATIO <= ratio <= LARGEST_RATIO for ratio in ratios),
        "ratios": len(ratios),
        "seconds_to_partition_max": max((c.seconds_to_partition or 0.0 for c in found), default=None),
    }


def summary_line(s: dict[str, Any]) -> str:
    """The summary as a sentence."""
    return (
        f"{s['models']} models, {s['open']} open, {s['clean']} without any failure; distillable weights: median "
        f"{percent(s['share_median'])}, least {percent(s['share_min'])}; largest piece: median "
        f"{percent(s['largest_median'])}; of {s['slices']} slices {s['slices_at_parity']} at parity, "
        f"{s['slices_that_train']} train, {s['slices_distilled']} distilled; identity exact {s['identity']}, own "
        f"slices exact {s['respliced']}, students run {s['student_runs']}, interface kept {s['interface']}; k=0.5 "
        f"leaves {percent(s['ratio_median'])} (median), {s['ratio_in_range']} of {s['ratios']} between "
        f"{SMALLEST_RATIO:.0%} and {LARGEST_RATIO:.0%}"
    )


def _row(c: Coverage) -> tuple[str, ...]:
    return (
        c.model,
        _mark(c.opens),
        "-" if c.seconds_to_partition is None else f"{c.seconds_to_partition:.2f}",
        str(c.nodes),
        f"{c.distillable} of {c.neighbourhoods}",
        _part(c.share),
        _part(c.largest),
        f"{c.parity}/{c.distillable}",
        f"{c.trains}/{c.distillable}",
        _mark(None if c.respliced is None else c.respliced and c.identity is not False),
        _mark(c.student_runs),
        _mark(c.other_batch),
        _mark(c.interface),
        _part(c.ratio),
        str(len(c.failures)),
    )


def _padded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]


def _mark(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "NO"


def _part(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _told(model: str, failure: Failure) -> str:
    operators = f" [{', '.join(failure.operators[:6])}]" if failure.operators else ""
    return f"{model} {failure.where}: {failure.reason}{operators}"
