"""From raw samples to model inputs as `[data]` in the recipe says: `(x * scale - mean) / std`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ndonnx.config.recipe import DataRecipe
from ndonnx.data.specs import InputSpec, cast, castable, describe, fits
from ndonnx.errors import DataError

IMAGE_RANK = 4
IMAGE_CHANNELS = (1, 3)
Layout = Literal["NCHW", "NHWC"]
Float = np.dtype[np.float32] | np.dtype[np.float64]


def layout_of(spec: InputSpec, recipe: DataRecipe) -> Layout:
    """The recipe's layout, else the one whose channel axis could be an image's; NCHW is ONNX's own."""
    if recipe.layout is not None:
        return recipe.layout
    last_is_channel = len(spec.shape) == IMAGE_RANK and spec.shape[3] in IMAGE_CHANNELS
    return "NHWC" if last_is_channel and spec.shape[1] not in IMAGE_CHANNELS else "NCHW"


def resolve(inputs: Sequence[InputSpec], recipe: DataRecipe) -> tuple[InputSpec, ...]:
    """The inputs with the recipe's `size` in place of dynamic heights and widths.

    Raises:
        DataError: `size` or `dtype` contradicts the model.
    """
    if recipe.dtype is not None and _dtype(recipe.dtype) not in [spec.dtype for spec in inputs]:
        found = ", ".join(map(str, inputs))
        raise DataError(f"[data] dtype = {recipe.dtype!r}: the model's inputs are {found}; remove or change the key")
    if recipe.size is None:
        return tuple(inputs)
    if not any(_is_image(spec) for spec in inputs):
        found = ", ".join(map(str, inputs))
        raise DataError(f"[data] size is set, but no input of the model is an image: {found}; remove the key")
    return tuple(_with_size(spec, recipe, recipe.size) if _is_image(spec) else spec for spec in inputs)


def prepare_array(
    array: NDArray[np.generic], spec: InputSpec, recipe: DataRecipe, where: str, rows: NDArray[np.int64]
) -> NDArray[np.generic]:
    """An array (n, ...) as the model's input, with the recipe's keys applied where they are set.

    Raises:
        DataError: shape or element type does not fit, or a value is NaN or Inf.
    """
    if check_array(array.shape, array.dtype, spec, recipe, where):
        array = array.transpose(_to_layout(layout_of(spec, recipe)))
    if spec.is_float and _normalises(recipe):
        with np.errstate(over="ignore"):  # an overflow becomes Inf, which `cast` reports by sample
            values = np.array(array, dtype=_working_dtype(spec), order="C")
            normalise(values, spec, recipe, where)
        array = values
    return cast(array, spec, where, rows)


def check_array(
    shape: tuple[int, ...], dtype: np.dtype[np.generic], spec: InputSpec, recipe: DataRecipe, where: str
) -> bool:
    """Check a declared array against the model, before any of it is read.

    Returns:
        Whether the array's layout is the other one, and the recipe's `layout` allows to turn it.

    Raises:
        DataError: it does not fit; says what was expected, what was found and the way out.
    """
    native = (*shape[1 : spec.axis + 1], *shape[:1], *shape[spec.axis + 1 :])
    found = f"{where}: expected {describe(spec.dtype, spec.native)}, found {describe(dtype, native)}"
    asked = recipe.dtype is not None and _dtype(recipe.dtype) == spec.dtype
    converts = asked or (spec.is_float and _normalises(recipe))
    if not castable(dtype, spec) and not (converts and dtype.kind in "biuf"):
        way_out = "set scale or dtype under [data] to convert" if dtype.kind in "iu" else "convert the array"
        raise DataError(f"{found}; {way_out}")
    if fits(shape, spec):
        return False
    turned = len(shape) == IMAGE_RANK and fits(tuple(shape[axis] for axis in _to_layout(layout_of(spec, recipe))), spec)
    if turned and recipe.layout is not None:
        return True
    layout = layout_of(spec, recipe)
    raise DataError(f"{found}; " + (f'set layout = "{layout}" under [data] to transpose' if turned else "reshape it"))


def normalise(values: NDArray[np.generic], spec: InputSpec, recipe: DataRecipe, where: str, scale: float = 1) -> None:
    """Compute `(x * scale - mean) / std` in place; `scale` is for where the recipe names none."""
    scale = scale if recipe.scale is None else recipe.scale
    if scale != 1:
        np.multiply(values, scale, out=values, casting="same_kind")
    axis = -1 if layout_of(spec, recipe) == "NHWC" else min(1, values.ndim - 1)
    if recipe.mean is not None:
        np.subtract(values, _per_channel(recipe.mean, "mean", values, axis, where), out=values)
    if recipe.std is not None:
        np.divide(values, _per_channel(recipe.std, "std", values, axis, where), out=values)


def _per_channel(
    key: tuple[float, ...] | float, name: str, values: NDArray[np.generic], axis: int, where: str
) -> NDArray[np.generic]:
    row = np.atleast_1d(np.asarray(key, dtype=values.dtype))
    if len(row) not in (1, values.shape[axis]):
        raise DataError(
            f"{where}: [data] {name} has {len(row)} values, expected 1 or one for each of the input's "
            f"{values.shape[axis]} channels"
        )
    shape = [1] * values.ndim
    shape[axis] = len(row)
    return row.reshape(shape)


def _with_size(spec: InputSpec, recipe: DataRecipe, size: tuple[int, int]) -> InputSpec:
    first = 2 if layout_of(spec, recipe) == "NCHW" else 1
    for wanted, found in zip(size, spec.shape[first : first + 2], strict=True):
        if isinstance(found, int) and found != wanted:
            raise DataError(
                f"[data] size = {list(size)} does not fit the model's input {spec}; remove the key, "
                "images are then resized to the model's size"
            )
    return replace(spec, shape=(*spec.shape[:first], *size, *spec.shape[first + 2 :]))


def _to_layout(layout: Layout) -> tuple[int, int, int, int]:
    return (0, 3, 1, 2) if layout == "NCHW" else (0, 2, 3, 1)


def _is_image(spec: InputSpec) -> bool:
    return len(spec.shape) == IMAGE_RANK and spec.dtype.kind in "fui"


def _normalises(recipe: DataRecipe) -> bool:
    return recipe.scale is not None or recipe.mean is not None or recipe.std is not None


def _working_dtype(spec: InputSpec) -> Float:
    return np.dtype(np.float64) if spec.dtype == np.float64 else np.dtype(np.float32)


def _dtype(name: str) -> np.dtype[np.generic]:
    try:
        return np.dtype(name)
    except TypeError as error:
        raise DataError(f"[data] dtype = {name!r}: not the name of a numpy type, such as 'float32'") from error
