"""The `[data]` table of a recipe: how a raw sample becomes a model input."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ndonnx.config.setting import Section


class DataRecipe(Section):
    """How a raw sample becomes a model input: `(x * scale - mean) / std` per channel.

    Images are decoded as RGB (or grey when the model's input has one channel), resized to
    `size` when it differs, scaled, normalised and laid out. Arrays from `.npz`, `.npy` and
    `module:function` are taken as they are unless a key here is set.
    """

    size: tuple[int, int] | None = None
    """Height and width of the model's image input, in pixels. Default: as the model declares them."""
    scale: float | None = None
    """Factor on the raw values. Default: 1/255 for images, 1 for arrays."""
    mean: tuple[float, ...] | float | None = None
    """Mean subtracted after scaling: one value, or one per channel. Default: 0."""
    std: tuple[Annotated[float, Field(gt=0)], ...] | Annotated[float, Field(gt=0)] | None = None
    """Standard deviation by which the values are divided after the mean: one value, or one per channel. Default: 1."""
    layout: Literal["NCHW", "NHWC"] | None = None
    """Layout of the model's image input. Default: read off the input's shape."""
    dtype: str | None = None
    """Element type of the model's input, by its name in numpy; integer arrays are converted to it. Default: the model's
    own."""
