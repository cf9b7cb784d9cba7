"""How near a student is to its teacher, in the measure of each output's task, with samples and interval."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ndonnx.distill.tasks.intervals import of_part
from ndonnx.report.receipt.document import at, number, text
from ndonnx.report.receipt.words import digits_text, part_text, range_text

Line = tuple[str, str, str, str]
"""What is measured, its value, its 95% interval, and the number of samples."""


def main_measure(evaluation: Any) -> str:
    """One evaluation in a few words: accuracy where there is one, and the first output's own measure."""
    told = [f"{name} {value}" for name, value, _, _ in lines(evaluation)]
    return ", ".join(told[:2])


def lines(evaluation: Any) -> Iterator[Line]:
    """A line for each measure that an evaluation holds: accuracy, then each output's, then the user's own."""
    samples = number(at(evaluation, "samples"))
    count = "" if samples is None else f"{samples:.0f}"
    accuracy = number(at(evaluation, "accuracy"))
    if accuracy is not None:
        yield "accuracy", part_text(accuracy), _of_part(accuracy, samples), count
    outputs = at(evaluation, "outputs")
    named = outputs if isinstance(outputs, Mapping) else {}
    for name, found in named.items():
        where = f" of '{name}'" if len(named) > 1 else ""
        yield from ((f"{measure}{where}", value, interval, count) for measure, value, interval in _output(found))
    own = number(at(evaluation, "metric"))
    if own is not None:
        yield "own metric", digits_text(own, 4), "", count


def _output(found: Any) -> Iterator[tuple[str, str, str]]:
    """The measures of one output; the interval is of the first."""
    agreement, cosine, nmse = (number(at(found, key)) for key in ("agreement", "cosine", "nmse"))
    ends = at(found, "interval")
    low, high = ends if isinstance(ends, list) and len(ends) == 2 else (None, None)
    distances = at(found, "distances")
    for name, value in distances.items() if isinstance(distances, Mapping) else ():
        yield text(name), digits_text(value), range_text(digits_text(low), digits_text(high))
    if agreement is not None:
        yield "agreement", part_text(agreement), range_text(part_text(low), part_text(high))
        yield "divergence (nats)", digits_text(at(found, "kl")), ""
    elif cosine is not None:
        yield "cosine", digits_text(cosine, 4), range_text(digits_text(low, 4), digits_text(high, 4))
    if nmse is not None:
        interval = (
            range_text(digits_text(low), digits_text(high))
            if agreement is None and cosine is None and not distances
            else ""
        )
        yield "NMSE", digits_text(nmse), interval


def _of_part(part: float, samples: float | None) -> str:
    if not samples or not 0 <= part <= 1:
        return ""
    return range_text(*map(part_text, of_part(part, int(samples))))


def tasks(evaluation: Any) -> str:
    """What the outputs were taken for."""
    outputs = at(evaluation, "outputs")
    named = outputs if isinstance(outputs, Mapping) else {}
    return ", ".join(f"'{name}': {text(at(found, 'task'))}" for name, found in named.items())
