"""What a search tells when it is over: the document of `search --json`, a CSV with a row a student, a picture."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ndonnx.errors import UsageError
from ndonnx.runtime.atomic import atomic_write, atomic_write_json
from ndonnx.select import COSTS, TEACHER, bits_of, in_float, parse_candidates

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Source: TypeAlias = Literal["searched", "uniform", "teacher"]

_FORMATS = (".png", ".svg", ".pdf")
_STYLES: dict[Source, dict[str, Any]] = {
    "uniform": {"label": "uniform multiplier", "color": "#8a8f98", "marker": "s", "linestyle": "--"},
    "searched": {"label": "searched", "color": "#1f6f4a", "marker": "o", "linestyle": "-"},
    "teacher": {"label": "teacher", "color": "#c0392b", "marker": "*", "linestyle": "", "markersize": 14},
}
_AXES = {"params": "parameters", "macs": "multiply-accumulates", "size": "bytes of the file", "latency": "latency"}
_SHORT = {"width": "", "sparsity": "sp ", "lowrank": "lr ", "activation": "act", "removal": "rm", "custom": "cu"}
"""What stands in a cell of the map before the number."""
_MOST_WRITTEN = 80
"""Neighbourhoods in the map, beyond which its cells are too narrow to write in."""


@dataclass(frozen=True)
class SearchedStudent:
    """One point of the trade-off curve: a searched student, one of the uniform baseline, or the teacher."""

    name: str
    source: Source
    params: int
    macs: int | None
    """Multiply-accumulates a sample; None where they depend on a size that nothing states."""
    bytes: int | None
    """Path of the student's file; None where it was not written."""
    latency: float | None
    """Milliseconds a sample; None where it was not measured."""
    shares: dict[str, float]
    """Parts of the teacher's `params`, `macs`, `size` and `latency`, as far as they are known."""
    predicted_drop: float | None
    """Sum of what the neighbourhoods lose alone."""
    measured_drop: float | None
    """What the composed student loses on samples that no training and no choice saw."""
    metric: float | None
    """Accuracy, agreement or NMSE of the composed student on them."""
    candidates: dict[str, str]
    """By neighbourhood; `teacher` where it is unchanged."""
    path: str | None = None


@dataclass(frozen=True)
class OptionReport:
    """A candidate in a neighbourhood: `trained`, `reused`, or with a reason `derived`, `skipped`, `failed`, `alias`.

    A derived one is in 8 bits and needs no training of its own: its reason says what it is made of.

    An alias comes to the same student as another candidate, which its reason names (`same as width 0.7`) and whose
    numbers it has. Before anything is trained, what will be is `missing`.
    """

    neighbourhood: str
    candidate: str
    status: str
    costs: dict[str, float]
    """Costs of the slice by name: `params`, `macs`, `size`, `latency`."""
    drop: float | None
    """What the teacher loses with this student in its place; below 0 by noise."""
    nmse: float | None = None
    reason: str | None = None
    traceback: str | None = None
    """Path of a text file in the run directory, where the reason is something that nobody foresaw."""


@dataclass(frozen=True)
class SearchReport:
    """The whole of a search."""

    model: str
    cost: str
    """The cost on the picture's axis: params, macs, size or latency."""
    quality: str
    """What was measured: accuracy, agreement or nmse."""
    samples: int
    """Held-out samples of the measurements."""
    target: dict[str, float]
    max_drop: float | None
    students: list[SearchedStudent]
    """The teacher, the searched ones and the uniform baseline."""
    options: list[OptionReport]
    seconds: dict[str, float]
    run_dir: str | None
    """Folder of the library of trained candidates; None: a temporary one, which is gone."""

    def of(self, source: Source) -> list[SearchedStudent]:
        """The students of one source, the cheapest first."""
        mine = [student for student in self.students if student.source == source]
        return sorted(mine, key=lambda student: student.shares.get(self.cost, 1.0))

    def to_json(self) -> dict[str, Any]:
        """As one JSON document; what is not finite becomes null."""
        document: dict[str, Any] = _finite(asdict(self))
        return document

    def write(self, path: Path) -> None:
        """Write the document, whole or not at all.

        Raises:
            RunDirError: it cannot be written there.
        """
        atomic_write_json(path, self.to_json())

    def to_csv(self) -> str:
        """A row a student; the last columns are the neighbourhoods, with the candidate that each of them got."""
        names = dict.fromkeys(name for student in self.students for name in student.candidates)
        numbers = ("params", "macs", "bytes", "latency")
        qualities = ("predicted_drop", "measured_drop", "metric")
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["name", "source", *numbers, *(f"{cost}_share" for cost in COSTS), *qualities, *names])
        for student in self.students:
            values = asdict(student)
            rows.writerow(
                [student.name, student.source]
                + [values[key] for key in numbers]
                + [student.shares.get(cost) for cost in COSTS]
                + [values[key] for key in qualities]
                + [student.candidates.get(name, TEACHER) for name in names]
            )
        return text.getvalue()

    def write_csv(self, path: Path) -> None:
        """Write the CSV, whole or not at all.

        Raises:
            RunDirError: it cannot be written there.
        """
        atomic_write(path, self.to_csv().encode("utf-8", errors="backslashreplace"))

    def draw(self, path: Path) -> None:
        """Draw the trade-off curve (the paper's figure 3), and below it which neighbourhood got which candidate.

        Args:
            path: of the picture; its suffix says the format.
                It is written whole or not at all.

        Raises:
            UsageError: the suffix is not one of .png, .svg, .pdf.
            RunDirError: it cannot be written there.
        """
        suffix = path.suffix.lower()
        if suffix not in _FORMATS:
            raise UsageError(f"{path}: cannot draw '{path.suffix}'; the picture's name ends in {', '.join(_FORMATS)}")
        figure = _figure(self)
        atomic_write(path, lambda temporary: figure.savefig(temporary, format=suffix[1:], dpi=150))


