"""What a timed model is fed: made-up or real samples, in batches of the size that is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ndonnx.data import InputSpec
from ndonnx.errors import DataError, ModelError

Feeds = Mapping[str, NDArray[np.generic]]


def made_up_feeds(inputs: Sequence[InputSpec], *, batch_size: int = 1, seed: int = 0) -> dict[str, NDArray[np.generic]]:
    """One batch of standard normal floats, and zeros for other types; a dynamic first axis becomes `batch_size`.

    Raises:
        DataError: another dimension is dynamic.
    """
    rng = np.random.default_rng(seed)
    feeds: dict[str, NDArray[np.generic]] = {}
    for spec in inputs:
        shape = []
        for axis, size in enumerate(spec.shape):
            if not isinstance(size, int) and axis > 0:
                raise DataError(f"dimension {axis} ({size or '?'}) of input {spec} is dynamic; give data to run on")
            shape.append(size if isinstance(size, int) else batch_size)
        values = rng.standard_normal(shape) if spec.is_float else np.zeros(shape)
        feeds[spec.name] = np.asarray(values, dtype=spec.dtype)
    return feeds


def batch_of(samples: Feeds, size: int) -> dict[str, NDArray[np.generic]]:
    """The first `size` samples of arrays (n, ...), begun anew where there are fewer; a scalar stays as it is."""
    return {
        name: np.ascontiguousarray(value[np.arange(size) % len(value)]) if value.ndim else value
        for name, value in samples.items()
    }


def fixed_batch_size(name: str, inputs: Sequence[InputSpec]) -> int | None:
    """The batch size that a model's inputs prescribe; None where it is left open.

    Raises:
        ModelError: its inputs prescribe different ones.
    """
    sizes = sorted({spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], int)})
    if len(sizes) > 1:
        raise ModelError(f"{name}: expected one batch size, found {sizes} in its inputs")
    return sizes[0] if sizes else None


def common_batch_size(models: Mapping[str, Sequence[InputSpec]]) -> int | None:
    """The batch size that some of these models, by name, prescribe; None where all leave it open.

    Raises:
        ModelError: they prescribe different ones.
    """
    sizes = {name: fixed_batch_size(name, inputs) for name, inputs in models.items()}
    fixed = {name: size for name, size in sizes.items() if size is not None}
    if len(set(fixed.values())) > 1:
        told = ", ".join(f"{size} in {name}" for name, size in fixed.items())
        raise ModelError(
            f"expected one batch size, to compare on the same inputs; found {told}; export one of them anew"
        )
    return next(iter(fixed.values()), None)


def feeds_for(name: str, inputs: Sequence[InputSpec], feeds: Feeds) -> dict[str, NDArray[np.generic]]:
    """The arrays that a model reads.

    Raises:
        DataError: one is missing.
    """
    wanted = [spec.name for spec in inputs]
    if missing := [entry for entry in wanted if entry not in feeds]:
        raise DataError(f"{name}: expected the inputs {wanted}, found {list(feeds)}; missing {missing}")
    return {entry: feeds[entry] for entry in wanted}
