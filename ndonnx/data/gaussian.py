"""`gaussian` or `gaussian:N`: standard normal inputs, for when there is no data at all."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ndonnx.data.preprocess import IMAGE_RANK
from ndonnx.data.source import RowSource
from ndonnx.data.specs import Batch, InputSpec
from ndonnx.errors import DataError
from ndonnx.recipe import DataRecipe

DEFAULT_LENGTH = 20_000
_COUNT = re.compile(r"0*[1-9][0-9]{0,11}")
MOST_VALUES = 2**28
"""Values in one sample of one input (1 GiB of float32); more is a damaged or hostile model."""


class GaussianSource(RowSource):
    """Sample i is the same for a given seed, whatever the batch size or the order."""

    def __init__(self, spec: str, inputs: Sequence[InputSpec], recipe: DataRecipe, seed: int) -> None:
        """Check that every input is a float of known size.

        Raises:
            DataError: N is not a positive number, or an input is no float or has a dynamic dimension.
        """
        super().__init__(spec, inputs, recipe)
        count = spec.partition(":")[2] or str(DEFAULT_LENGTH)
        if not _COUNT.fullmatch(count):
            raise DataError(f"{spec}: expected gaussian:N with a number of samples N of at least 1, found '{count}'")
        self.length = int(count)
        self._seed = seed
        self._shapes = {entry.name: _sample_shape(entry, spec) for entry in self.inputs}

    def _fetch(self, rows: NDArray[np.int64]) -> Batch:
        inputs: dict[str, NDArray[np.generic]] = {}
        for place, entry in enumerate(self.inputs):
            values = np.empty((len(rows), *self._shapes[entry.name]), dtype=np.float32)
            for value, row in zip(values, rows.tolist(), strict=True):
                # One generator per sample: slower than one per batch, but any sample can be had at any time.
                value[...] = np.random.default_rng((self._seed, place, row)).standard_normal(value.shape, np.float32)
            inputs[entry.name] = values.astype(entry.dtype, copy=False)
        return Batch(inputs, None)

    def _content(self) -> Iterator[bytes]:
        yield f"gaussian {self.length} {self._seed}".encode()


def _sample_shape(entry: InputSpec, spec: str) -> tuple[int, ...]:
    if not entry.is_float:
        raise DataError(f"{spec}: input {entry} holds no floats, so random values mean nothing to it; give data")
    shape: list[int] = []
    for axis, size in enumerate(entry.shape[1:], start=1):
        if not isinstance(size, int):
            way_out = "set size = [height, width] under [data]" if len(entry.shape) == IMAGE_RANK else "give data"
            raise DataError(f"{spec}: dimension {axis} ({size or '?'}) of input {entry} is dynamic; {way_out}")
        shape.append(size)
    if not 0 < math.prod(shape) <= MOST_VALUES:
        raise DataError(
            f"{spec}: a sample of input {entry} has {math.prod(shape):,} values, expected 1 to "
            f"{MOST_VALUES:,}; check the model"
        )
    return tuple(shape)
