"""The paper's figures, drawn from measurements on a teacher of yours.

What the paper shows in figures 1, 4 and 6 is known, and figure 2 is a partition; in place of 3, 5 and 7 stands what its
text is about, and their captions say so.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

import ndonnx
from benchmarks import common
from benchmarks.paper.lab import Cell, Lab
from benchmarks.paper.tables import KD_PRUNED, KD_SCRATCH
from benchmarks.time_to_quality_plot import Point, plot
from ndonnx.errors import UsageError

_COLOURS = 64
"""Of a picture: more would make its file larger, and nothing clearer."""
_PARTS = (0.25, 0.5, 1.0)
"""Of the scale's steps: the lengths of ND in figure 3."""
_INSTEAD = "What the paper's own figure {} shows is not known here: this stands in its place."
STUDY = "study"
"""Folder of the threshold study, with its tables."""
SEARCH = "search"
"""Folder of the searched students, with their table."""


@dataclass(frozen=True)
class Figure:
    """A picture as it was drawn."""

    number: int
    file: str
    caption: str
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """What is drawn, where no table beside it has it."""


class Artist:
    """Draws figures of one teacher into a folder; what several of them need is measured once."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        """Take who measures, and where pictures go."""
        self._lab = lab
        self._folder = folder
        self._study: ndonnx.ThresholdReport | None = None

    def draw(self, numbers: Sequence[int]) -> list[Figure]:
        """The figures of these numbers, each told of as soon as it is there.

        Raises:
            UsageError: a figure cannot be had of this teacher and data.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        done: list[Figure] = []
        for number in numbers:
            figure = FIGURES[number](self)
            if figure.file.endswith(".png"):
                _make_small(self._folder / figure.file)
            done.append(figure)
            print(f"figure {number}: {self._folder / figure.file}\n{figure.caption}\n", flush=True)
            common.write_json(self._folder / "figures.json", self._document(done))
        return done

    def _document(self, done: Sequence[Figure]) -> dict[str, Any]:
        lab = self._lab
        return {
            "machine": common.machine(lab.subject.recipe),
            "model": lab.subject.model.name,
            "teacher": lab.teacher,
            "scale": asdict(lab.scale),
            "figures": [asdict(figure) for figure in done],
        }

    def noise(self) -> Figure:
        """Figure 1."""
        return self._of_study(1, "noise.png", "Gaussian noise behind one, half and all neighbourhoods")

    def partition(self) -> Figure:
        """Figure 2."""
        subject, file = self._lab.subject, "figure2.svg"
        ndonnx.inspect(subject.model, subject.recipe).write_svg(self._folder / file)
        return Figure(
            2, file, f"The neighbourhoods of {subject.model.name}: boxes are as wide as their share of the weights."
        )

    def over_time(self) -> Figure:
        """Figure 3: quality over the time of training, of ND with fine-tuning and of distillation of the whole."""
        lab, file = self._lab, "figure3.png"
        keep, tuned = lab.scale.middle, [self._tuned(part) for part in _PARTS]
        points = list(self._points("ND + fine-tune", tuned))
        if not points:
            raise UsageError(f"figure 3: no student was had: {tuned[-1].note}")
        for name, init in ((KD_SCRATCH, "random"), (KD_PRUNED, "teacher")):
            points += lab.baseline(name, "kd", init, keep, points[-1].seconds, judged=True).curve
        plot(self._folder / file, points, lab.teacher)
        caption = f"{self._quality} over training time at k={keep:g}, {_samples(lab.scale.samples)}."
        return Figure(3, file, f"{caption} {_INSTEAD.format(3)}", {"points": [asdict(point) for point in points]})

    def weights(self) -> Figure:
        """Figure 4."""
        return self._of_study(4, "weights.png", "Gaussian noise on the weights of one neighbourhood, and of all")

    def look_ahead(self) -> Figure:
        """Figure 5: what it is worth to judge a student through the next slices of the teacher."""
        lab, file = self._lab, "figure5.png"
        found = {
            order: {
                count: lab.nd(
                    keep=lab.scale.middle, inputs=inputs, look_ahead=count, steps=lab.scale.look_ahead_steps
                ).quality
                for count in counts
            }
            for order, inputs, counts in (
                ("apart", "teacher", lab.scale.look_aheads),
                ("in order", "student", lab.scale.ordered_look_aheads),
            )
        }
        _draw_look_ahead(self._folder / file, found, self._quality)
        caption = (
            f"{self._quality} at k={lab.scale.middle:g} without fine-tuning, over the number of teacher slices through "
            f"which each student is judged; {lab.scale.look_ahead_steps} steps a neighbourhood."
        )
        return Figure(5, file, f"{caption} {_INSTEAD.format(5)}", {"quality": found})

    def untrained(self) -> Figure:
        """Figure 6."""
        return self._of_study(6, "width.png", "One neighbourhood at a time by an untrained student of several k")

    def front(self) -> Figure:
        """Figure 7: searched students, and those of one multiplier for all."""
        lab, file = self._lab, "figure7.png"
        scale = lab.scale
        candidates = [ndonnx.Width(keep) for keep in scale.searched]
        ndonnx.search(
            lab.subject.model,
            data=lab.subject.data,
            recipe=lab.recipe(),
            eval_data=lab.subject.judge,
            output=self._folder / SEARCH,
            run_dir=lab.folder / "searched",
            pareto=scale.front,
            search={"candidates": candidates, "steps": scale.search_steps, "samples": scale.study_samples},
            progress=common.Notes(),
        )
        shutil.copyfile(self._folder / SEARCH / "search.png", self._folder / file)
        told = ", ".join(f"{keep:g}" for keep in scale.searched)
        caption = f"Cost and quality of searched students, of the widths {told}, and of one multiplier for all."
        return Figure(7, file, f"{caption} {_INSTEAD.format(7)}")

    def _of_study(self, number: int, picture: str, words: str) -> Figure:
        report, file = self._studied(), f"figure{number}.png"
        shutil.copyfile(self._folder / STUDY / picture, self._folder / file)
        return Figure(number, file, f"{words}, {report.samples} samples.")

    def _studied(self) -> ndonnx.ThresholdReport:
        if self._study is None:
            lab = self._lab
            self._study = ndonnx.threshold(
                lab.subject.model,
                data=lab.subject.data,
                recipe=lab.subject.recipe,
                samples=lab.scale.study_samples,
                repeats=lab.scale.study_repeats,
                output=self._folder / STUDY,
                progress=common.Notes(),
            )
        return self._study

    def _tuned(self, part: float) -> Cell:
        scale = self._lab.scale
        steps, tuning = (math.ceil(part * count) for count in (scale.steps, scale.finetune_steps))
        return self._lab.nd(keep=scale.middle, inputs="teacher", steps=steps, finetune_steps=tuning)

    def _points(self, method: str, cells: Sequence[Cell]) -> Iterator[Point]:
        for cell in cells:
            if cell.quality is not None and cell.seconds is not None:
                accuracy = cell.quality if self._lab.labelled else None
                yield Point(method, "", cell.seconds, 0, accuracy, cell.quality)

    @property
    def _quality(self) -> str:
        return "Accuracy" if self._lab.labelled else "Agreement with the teacher"


FIGURES: Mapping[int, Callable[[Artist], Figure]] = {
    1: Artist.noise,
    2: Artist.partition,
    3: Artist.over_time,
    4: Artist.weights,
    5: Artist.look_ahead,
    6: Artist.untrained,
    7: Artist.front,
}


def _draw_look_ahead(path: Path, found: Mapping[str, Mapping[int, float | None]], quality: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import
    from matplotlib.figure import Figure as Canvas  # noqa: PLC0415

    canvas = Canvas(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    for order, by_count in found.items():
        known = [(count, 100 * value) for count, value in by_count.items() if value is not None]
        axes.plot([count for count, _ in known], [value for _, value in known], marker="o", label=order)
    axes.set_xlabel("teacher slices looked through")
    axes.set_ylabel(f"{quality.lower()} in %")
    axes.grid(True, alpha=0.3)
    axes.legend(title="neighbourhoods")
    canvas.savefig(path, dpi=120)


def _make_small(path: Path) -> None:
    """Write a picture with few colours: a third of the bytes."""
    with Image.open(path) as drawn:
        drawn.convert("RGB").quantize(_COLOURS).save(path, optimize=True)


def _samples(count: int | None) -> str:
    return f"{count} training samples" if count else "all training samples"