def _finite(value: Any) -> Any:
    """The same document, with None for NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _figure(report: SearchReport) -> Figure:
    from matplotlib.figure import Figure  # noqa: PLC0415  slow to import

    searched = report.of("searched")
    columns = max((len(student.candidates) for student in searched), default=0)
    rows = len(searched) if columns else 0
    width = min(max(8.0, 2 + 0.42 * columns), 24.0)
    figure = Figure(figsize=(width, 5.0 + (1.2 + 0.36 * rows if rows else 0)), layout="constrained")
    if rows:
        curve, grid = figure.subplots(2, 1, height_ratios=[5.0, 1.0 + 0.36 * rows])
        _draw_map(grid, report, searched)
    else:
        curve = figure.subplots()
    _draw_curve(curve, report)
    return figure


def _draw_curve(axes: Axes, report: SearchReport) -> None:
    # A drop is 0 at best, and so is an NMSE: turned over, up is better on every picture.
    by_metric = report.quality != "nmse" and any(student.metric is not None for student in report.students)
    for source, style in _STYLES.items():
        points = [
            (student.shares[report.cost], height)
            for student in report.of(source)
            if report.cost in student.shares and (height := _height(student, by_metric)) is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), **style)
    if by_metric:
        axes.set_ylabel(report.quality)
    else:
        axes.set_ylabel(f"drop ({report.quality})")
        axes.invert_yaxis()
    axes.set_xlabel(f"{_AXES.get(report.cost, report.cost)}, part of the teacher's")
    title = f"{Path(report.model).name}: cost against quality, {report.samples} held-out samples"
    axes.set_title(title, parse_math=False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(loc="lower right")


def _height(student: SearchedStudent, by_metric: bool) -> float | None:
    """Where a student stands on the quality axis; None where that was not measured."""
    height = student.metric if by_metric else student.measured_drop
    if height is None and student.source == "teacher" and not by_metric:
        height = 0.0
    return height if height is not None and math.isfinite(height) else None


def _draw_map(axes: Axes, report: SearchReport, searched: Sequence[SearchedStudent]) -> None:
    names = list(dict.fromkeys(name for student in searched for name in student.candidates))
    cells = [[student.candidates.get(name, TEACHER) for name in names] for student in searched]
    sizes = [[_size(candidate) for candidate in row] for row in cells]
    axes.imshow(sizes, cmap="YlGnBu", vmin=0, vmax=1.15, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(names)), labels=names, rotation=90, fontsize=7, parse_math=False)
    labels = [f"{student.name} ({student.shares.get(report.cost, 1.0):.0%})" for student in searched]
    axes.set_yticks(range(len(searched)), labels=labels, fontsize=8, parse_math=False)
    axes.set_title(_legend(cells), fontsize=9)
    if len(names) <= _MOST_WRITTEN:
        for y, row in enumerate(cells):
            for x, candidate in enumerate(row):
                ink = "white" if sizes[y][x] > 0.6 else "black"
                axes.text(x, y, _short(candidate), ha="center", va="center", fontsize=7, color=ink)


def _size(candidate: str) -> float:
    """The part of a neighbourhood that is left, nominally: the colour of its cell."""
    return 1.0 if candidate == TEACHER else parse_candidates(candidate)[0].size


def _short(candidate: str) -> str:
    """`width 0.5` as 0.5, the teacher as 1: what stands in a cell."""
    if candidate == TEACHER:
        return "1"
    behind = "" if bits_of(candidate) == 32 else "i"
    method, _, amount = in_float(candidate).partition(" ")
    if method == TEACHER:
        return f"1{behind}"
    return _SHORT[method] + (amount if method in ("width", "sparsity", "lowrank") else "") + behind


def _legend(cells: Sequence[Sequence[str]]) -> str:
    """What the letters in the cells mean, those that are there."""
    methods = dict.fromkeys(in_float(candidate).partition(" ")[0] for row in cells for candidate in row)
    others = [f"{_SHORT[method].strip()} = {method}" for method in methods if _SHORT.get(method)]
    others += ["i = in 8 bits"] if any(bits_of(candidate) < 32 for row in cells for candidate in row) else []
    return "; ".join(["multiplier k of each neighbourhood (1 = teacher)", *others])
