"""Charts of a run as inline SVG, which take their ink from the page: one set serves light, dark and paper."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from ndonnx.report.drawing import shorten
from ndonnx.report.receipt.document import RunDocument, at, number, text
from ndonnx.report.receipt.html import Markup, tag

_INK = "#010203"
"""Stands for the page's own ink while a chart is drawn."""
_STUDENT, _OTHER, _LINES = "#0b9a92", "#8a929b", "#6b8fb3"
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ndonnx",
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "font.size": 9,
    "font.family": "sans-serif",
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_MOST_CURVES = 200
_LONGEST = 30
"""Letters of a name."""
_LEAST_NMSE = 1e-12
"""What an error of nothing is drawn as on a logarithmic axis."""

Draw = Callable[[Axes], None]


def charts(run: RunDocument, prefix: str) -> list[Markup]:
    """All charts that a run has numbers for, each in a `figure`.

    Args:
        run: the report.
        prefix: begins the names of the charts' parts; unique on the page.
    """
    told = (
        (
            _latencies(run),
            "Median time of one batch, all models timed by turns; the lines are 95% intervals of the ratio.",
        ),
        (_curves(run), "Held-out error (NMSE) of each neighbourhood while it was trained."),
        (_finetuning(run), "Held-out error (NMSE) of the whole student while it was fine-tuned."),
        (_seconds(run), "Where the time went."),
    )
    drawn = ((draw, size, words) for (draw, size), words in told if draw is not None)
    return [
        tag("figure", _svg(draw, size, f"{prefix}{i}-", words), tag("figcaption", words))
        for i, (draw, size, words) in enumerate(drawn)
    ]


_Sized = tuple[Draw | None, tuple[float, float]]
_NONE: _Sized = None, (0, 0)


def _svg(draw: Draw, size: tuple[float, float], prefix: str, title: str) -> Markup:
    """A chart as an `svg` element whose names begin with the prefix and whose ink is the page's."""
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        stream = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    whole = stream.getvalue()
    drawn = whole[whole.index("<svg") :].replace(_INK, "currentColor")
    drawn = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", drawn)
    drawn = re.sub(r'^<svg ([^>]*?)width="[^"]*"', r"<svg \1", drawn)
    drawn = re.sub(r'^<svg ([^>]*?)height="[^"]*"', rf'<svg role="img" aria-label="{title}" \1', drawn)
    return Markup(re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL))


def _plain(name: str) -> str:
    """A name that no drawing takes for anything else: without control characters, not hidden from a legend."""
    told = "".join(c if c.isprintable() else "\ufffd" for c in shorten(name, _LONGEST))
    return f"\u200b{told}" if told.startswith("_") else told


def _latencies(run: RunDocument) -> _Sized:
    rows = [row for row in run.rows("baselines", "rows") if number(at(row, "speed", "latency", "p50_ms"))]
    if not rows:
        return _NONE
    times = [number(at(row, "speed", "latency", "p50_ms")) or 0.0 for row in rows]

    def draw(axes: Axes) -> None:
        colours = [_STUDENT if text(row.get("name")) == "student" else _OTHER for row in rows]
        axes.barh(range(len(rows)), times, color=colours, xerr=_reach(rows, times[0]), ecolor=_INK, capsize=3)
        axes.set_yticks(range(len(rows)), [_plain(text(row.get("name"))) for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds")

    return draw, (5.4, 0.8 + 0.36 * len(rows))


def _reach(rows: Sequence[object], teacher: float) -> list[list[float]]:
    """How far each bar's interval goes down and up: that of its ratio, in the teacher's time."""
    found = []
    for row in rows:
        ends = [number(at(row, "speed", "ratio", end)) for end in ("low", "median", "high")]
        low, median, high = (end if end is not None else 0.0 for end in ends)
        found.append((teacher * max(0.0, median - low), teacher * max(0.0, high - median)))
    return [list(side) for side in zip(*found, strict=True)]


def _curves(run: RunDocument) -> _Sized:
    curves = [(text(row.get("name")), _points(row.get("curve"))) for row in run.rows("neighbourhoods")]
    told = [(name, points) for name, points in curves if len(points) > 1][:_MOST_CURVES]
    if not told:
        return _NONE
    few = len(told) <= _NAMED

    def draw(axes: Axes) -> None:
        for i, (name, points) in enumerate(told):
            colour = mpl.colormaps["viridis"](0.15 + 0.7 * i / max(1, len(told) - 1))
            axes.plot(*zip(*points, strict=True), color=colour, lw=1.2, label=_plain(name) if few else None)
        _on_steps(axes)
        if few:
            axes.legend(frameon=False, fontsize=7, ncols=2)

    return draw, (5.4, 3.0)


_NAMED = 12
"""Most curves that a legend names."""


def _finetuning(run: RunDocument) -> _Sized:
    points = _points(run.at("finetune", "curve"))
    if len(points) < 2:
        return _NONE

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*points, strict=True), color=_STUDENT, lw=1.4)
        _on_steps(axes)

    return draw, (5.4, 3.0)


def _on_steps(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_Digits())
    axes.yaxis.set_minor_formatter(_Digits())
    axes.set_xlabel("step")
    axes.set_ylabel("NMSE")
    axes.grid(True, which="major", alpha=0.2, color=_INK)


class _Digits(LogFormatter):
    """Three digits at every mark that a logarithmic axis names; one alone would be the same on neighbouring marks."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:.3g}" if super().__call__(x, pos) else ""


def _points(curve: object) -> list[tuple[float, float]]:
    """Points of a curve that can be drawn on a logarithmic axis."""
    return list(_drawn(curve)) if isinstance(curve, list) else []


def _drawn(curve: Sequence[object]) -> Iterator[tuple[float, float]]:
    for point in curve:
        if isinstance(point, list) and len(point) == 2:
            step, error = map(number, point)
            if step is not None and error is not None and error >= 0:
                yield step, max(error, _LEAST_NMSE)


def _seconds(run: RunDocument) -> _Sized:
    stages = run.at("seconds")
    named = {str(name): number(spent) or 0.0 for name, spent in stages.items() if name != "total"}
    told = {name: spent for name, spent in named.items() if spent > 0}
    if not told:
        return _NONE

    def draw(axes: Axes) -> None:
        axes.barh(range(len(told)), list(told.values()), color=_LINES)
        axes.set_yticks(range(len(told)), [_plain(name) for name in told])
        axes.invert_yaxis()
        axes.set_xlabel("seconds")

    return draw, (5.4, 0.8 + 0.28 * len(told))
