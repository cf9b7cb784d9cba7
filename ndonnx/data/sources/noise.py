"""`gaussian`, `smooth`, `leaves` (or `leaves:N`): made-up samples, for when there is no data at all.

A sample depends on nothing but the seed and its own number. It is a model input like any other and goes through
the whole teacher, so that what every neighbourhood sees is what its predecessors can give it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ndonnx.data.inputs import refuse_scalars
from ndonnx.data.preprocess import IMAGE_RANK, layout_of, normalise
from ndonnx.data.registry import Opening, register_source
from ndonnx.data.source import RowSource
from ndonnx.data.sources.images import BYTE_SCALE
from ndonnx.data.sources.textures import Painter
from ndonnx.data.specs import Batch, InputSpec, cast
from ndonnx.data.synthetic import floats, longest_sequence, whole_numbers
from ndonnx.errors import DataError

NOISES = ("gaussian", "smooth", "leaves")
"""Names of the sources here, from the plainest to the one that comes closest to photographs."""
DEFAULT_LENGTH = 20_000
MOST_VALUES = 2**28
"""Values in one sample of one input (1 GiB of float32); more is a damaged or hostile model."""
MEAN, DEVIATION = 0.5, 0.25
"""Of all pixels of made-up pictures, from 0 (black) to 1 (white)."""
_BEFORE_CUT = 1.12
"""Deviation of pictures, by `DEVIATION`, before what is darker than black or lighter than white is cut off."""
FACTORS = 4
"""Hidden quantities on which the columns of a made-up table depend."""
EXPLAINED = 0.5
"""Part of each column's variance that comes from them."""

_COUNT = re.compile(r"0*[1-9][0-9]{0,11}")
_LEAST_SIDE = 4
"""Pixels below which a picture has no room for leaves."""

Array = NDArray[np.generic]
Make = Callable[[NDArray[np.int64]], Array]
"""From the numbers of samples to one input's values."""


def is_name(given: Any) -> bool:
    """Whether what the user gave is the name of a source here, even beside a file that is called the same."""
    return isinstance(given, str) and given.partition(":")[0] in NOISES


