"""A benchmark drawn: latency over batch sizes, and below it the ratio of the two models."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ndonnx.metrics.latency import Latency, ProviderSpeed
from ndonnx.report.drawing import shorten
from ndonnx.report.speed import Speed, check_picture
from ndonnx.runtime.atomic import atomic_write

_MODEL, _AGAINST = "#0b7a75", "#8a8f98"
_LONGEST = 40
"""Letters of a model's path."""


def write(speed: Speed, path: Path) -> None:
    """Draw and write it, whole or not at all.

    Raises:
        UsageError: as `check_picture`, or the system refused.
    """
    check_picture(path)
    figure = draw(speed)
    atomic_write(path, lambda temporary: figure.savefig(temporary, dpi=150))


def draw(speed: Speed) -> Figure:
    """One column for each provider: latency above, the ratio below where there are two models."""
    compared = speed.against is not None
    columns = len(speed.providers)
    figure = Figure(figsize=(5.2 * columns, 6.4 if compared else 4.2), layout="constrained")
    grid = figure.subplots(
        2 if compared else 1, columns, squeeze=False, sharex="col", height_ratios=[3, 2] if compared else None
    )
    for column, provider in enumerate(speed.providers):
        _latencies(grid[0][column], speed, provider)
        if compared:
            _ratios(grid[1][column], speed, provider)
        _batch_axis(grid[-1][column], provider)
    return figure


def _latencies(axes: Axes, speed: Speed, provider: ProviderSpeed) -> None:
    sizes = [timing.batch_size for timing in provider.batches]
    lines: list[tuple[str, str, list[Latency]]] = [
        (speed.model.path, _MODEL, [timing.model for timing in provider.batches])
    ]
    if speed.against is not None:
        others = [timing.against for timing in provider.batches if timing.against is not None]
        lines.insert(0, (speed.against.path, _AGAINST, others))
    for name, colour, found in lines:
        axes.plot(sizes, [entry.p50_ms for entry in found], "o-", color=colour, label=_plain(name))
        axes.fill_between(
            sizes, [entry.p50_ms for entry in found], [entry.p95_ms for entry in found], color=colour, alpha=0.18, lw=0
        )
    axes.set_yscale("log")
    axes.set_ylabel("milliseconds per run, p50 to p95")
    axes.set_title(f"{provider.provider}, {speed.threads} thread{'s' if speed.threads > 1 else ''}")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(frameon=False)


def _ratios(axes: Axes, speed: Speed, provider: ProviderSpeed) -> None:
    told = [(timing.batch_size, timing.ratio) for timing in provider.batches if timing.ratio is not None]
    middle = [found.median for _, found in told]
    reach = [[found.median - found.low for _, found in told], [found.high - found.median for _, found in told]]
    axes.errorbar([size for size, _ in told], middle, yerr=reach, fmt="o", color=_MODEL, capsize=4, label="time")
    share = speed.share("macs")
    if share is not None:
        axes.axhline(share, color=_MODEL, ls="--", lw=1, label="MACs")
    axes.axhline(1, color=_AGAINST, lw=1)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("share of the other model's")
    axes.grid(True, alpha=0.25)
    axes.legend(frameon=False, loc="lower right")


def _batch_axis(axes: Axes, provider: ProviderSpeed) -> None:
    sizes = [timing.batch_size for timing in provider.batches]
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("batch size")


def _plain(name: str) -> str:
    """A path as it is: neither mathematics between dollars, nor hidden from the legend by a first underscore."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in shorten(name, _LONGEST)).replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text
