"""Which changes of images suit the data: those that the teacher itself answers much as it answers the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ndonnx.data import DataSource
from ndonnx.data.augmentation import KINDS, image_axes
from ndonnx.teacher import make_session
from ndonnx.teacher.batches import whole_batches

AUTO = "auto"
TRIED = ("flip", "shift")
"""Kinds that are tried. Two images in one are answered otherwise by every teacher."""
_SAMPLES = 64
_BATCH = 16
_ALIKE = 0.5
"""Squared error between the answers to an image and to its copy, over that between two images, at most. A mirrored
object is the same object; mirrored text is no text, and its answers differ as those of other images do."""

Array = NDArray[Any]


def suiting(model: ir.Model, source: DataSource, outputs: Sequence[str], seed: int) -> tuple[str, ...]:
    """The kinds of change to which the teacher's answers hardly change; none where the inputs are no images.

    Args:
        model: the teacher, as it is fed with samples first.
        source: some samples that it is trained on.
        outputs: names of its float outputs.
        seed: of the changes.
    """
    axes = image_axes(source.inputs, source.recipe)
    if not axes or not outputs:
        return ()
    session = make_session(model)
    errors, between = dict.fromkeys(TRIED, 0.0), 0.0
    rng = np.random.default_rng(seed)
    for batch in whole_batches(source, source.fixed_batch or _BATCH, samples=_SAMPLES):
        answers = _answers(session.run(list(outputs), dict(batch)))
        between += _difference(answers, [np.roll(each, 1, axis=0) for each in answers])
        for kind in TRIED:
            changed = _all_changed(kind, batch, axes, rng)
            errors[kind] += _difference(answers, _answers(session.run(list(outputs), changed)))
    return tuple(kind for kind in TRIED if errors[kind] <= _ALIKE * between and between > 0)


def _all_changed(
    kind: str, batch: Mapping[str, Array], axes: Mapping[str, tuple[int, int]], rng: np.random.Generator
) -> dict[str, Array]:
    """Each image changed, where a kind leaves some as they are too."""
    found = {}
    for name, images in batch.items():
        changed = KINDS[kind](images, axes[name], rng)
        same = np.array([np.array_equal(one, other) for one, other in zip(changed, images, strict=True)])
        if same.any():
            again = np.flip(images, axes[name][1]) if kind == "flip" else changed
            changed = np.where(same.reshape(-1, *[1] * (images.ndim - 1)), again, changed)
        found[name] = np.ascontiguousarray(changed)
    return found


def _answers(values: Sequence[Array]) -> list[NDArray[np.float64]]:
    return [np.nan_to_num(np.asarray(value, dtype=np.float64)) for value in values]


def _difference(one: Sequence[Array], other: Sequence[Array]) -> float:
    """Squared error, each output over its own mean square."""
    return sum(
        float(np.square(a - b).mean() / (np.square(a).mean() + np.finfo(np.float64).tiny))
        for a, b in zip(one, other, strict=True)
        if a.shape == b.shape
    )
