"""What a threshold study leaves in its folder: one JSON document, a CSV for each figure, and the pictures."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ndonnx.errors import RunDirError
from ndonnx.metrics.sensitivity import DOCUMENT, Curve, Point, ThresholdReport
from ndonnx.runtime.atomic import atomic_write, atomic_write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DROPS = {
    "accuracy": "drop in accuracy",
    "agreement": "disagreement with the teacher",
    "nmse": "NMSE of the outputs",
}
_JOINT = {"half": ("half of them", "#d98e04"), "all": ("all", "#c0392b")}
_MEAN = "#1f6f4a"
_THIN = {"color": "#8a8f98", "linewidth": 0.8, "alpha": 0.6}
_DPI = 140
_MOST_NAMES = 40
"""Neighbourhoods on an axis, beyond which their names are left out."""
_LEAST_SHOWN = 1e-5
"""NMSE below which a student is the teacher but for rounding."""

Row = Sequence[str | int | float | None]


def write_threshold(report: ThresholdReport, folder: Path) -> ThresholdReport:
    """Write everything into a folder, each file whole or not at all; the report, with the names of the files.

    Raises:
        RunDirError: the folder cannot be written.
    """
    tables = {
        "noise.csv": _noise_rows(report),
        "weights.csv": _weight_rows(report),
        "width.csv": _width_rows(report),
        "tolerances.csv": _tolerance_rows(report),
    }
    pictures = {"noise.png": _draw_noise, "weights.png": _draw_weights, "width.png": _draw_width}
    report = replace(report, files=(DOCUMENT, *tables, *pictures))
    for name, rows in tables.items():
        atomic_write(folder / name, _csv(rows))
    for name, draw in pictures.items():
        atomic_write(folder / name, _png(draw(report)))
    atomic_write_json(folder / DOCUMENT, report.to_json())
    return report


def make_folder(folder: Path) -> Path:
    """The folder, made where it is not there yet: before the hours of a study and not after them.

    Raises:
        RunDirError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirError(f"{folder}: cannot make the folder: {error.strerror}; choose another path") from error
    return folder


# Tables


def _noise_rows(report: ThresholdReport) -> Iterable[Row]:
    yield ("where", "neighbourhood", "scale", "amplitude", "epsilon", "nmse", "drop", "divergence")
    for curve in report.noise:
        name = curve.name if curve.where == "one" else ""
        for p in curve.points:
            yield (curve.where, name, curve.scale, p.amplitude, p.epsilon, p.nmse, p.drop, p.divergence)


def _weight_rows(report: ThresholdReport) -> Iterable[Row]:
    yield ("amplitude", "neighbourhood", "drop")
    for found in report.weights:
        yield from ((found.amplitude, name, drop) for name, drop in found.singles.items())
        yield (found.amplitude, "sum", found.total)
        yield (found.amplitude, "composed", found.composed)


def _width_rows(report: ThresholdReport) -> Iterable[Row]:
    yield ("neighbourhood", "keep", "nmse", "drop", "divergence", "reason")
    for found in report.width:
        yield (found.name, found.keep, found.nmse, found.drop, found.divergence, found.reason)


def _tolerance_rows(report: ThresholdReport) -> Iterable[Row]:
    yield ("neighbourhood", "by", "deviation", "tolerance", "largest", "sensitivity")
    for by, tolerances in (("noise", report.tolerances), ("students", report.student_tolerances)):
        for found in tolerances:
            yield (found.name, by, report.deviations[found.name], found.nmse, found.largest, found.sensitivity)


def _csv(rows: Iterable[Row]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", errors="backslashreplace")


# Pictures


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import

    FigureCanvasAgg(figure)  # no window, and none of pyplot's state
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=_DPI)
    return image.getvalue()


def _figure(columns: int, width: float, title: str) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow to import

    figure = Figure(figsize=(width, 4.4), layout="constrained")
    figure.suptitle(title)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _draw_noise(report: ThresholdReport) -> Figure:
    """Figure 1: the drop against the amplitude, behind one, half and all neighbourhoods."""
    figure, axes = _figure(2, 11, f"Noise behind neighbourhoods, {report.samples} samples")
    single = [curve for curve in report.noise if curve.where == "one"]
    for ax, scale, label in zip(
        axes,
        ("relative", "absolute"),
        ("amplitude, as a part of each activation's deviation", "amplitude ε, in the activations' units"),
        strict=True,
    ):
        own = scale == "relative"
        for number, curve in enumerate(single):
            _plot(ax, curve, own, label=None if number or own else "each alone", **_THIN)
        if own and single:
            ax.plot(*_mean_curve(single), color=_MEAN, marker="o", label="one (mean, and each)")
        for curve in report.noise:
            if curve.where in _JOINT and curve.scale == scale:
                text, color = _JOINT[curve.where]
                _plot(ax, curve, own, color=color, marker="o", label=text)
        ax.axhline(report.max_drop, color="#444444", linestyle=":", linewidth=1)
        drawn = (point for curve in report.noise for point in curve.points if math.isfinite(point.drop))
        _log_scale(ax.set_xscale, (_at(point, own) for point in drawn))
        ax.set_xlabel(label)
        ax.set_ylabel(_DROPS[report.metric])
        ax.grid(alpha=0.25)
        if ax.get_legend_handles_labels()[0]:
            ax.legend()
    return figure


