"""More of the same data: images mirrored, moved and mixed.

Distillation needs no labels, so a changed image needs none either: the teacher says what it makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndonnx.config.recipe import DataRecipe
from ndonnx.data.preprocess import IMAGE_CHANNELS, IMAGE_RANK, layout_of
from ndonnx.data.specs import InputSpec

Array = NDArray[Any]
Change = Callable[[Array, Sequence[int], np.random.Generator], Array]
"""From images (n, ...), the two axes of their height and width, and a source of chance, to as many others."""

_FARTHEST = 8
"""An image is moved by at most this part of its side."""


def image_axes(inputs: Sequence[InputSpec], recipe: DataRecipe) -> dict[str, tuple[int, int]]:
    """The axes of height and width of every input that is an image; empty where any input is something else.

    Several inputs belong together (an image and its mask, a pair), so that one of them is never changed alone.
    """
    axes = {}
    for spec in inputs:
        layout = layout_of(spec, recipe)
        channels = spec.shape[1 if layout == "NCHW" else 3] if len(spec.shape) == IMAGE_RANK else None
        if not spec.is_float or channels not in IMAGE_CHANNELS:
            return {}
        axes[spec.name] = (2, 3) if layout == "NCHW" else (1, 2)
    return axes if len(axes) == 1 else {}


def with_augmented(
    batches: Iterable[Mapping[str, Array]],
    kinds: Sequence[str],
    axes: Mapping[str, tuple[int, int]],
    *,
    per_sample: int,
    after: int,
    seed: int,
) -> Iterator[Mapping[str, Array]]:
    """Each batch, and behind it `per_sample` - 1 changed copies of it.

    Args:
        batches: inputs by name, (n, ...).
        kinds: what is done to each copy, of `KINDS`, in this order.
        axes: of the images, see `image_axes`.
        per_sample: batches for each that comes in.
        after: so many samples at the beginning come once only, as they are; copies begin with the first batch
            behind them. They can be held out: nothing of them is in what follows.
        seed: of all chance.
    """
    seen = 0
    for number, batch in enumerate(batches):
        yield batch
        if seen >= after:
            rng = np.random.default_rng((seed, number))
            for _ in range(per_sample - 1):
                yield {name: _changed(array, axes[name], kinds, rng) for name, array in batch.items()}
        seen += len(next(iter(batch.values())))


def _changed(array: Array, axes: Sequence[int], kinds: Sequence[str], rng: np.random.Generator) -> Array:
    for kind in kinds:
        array = KINDS[kind](array, axes, rng)
    return np.ascontiguousarray(array)


def _flip(images: Array, axes: Sequence[int], rng: np.random.Generator) -> Array:
    """Half of them mirrored, left to right."""
    mirrored = rng.random(len(images)) < 0.5
    changed = images.copy()
    changed[mirrored] = np.flip(images[mirrored], axes[1])
    return changed


def _shift(images: Array, axes: Sequence[int], rng: np.random.Generator) -> Array:
    """Each moved by some pixels, what comes in at the edge mirrored."""
    far = [max(1, images.shape[axis] // _FARTHEST) for axis in axes]
    if any(most >= images.shape[axis] for most, axis in zip(far, axes, strict=True)):
        return images
    padding = [(0, 0)] * images.ndim
    for most, axis in zip(far, axes, strict=True):
        padding[axis] = (most, most)
    padded = np.pad(images, padding, mode="reflect")
    changed = np.empty_like(images)
    for row, image in enumerate(padded):
        part = [slice(None)] * image.ndim
        for most, axis in zip(far, axes, strict=True):
            start = int(rng.integers(0, 2 * most + 1))
            part[axis - 1] = slice(start, start + images.shape[axis])
        changed[row] = image[tuple(part)]
    return changed


def _mixup(images: Array, axes: Sequence[int], rng: np.random.Generator) -> Array:
    """Each with another one shining through, evenly from not at all to half (Zhang et al. 2018, alpha = 1)."""
    del axes
    part = rng.uniform(0.5, 1.0, (len(images),) + (1,) * (images.ndim - 1)).astype(images.dtype)
    mixed: Array = part * images + (1 - part) * images[rng.permutation(len(images))]
    return mixed


KINDS: Mapping[str, Change] = {"flip": _flip, "shift": _shift, "mixup": _mixup}
"""What can be done to images, by the recipe's names."""
