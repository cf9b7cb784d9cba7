"""What data hold, and what a model says to them: the first samples, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ndonnx.config.recipe import Recipe
from ndonnx.data import Data, DataSource
from ndonnx.data.augmentation import image_axes
from ndonnx.data.inputs import interface_of
from ndonnx.distill.tasks.outputs import tasks_of
from ndonnx.errors import DataError
from ndonnx.metrics.check import source_for
from ndonnx.metrics.duration import duration
from ndonnx.metrics.evaluation import samples_first
from ndonnx.metrics.looks import DataLook, ValueLook
from ndonnx.partition import Partition
from ndonnx.teacher import make_session
from ndonnx.teacher.batches import read_batch, whole_batches
from ndonnx.teacher.outputs import outputs_a_second

Array = NDArray[Any]

_SAMPLES = 64
"""Most samples that are looked at; as many as a batch has where the model fixes it."""


def look(model: Path, teacher: ir.Model, recipe: Recipe, data: Data, parts: Partition | None = None) -> DataLook:
    """Read the first samples and let the model answer them.

    Args:
        model: its file.
        teacher: the same model, loaded.
        recipe: `[inputs]`, `[data]`, the seed, and what the user says of the outputs.
        data: a data source.
        parts: what of it would be distilled; None: how long that takes is not told.

    Raises:
        DataError: the data do not fit the model, or hold no samples.
    """
    source = source_for(model, teacher.graph, recipe, data)
    interface = interface_of(source.inputs, source.fixed)
    rows = _first(source)
    fed = model if interface.is_plain else samples_first(teacher, interface)
    session = make_session(fed)
    names = [value.name for value in session.get_outputs()]
    answers = dict(zip(names, session.run(names, dict(rows)), strict=True))
    count, rate = len(next(iter(rows.values()))), outputs_a_second(fed, source)
    images = image_axes(source.inputs, source.recipe)
    return DataLook(
        samples=count,
        length=source.length,
        inputs=[*(_input(name, array, name in images) for name, array in rows.items()), *_fixed(source)],
        outputs=list(_outputs(answers, count, recipe)),
        samples_a_second=_finite(rate),
        time=None if parts is None else duration(parts, source, rows, recipe, rate),
    )


def _first(source: DataSource) -> Mapping[str, Array]:
    size = source.fixed_batch or min(_SAMPLES, read_batch(source))
    found = next(iter(islice(whole_batches(source, size, samples=size), 1)), None)
    if found is None:
        raise DataError(f"{source.spec}: holds no samples")
    return found


def _input(name: str, array: Array, is_image: bool) -> ValueLook:
    return _look(name, array, array.shape[1:], _picture(array) if is_image else _numbers(array))


def _fixed(source: DataSource) -> Iterator[ValueLook]:
    for name, array in source.fixed.items():
        yield _look(name, array, array.shape, "one value for all samples")


def _outputs(answers: Mapping[str, Array], count: int, recipe: Recipe) -> Iterator[ValueLook]:
    tasks = tasks_of(answers, count, told=recipe.task)
    for name, array in answers.items():
        task = tasks.get(name)
        yield _look(name, array, array.shape[1:], "no numbers for each sample" if task is None else str(task))


def _look(name: str, array: Array, shape: tuple[int, ...], looks: str) -> ValueLook:
    numbers = array[np.isfinite(array)] if array.dtype.kind in "fiub" else array[:0].astype(float)
    low, high = (float(numbers.min()), float(numbers.max())) if numbers.size else (None, None)
    return ValueLook(name, array.dtype.name, list(shape), low, high, looks)


def _picture(array: Array) -> str:
    return f"pictures of {' x '.join(map(str, array.shape[1:]))}"


def _numbers(array: Array) -> str:
    if array.dtype.kind == "f":
        return "numbers"
    if array.dtype.kind in "iub" and np.isin(array, (0, 1)).all():
        return f"a mask, {array.mean():.0%} of it set"
    return "whole numbers, such as ids" if array.dtype.kind in "iu" else "no numbers"


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
