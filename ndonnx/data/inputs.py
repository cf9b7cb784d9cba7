"""What each input of a model is: values with samples along an axis, or one value for all samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndonnx.config.recipe import InputRecipe
from ndonnx.data.batch_axis import sample_axes
from ndonnx.data.specs import InputSpec, castable, describe, fits
from ndonnx.errors import DataError
from ndonnx.graph.interface import Interface

Array = NDArray[Any]


def settle(specs: Sequence[InputSpec], settings: Mapping[str, InputRecipe]) -> tuple[list[InputSpec], dict[str, Array]]:
    """The inputs with samples, each with their axis, and those to which the user gives one value.

    Args:
        specs: as the model declares them (`input_specs`).
        settings: `[inputs]` of the recipe, by name.

    Raises:
        DataError: a setting is of no input, or contradicts its rank, its sizes or its type.
    """
    known = ", ".join(map(str, specs))
    names = {spec.name for spec in specs}
    for name in settings:
        if name not in names:
            raise DataError(f"--input or --shape of '{name}': the model has no such input; its inputs are {known}")
    fixed = {
        spec.name: _value(spec, found.value)
        for spec in specs
        if (found := settings.get(spec.name)) is not None and found.value is not None
    }
    sampled = [spec for spec in specs if spec.name not in fixed]
    axes = sample_axes([spec.shape for spec in sampled])
    pairs = zip(sampled, axes, strict=True)
    return [_with_axis(spec, axis, settings.get(spec.name)) for spec, axis in pairs], fixed


def _value(spec: InputSpec, value: Any) -> Array:
    """What the user gives as the value of an input, in its type and shape."""
    where = f"--input {spec.name}"
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise DataError(f"{where}: expected numbers in rows of equal length") from error
    sizes = tuple(size for size in spec.shape if isinstance(size, int))
    if len(sizes) == len(spec.shape) and array.size == np.prod(sizes, dtype=int):
        array = array.reshape(sizes)
    wanted = describe(spec.dtype, spec.shape)
    if array.dtype.kind not in "biuf" or not _fits(array.shape, spec.shape):
        raise DataError(f"{where}: expected a value of {wanted}, found {describe(array.dtype, array.shape)}")
    with np.errstate(invalid="ignore", over="ignore"):
        converted = array.astype(spec.dtype)
    if not spec.is_float and not np.array_equal(converted, array):
        raise DataError(f"{where}: expected a value of {wanted}, found {array.reshape(-1)[:3].tolist()}")
    return converted


def _fits(found: Sequence[int], wanted: Sequence[int | str | None]) -> bool:
    pairs = zip(found, wanted, strict=False)
    return len(found) == len(wanted) and all(size == want for size, want in pairs if isinstance(want, int))


def _with_axis(spec: InputSpec, axis: int, setting: InputRecipe | None) -> InputSpec:
    if setting is None:
        return spec.along(axis)
    if setting.axis is not None:
        if setting.axis >= len(spec.shape):
            raise DataError(f"--input {spec.name}:axis={setting.axis}: input {spec} has {len(spec.shape)} axes")
        axis = setting.axis
    sizes = setting.shape
    if sizes is not None and not _fits(sizes, spec.shape):
        raise DataError(f"--shape {spec.name}={','.join(map(str, sizes))}: does not fit input {spec}")
    found = replace(spec, sampled=setting.axis is not None, low=setting.min, high=setting.max, sizes=sizes)
    return found.along(axis)


def interface_of(inputs: Sequence[InputSpec], fixed: Mapping[str, Array]) -> Interface:
    """How a model is fed whose inputs are these, and those that have one value."""
    batch = next((size for spec in inputs if spec.shape and isinstance(size := spec.shape[0], int)), None)
    return Interface(dict(fixed), {spec.name: spec.axis for spec in inputs if spec.axis}, batch)


def one_value(specs: Sequence[InputSpec], arrays: Mapping[str, Array], where: str) -> dict[str, Array]:
    """The arrays of a source that are one value for all samples: scalars, and arrays of an input's own fixed shape.

    Where every array has its input's own shape, they are the samples of one batch.

    Raises:
        DataError: an input without axes gets several different values, or a value of another type.
    """
    alone = {
        spec.name: arrays[spec.name]
        for spec in specs
        if not spec.shape or (not spec.sampled and arrays[spec.name].shape == spec.native)
    }
    if len(alone) == len(specs):
        alone = {spec.name: arrays[spec.name] for spec in specs if not spec.shape}
    by_name = {spec.name: spec for spec in specs}
    return {name: single_value(by_name[name], array, f"{where}: '{name}'") for name, array in alone.items()}


def single_value(spec: InputSpec, array: Array, where: str) -> Array:
    """The one value of an input that a source holds, in the input's type.

    Raises:
        DataError: it has samples with different values, or another type.
    """
    if not spec.shape and array.ndim:
        if array.size == 0 or not np.all(array == array.reshape(-1)[0]):
            raise DataError(
                f"{where}: input {spec} has no axis for the samples, so that it has one value for all of them; found "
                f"{describe(array.dtype, array.shape)} with different values; choose one by --input {spec.name}=VALUE"
            )
        array = array.reshape(-1)[0]
    if not castable(array.dtype, spec):
        found = describe(array.dtype, array.shape)
        raise DataError(f"{where}: expected {describe(spec.dtype, spec.native)}, found {found}; convert the array")
    return np.array(array, dtype=spec.dtype)


def samples_first(array: Array, spec: InputSpec) -> Array:
    """An array of samples as the model has the input, or with the samples first already, with the samples first."""
    if not spec.axis or array.ndim != len(spec.shape):
        return array
    turned = np.moveaxis(array, spec.axis, 0)
    return array if fits(array.shape, spec) and not fits(turned.shape, spec) else turned


def refuse_scalars(specs: Sequence[InputSpec]) -> None:
    """Refuse inputs without axes that nobody has given a value.

    Raises:
        DataError: there is one; tells how to give it its value.
    """
    for spec in specs:
        if not spec.shape:
            raise DataError(
                f"input {spec}: has no axis for the samples; give its value by --input {spec.name}=VALUE, or as a "
                "scalar in a .npz"
            )