def _plot(ax: Axes, curve: Curve, own: bool, **style: Any) -> None:
    points = [p for p in curve.points if _at(p, own) > 0]
    ax.plot([_at(p, own) for p in points], _finite(p.drop for p in points), **style)


def _at(point: Point, own: bool) -> float:
    return point.amplitude if own else point.epsilon


def _mean_curve(curves: Sequence[Curve]) -> tuple[list[float], list[float]]:
    """Mean drop of the neighbourhoods, each alone, at every amplitude."""
    columns = zip(*(curve.points for curve in curves), strict=True)
    by_amplitude = [(points[0].amplitude, [p.drop for p in points]) for points in columns]
    kept = [(at, sum(drops) / len(drops)) for at, drops in by_amplitude if at > 0]
    return [at for at, _ in kept], _finite(drop for _, drop in kept)


def _finite(numbers: Iterable[float | None]) -> list[float]:
    """What cannot be drawn becomes a gap."""
    return [number if number is not None and math.isfinite(number) else math.nan for number in numbers]


def _log_scale(set_scale: Callable[[str], None], numbers: Iterable[float]) -> None:
    """Logarithmic where there is something to show: without any positive number there is no such scale."""
    if any(number > 0 for number in numbers):
        set_scale("log")


def _draw_weights(report: ThresholdReport) -> Figure:
    """Figure 4: single drops at the middle amplitude, and their sum beside the composed drop at every one."""
    figure, (left, right) = _figure(2, 11, f"Noise on weights, {report.samples} samples")
    if report.weights:
        middle = report.weights[len(report.weights) // 2]
        names = list(middle.singles)
        left.bar(range(len(names)), _finite(middle.singles.values()), color=_MEAN)
        _name_ticks(left, names)
        left.set_title(f"one at a time, {middle.amplitude:g} of the weights' deviation", fontsize="medium")
        left.set_ylabel(_DROPS[report.metric])
        shown = [found for found in report.weights if found.amplitude > 0]
        amplitudes = [found.amplitude for found in shown]
        right.plot(
            amplitudes, _finite(found.total for found in shown), color=_MEAN, marker="s", label="sum of single drops"
        )
        right.plot(
            amplitudes, _finite(found.composed for found in shown), color="#c0392b", marker="o", label="all at once"
        )
        _log_scale(right.set_xscale, amplitudes)
        right.set_xlabel("amplitude, as a part of the weights' deviation")
        right.set_ylabel(_DROPS[report.metric])
        right.legend()
        if report.metric != "nmse":
            right.set_ylim(top=1.05)  # a sum of drops may be more than there is to lose
    for ax in (left, right):
        ax.grid(alpha=0.25)
    return figure


def _draw_width(report: ThresholdReport) -> Figure:
    """Figure 6: the drop against the multiplier, and against the NMSE beside noise of the same NMSE."""
    from matplotlib import colormaps  # noqa: PLC0415 - slow to import

    title = f"One neighbourhood with part of its width, untrained, {report.samples} samples"
    figure, (left, right) = _figure(2, 11, title)
    names = list(dict.fromkeys(found.name for found in report.width if found.nmse is not None))
    noisy = {curve.name: curve.points for curve in report.noise if curve.where == "one"}
    for number, name in enumerate(names):
        color = colormaps["viridis"](number / max(1, len(names) - 1))
        found = [one for one in report.width if one.name == name]
        drops = _finite(one.drop for one in found)
        left.plot([one.keep for one in found], drops, color=color, marker="o", label=name)
        right.plot(_finite(one.nmse for one in found), drops, color=color, marker="o")
        points = noisy.get(name, ())
        right.plot([p.nmse for p in points], _finite(p.drop for p in points), color=color, linestyle=":", linewidth=1)
    _log_scale(right.set_xscale, _finite(one.nmse for one in report.width))
    for ax in (left, right):
        ax.axhline(report.max_drop, color="#444444", linestyle=":", linewidth=1)
        ax.set_ylabel(_DROPS[report.metric])
        ax.grid(alpha=0.25)
    right.set_ylim(left.get_ylim())  # the range of students: noise goes far beyond it
    shown = [one.nmse for one in report.width if one.nmse is not None and one.nmse > _LEAST_SHOWN]
    if shown:
        right.set_xlim(min(shown) / 2, max(shown) * 4)
    left.set_xlabel("multiplier k")
    right.set_xlabel("NMSE at the exit, of students (dots) and of noise (dotted)")
    if 0 < len(names) <= _MOST_NAMES // 2:
        left.legend(fontsize="small", ncols=2)
    return figure


def _name_ticks(ax: Axes, names: Sequence[str]) -> None:
    if len(names) <= _MOST_NAMES:
        ax.set_xticks(range(len(names)), names, rotation=60)
    else:
        ax.set_xlabel("neighbourhood, in order")
