"""What a user has today without this SDK, made by the SDK's own baselines: INT8, static and dynamic, and float16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.field.subjects import Arrays
from ndonnx.config.recipe import DataRecipe
from ndonnx.data import input_specs, open_source
from ndonnx.data.split import draw
from ndonnx.metrics.baselines import CALIBRATION, Material, make_baselines
from ndonnx.teacher import make_session

_HOLDOUT = 0.5
"""Part of the rows beside the comparison's by which the calibration is chosen."""


def samples(feeds: Arrays, count: int) -> Iterator[dict[str, NDArray[np.generic]]]:
    """Single samples of inputs: rows, a state's along axis 1, and what is one value for all as it is."""
    for row in range(count):
        yield {name: _row(name, array, row) for name, array in feeds.items()}


def _row(name: str, array: NDArray[np.generic], row: int) -> NDArray[np.generic]:
    if array.ndim == 0:
        return array
    return array[:, row : row + 1] if name == "state" else array[row : row + 1]


def make_all(model: Path, feeds: Arrays, folder: Path) -> dict[str, Path]:
    """Every baseline that can be made of a model; the others are told with their reason.

    Args:
        model: the teacher.
        feeds: calibration inputs as the model takes them.
        folder: where the files go.
    """
    source = open_source(feeds, input_specs(make_session(model)), DataRecipe())
    split = draw(source, 2 * CALIBRATION, seed=0, holdout=_HOLDOUT)
    material = Material(model, folder, split.to_fit(CALIBRATION), split.to_choose())
    found = {}
    for made in make_baselines(("int8", "dynamic", "fp16"), material):
        if made.path is None:
            print(f"{model.name}: no {made.name}: {made.reason}")
        else:
            found[made.name] = made.path
    return found
