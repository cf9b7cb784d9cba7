"""Encoded images (JPEG, PNG, ...) to a model's image input, a batch at a time."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ndonnx.config.recipe import DataRecipe
from ndonnx.data.preprocess import IMAGE_CHANNELS, IMAGE_RANK, layout_of, normalise
from ndonnx.data.source import first_line
from ndonnx.data.specs import InputSpec, cast
from ndonnx.errors import DataError

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""Tried by content. No others: some of Pillow's formats start outside programs."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
BYTE_SCALE = 1 / 255
_FAULTS = (OSError, SyntaxError, ValueError, TypeError, IndexError, EOFError, struct.error, zlib.error, MemoryError)
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)

Encoded = tuple[str, bytes | Path]
"""How to name an image in a message, and its bytes or its file."""


class ImageReader:
    """Decodes, resizes, normalises and lays out images for a model with a single image input."""

    def __init__(self, spec: str, inputs: Sequence[InputSpec], recipe: DataRecipe) -> None:
        """Check once that images can be fed to the model at all.

        Raises:
            DataError: the model has several inputs, or its input is no image of 1 or 3 channels.
        """
        if len(inputs) != 1:
            raise DataError(
                f"{spec}: images feed one input, but the model has {len(inputs)} "
                f"({', '.join(map(str, inputs))}); give an .npz or module:function"
            )
        self.input = inputs[0]
        self.recipe = recipe
        self.channels_first = layout_of(self.input, recipe) == "NCHW"
        if len(self.input.shape) != IMAGE_RANK or self.input.dtype.kind not in "fu":
            raise DataError(f"{spec}: expected an image input of rank 4, but the model's is {self.input}; give an .npz")
        channels, height, width = self._dimensions()
        if isinstance(channels, int) and channels not in IMAGE_CHANNELS:
            layout = layout_of(self.input, recipe)
            raise DataError(
                f"{spec}: images have 1 or 3 channels, but the model's input is {self.input}, "
                f"read as {layout}; set layout under [data] or give an .npz"
            )
        if not isinstance(channels, int) and recipe.layout is None:
            raise DataError(f"{spec}: the layout cannot be read off the input {self.input}; set layout under [data]")
        if not self.input.is_float and (recipe.scale, recipe.mean, recipe.std) != (None, None, None):
            raise DataError(f"{spec}: the input {self.input} takes raw pixels; remove scale, mean, std under [data]")
        self.mode = "L" if channels == 1 else "RGB"
        self.size = (width, height) if isinstance(height, int) and isinstance(width, int) else None

    def read(self, images: Sequence[Encoded], rows: NDArray[np.int64]) -> NDArray[np.generic]:
        """The images as one array of the input's type and layout.

        Raises:
            DataError: an image is corrupt, absurdly large, or of another size than the others.
        """
        pixels = self._decode_all(images)
        turned = pixels.transpose(0, 3, 1, 2) if self.channels_first else pixels
        if not self.input.is_float:
            return cast(turned, self.input, images[0][0], rows)
        # Through a buffer of the final layout: numpy would else keep the pixels' order in memory.
        values = np.empty(turned.shape, dtype=np.float32)
        values[...] = turned
        normalise(values, self.input, self.recipe, images[0][0], scale=BYTE_SCALE)
        return cast(values, self.input, images[0][0], rows)

    def _decode_all(self, images: Sequence[Encoded]) -> NDArray[np.uint8]:
        """All images as uint8 (n, height, width, channels)."""
        pixels: NDArray[np.uint8] | None = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # remarks on odd metadata, one for every image
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            for index, (where, encoded) in enumerate(images):
                image = self._decode(where, encoded)
                if pixels is None:
                    pixels = np.empty((len(images), *image.shape), dtype=np.uint8)
                if image.shape != pixels.shape[1:]:
                    raise DataError(
                        f"{where}: expected {pixels.shape[1:3]} pixels (height, width) as the images "
                        f"before, found {image.shape[:2]}; set size under [data]"
                    )
                pixels[index] = image
        assert pixels is not None, "a batch holds at least one image"
        return pixels

    def _decode(self, where: str, encoded: bytes | Path) -> NDArray[np.uint8]:
        try:
            with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded, formats=FORMATS) as opened:
                image: Image.Image = opened if opened.mode == self.mode else opened.convert(self.mode)
                if self.size is not None and image.size != self.size:
                    image = image.resize(self.size, Image.Resampling.BILINEAR)
                pixels = np.asarray(image, dtype=np.uint8)
        except _BOMBS as error:
            raise DataError(f"{where}: {error}; leave that image out or make it smaller") from error
        except _FAULTS as error:
            raise DataError(f"{where}: cannot decode the image: {_one_line(error)}; mend or drop it") from error
        return pixels.reshape(*pixels.shape[:2], -1)

    def _dimensions(self) -> tuple[int | str | None, int | str | None, int | str | None]:
        _, first, second, third = self.input.shape
        return (first, second, third) if self.channels_first else (third, first, second)


def _one_line(error: BaseException) -> str:
    # Pillow names the memory buffer by its address, which tells the reader nothing.
    return first_line(error).split(" <_io.BytesIO")[0]