@register_source(f"made-up samples: {', '.join(NOISES)} (or {NOISES[-1]}:N for N of them)", opens=is_name)
class NoiseSource(RowSource):
    """Sample i is the same for a given seed, whatever the batch size or the order.

    `gaussian` is standard normal at the model's input (the paper's choice). The others are pictures where the
    input has two axes or more beside the sample's, and correlated columns where it has one. Where the recipe
    names a scale, a mean or a deviation, pictures are made as pixels and go through the same preprocessing as
    real ones; otherwise they have mean 0 and deviation 1, as normalised ones would.
    """

    def __init__(self, opening: Opening) -> None:
        """Check that every input can be made up.

        Raises:
            DataError: N is not a positive number, an input has no or a dynamic dimension, or it holds whole numbers
                of which the graph does not tell the range.
        """
        spec, graph = opening.spec, opening.graph
        if ":" not in spec and Path(spec).exists():
            raise DataError(f"{spec!r}: made-up samples or the path here? write {spec}:20000 or .{os.sep}{spec}")
        refuse_scalars(opening.inputs)
        super().__init__(spec, opening.inputs, opening.recipe)
        self._kind, _, count = spec.partition(":")
        if ":" not in spec:
            count = str(DEFAULT_LENGTH)
        if not _COUNT.fullmatch(count):
            raise DataError(
                f"{spec}: expected {self._kind}:N with a number of samples N of at least 1, found '{count[:40]}'"
            )
        self.length = int(count)
        self._seed = opening.seed
        values = {} if graph is None else {value.name or "": value for value in graph.inputs}
        self._makers = {entry.name: self._maker(place, entry, values) for place, entry in enumerate(self.inputs)}

    def _fetch(self, rows: NDArray[np.int64]) -> Batch:
        return Batch({name: make(rows) for name, make in self._makers.items()}, None)

    def _content(self) -> Iterator[bytes]:
        yield f"{self._kind} {self.length} {self._seed}".encode()
        bound = [(entry.sizes, entry.low, entry.high) for entry in self.inputs]
        yield repr(bound).encode() if any(any(part is not None for part in each) for each in bound) else b""

    def _maker(self, place: int, entry: InputSpec, values: Mapping[str, ir.Value]) -> Make:
        image = self._kind != "gaussian" and len(entry.shape) == IMAGE_RANK
        if not entry.is_float and not (image and entry.dtype == np.uint8):
            return self._whole_numbers(place, entry, values)
        shape = _sample_shape(entry, self.spec)
        if entry.low is not None or entry.high is not None or "mask" in entry.name.lower():
            return lambda rows: self._each(rows, place, lambda rng: floats(entry, (1, *shape), rng).astype(entry.dtype))
        if self._kind == "gaussian":
            return lambda rows: self._normal(rows, place, shape).astype(entry.dtype, copy=False)
        if len(shape) == 1:
            loadings = self._loadings(place, shape[0])
            return lambda rows: self._table(rows, place, loadings).astype(entry.dtype, copy=False)
        return self._pictures(place, entry, shape)

    def _rng(self, place: int, row: int) -> np.random.Generator:
        # One generator per sample: slower than one per batch, but any sample can be had at any time.
        return np.random.default_rng((self._seed, place, row))

    def _normal(self, rows: NDArray[np.int64], place: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        values = np.empty((len(rows), *shape), dtype=np.float32)
        for value, row in zip(values, rows.tolist(), strict=True):
            self._rng(place, row).standard_normal(out=value, dtype=np.float32)
        return values

    def _loadings(self, place: int, columns: int) -> NDArray[np.float32]:
        """How every column depends on the hidden quantities, (factors, columns), each column of length 1."""
        # No sample has this number, so its generator is free.
        drawn = self._rng(place, DEFAULT_LENGTH**3).standard_normal((FACTORS, columns), dtype=np.float32)
        return np.asarray(drawn / np.sqrt(np.square(drawn).sum(axis=0)), dtype=np.float32)

    def _table(self, rows: NDArray[np.int64], place: int, loadings: NDArray[np.float32]) -> NDArray[np.float32]:
        drawn = self._normal(rows, place, (FACTORS + loadings.shape[1],))
        # Summed factor by factor: a matrix product may round otherwise in a batch of another size.
        common = np.zeros((len(rows), loadings.shape[1]), np.float32)
        for factor, loading in enumerate(loadings):
            common += drawn[:, factor : factor + 1] * loading
        table = math.sqrt(1 - EXPLAINED) * drawn[:, FACTORS:] + math.sqrt(EXPLAINED) * common
        return np.asarray(table, dtype=np.float32)

    def _whole_numbers(self, place: int, entry: InputSpec, values: Mapping[str, ir.Value]) -> Make:
        if entry.name not in values:
            raise DataError(
                f"{self.spec}: input {entry} holds no floats, so random values mean nothing to it; give data"
            )
        shapes = {other.name: (1, *_sample_shape(other, self.spec)) for other in self.inputs}
        longest, value = longest_sequence(self.inputs, shapes), values[entry.name]
        shape = shapes[entry.name]
        return lambda rows: self._each(rows, place, lambda rng: whole_numbers(entry, shape, value, rng, longest))

    def _each(self, rows: NDArray[np.int64], place: int, draw: Callable[[np.random.Generator], Array]) -> Array:
        """What is drawn for each sample alone, one behind the other."""
        return np.concatenate([draw(self._rng(place, row)) for row in rows.tolist()])

    def _pictures(self, place: int, entry: InputSpec, shape: tuple[int, ...]) -> Make:
        last = len(shape) == IMAGE_RANK - 1 and layout_of(entry, self.recipe) == "NHWC"
        channels, height, width = _plane(shape, channels_last=last)
        leaves = self._kind == "leaves" and min(height, width) >= _LEAST_SIDE
        painter = (Painter.of_leaves if leaves else Painter)(channels, height, width)

        def make(rows: NDArray[np.int64]) -> Array:
            normal = np.empty((len(rows), painter.normals), np.float32)
            uniform = np.empty((len(rows), painter.uniforms), np.float32)
            for one, other, row in zip(normal, uniform, rows.tolist(), strict=True):
                rng = self._rng(place, row)
                rng.standard_normal(out=one, dtype=np.float32)
                rng.random(out=other, dtype=np.float32)
            pictures = painter.paint(normal, uniform)
            pictures = pictures.transpose(0, 2, 3, 1) if last else pictures.reshape(len(rows), *shape)
            return self._prepared(pictures, entry, rows)

        return make

    def _prepared(self, pictures: NDArray[np.float32], entry: InputSpec, rows: NDArray[np.int64]) -> Array:
        """Pictures as the model's input; standard ones where nothing tells how the model wants them."""
        pixels = np.clip(np.float32(MEAN) + np.float32(_BEFORE_CUT * DEVIATION) * pictures, 0, 1)
        if not entry.is_float:
            return cast(np.rint(pixels / BYTE_SCALE).astype(np.uint8), entry, self.spec, rows)
        recipe = self.recipe
        known = recipe.scale is not None or recipe.mean is not None or recipe.std is not None
        if known and len(entry.shape) == IMAGE_RANK:
            pixels = np.ascontiguousarray(pixels) / np.float32(BYTE_SCALE)
            normalise(pixels, entry, recipe, self.spec, scale=BYTE_SCALE)
        else:
            pixels = (pixels - np.float32(MEAN)) / np.float32(DEVIATION)
        return cast(pixels, entry, self.spec, rows)


def _plane(shape: tuple[int, ...], *, channels_last: bool) -> tuple[int, int, int]:
    """Channels, height and width of a sample: its last two axes are the plane, all before them channels."""
    if channels_last:
        return shape[2], shape[0], shape[1]
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def _sample_shape(entry: InputSpec, spec: str) -> tuple[int, ...]:
    shape: list[int] = []
    bound = entry.shape if entry.sizes is None else entry.sizes
    for axis, (declared, told) in enumerate(zip(entry.shape[1:], bound[1:], strict=True), start=1):
        size = declared if isinstance(declared, int) else told
        if not isinstance(size, int):
            size_key = "set size = [height, width] under [data], " if len(entry.shape) == IMAGE_RANK else ""
            way_out = f"{size_key}bind it by --shape {entry.name}=N,..., or give data"
            raise DataError(f"{spec}: dimension {axis} ({size or '?'}) of input {entry} is dynamic; {way_out}")
        shape.append(size)
    if not 0 < math.prod(shape) <= MOST_VALUES:
        raise DataError(
            f"{spec}: a sample of input {entry} has {math.prod(shape):,} values, expected 1 to "
            f"{MOST_VALUES:,}; check the model"
        )
    return tuple(shape)
