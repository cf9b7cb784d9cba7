"""The samples on which a student is furthest from its teacher, with their inputs: what to look at first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndonnx.runtime.atomic import atomic_write, explained

Array = NDArray[Any]

MOST = 8
"""Samples that are told."""
FOLDER = "worst"
"""Where their pictures lie in a run directory."""
_LEAST_SIDE, _MOST_SIDE = 96, 256
"""Pixels of the longer side of a picture: smaller images are drawn larger, by whole factors, larger ones smaller."""


@dataclass(frozen=True)
class WorstSample:
    """One of the samples on which a student's answer is furthest from the teacher's."""

    sample: int
    """Its number, from 0 in the order of the data."""
    nmse: float
    """Squared error of this sample over the teacher's variance; inf where an answer broke, null in the document."""
    teacher: int | None = None
    """Class with the teacher's largest score; None where there are no class scores."""
    student: int | None = None
    """The same of the student."""
    picture: str | None = None
    """File of its image, relative to the run directory; None where it is none, or nothing was drawn."""
    inputs: Mapping[str, Array] = field(default_factory=dict, repr=False, compare=False)
    """Its inputs, without the axis of samples; not part of the document."""

    def to_json(self) -> dict[str, Any]:
        """As a mapping for JSON."""
        found = {name: value for name, value in asdict(replace(self, inputs={})).items() if name != "inputs"}
        return found | {"nmse": self.nmse if np.isfinite(self.nmse) else None}


@dataclass
class Worst:
    """Collects them while samples come by, batch after batch."""

    _found: list[tuple[float, WorstSample]] = field(default_factory=list)

    def add(
        self, first: int, errors: Array, inputs: Mapping[str, Array], classes: tuple[Array, Array] | None = None
    ) -> None:
        """Take in a batch.

        Args:
            first: number of its first sample.
            errors: squared error of each sample.
            inputs: its arrays, samples first.
            classes: the classes that student and teacher say, of each sample.
        """
        ranked = np.where(np.isnan(errors), np.inf, errors)
        for row in np.argsort(-ranked, kind="stable")[:MOST].tolist():
            error = float(ranked[row])
            if len(self._found) == MOST and error <= self._found[-1][0]:
                break
            student, teacher = (None, None) if classes is None else (int(each[row]) for each in classes)
            own = {
                name: array[row].copy() for name, array in inputs.items() if array.ndim and len(array) == len(errors)
            }
            self._found.append((error, WorstSample(first + row, error, teacher, student, None, own)))
            self._found.sort(key=lambda each: (-each[0], each[1].sample))
            del self._found[MOST:]

    def result(self, nmse: Callable[[float], float]) -> tuple[WorstSample, ...]:
        """The worst first.

        Args:
            nmse: makes of a sample's squared error what is told of it.
        """
        return tuple(replace(sample, nmse=nmse(error)) for error, sample in self._found)


def draw(samples: Sequence[WorstSample], axes: Mapping[str, tuple[int, int]], folder: Path) -> Iterator[WorstSample]:
    """The samples with their pictures, which are written into a run directory.

    Args:
        samples: with their inputs.
        axes: of each input that is an image, the axes of height and width, the samples' axis counted; none where
            there are no images.
        folder: the run directory.

    Raises:
        RunDirError: a picture cannot be written there.
    """
    for sample in samples:
        images = [(sample.inputs[name], each) for name, each in axes.items() if name in sample.inputs]
        if not images:
            yield sample
            continue
        path = folder / FOLDER / f"{sample.sample}.png"
        with explained(path.parent, "create"):
            path.parent.mkdir(exist_ok=True)
        atomic_write(path, _picture(*images[0]).save)
        yield replace(sample, picture=f"{FOLDER}/{path.name}")


def _picture(image: Array, axes: tuple[int, int]) -> Any:
    """A Pillow image of an array (C, H, W) or (H, W, C) of any range, dark where its values are least."""
    from PIL import Image  # noqa: PLC0415 - slow to import

    height, width = (axis - 1 for axis in axes)
    planes = np.moveaxis(np.asarray(image, np.float32), ({0, 1, 2} - {height, width}).pop(), -1)
    low, high = (float(each) for each in (np.nanmin(planes), np.nanmax(planes)))
    grey = np.nan_to_num((planes - low) / (high - low or 1.0)).clip(0, 1)
    pixels = np.round(255 * grey).astype(np.uint8)
    drawn = Image.fromarray(pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., 0])
    side = max(drawn.size)
    factor = max(1, _LEAST_SIDE // side) if side < _LEAST_SIDE else min(1.0, _MOST_SIDE / side)
    size = (max(1, round(drawn.width * factor)), max(1, round(drawn.height * factor)))
    return drawn.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BOX)
