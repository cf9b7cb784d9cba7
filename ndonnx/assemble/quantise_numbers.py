"""Numbers as integers of 8 bits: scales, zero points, weights and biases."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ndonnx.assemble.quantise_ranges import Range

_STEPS = 255
LARGEST = {False: 127, True: 63}
"""Largest integer of a weight: of 8 bits, and of 7."""
_BIAS_LIMIT = 2.0**30


def activation_scale(ends: Range) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of a uint8 value whose range, with 0 in it, has these ends."""
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    scale = np.float32((high - low) / _STEPS)
    if scale == 0:
        return np.float32(1), np.uint8(0)
    return scale, np.uint8(np.clip(np.rint(-low / float(scale)), 0, _STEPS))


def quantise_activation(values: NDArray[np.float32]) -> tuple[NDArray[np.uint8], np.float32, np.uint8]:
    """A constant as a uint8 value, with its scale and zero point."""
    scale, zero = activation_scale((float(values.min(initial=0)), float(values.max(initial=0))))
    steps = np.rint(values / scale) + np.float32(zero)
    return np.clip(steps, 0, _STEPS).astype(np.uint8), scale, zero


@dataclass
class Weights:
    """Weights in 8 bits, symmetric around 0; each is made once for all students that hold it."""

    _known: dict[tuple[str, int | None, bool], tuple[NDArray[np.int8], NDArray[np.float32]]] = field(
        default_factory=dict
    )

    def of(
        self,
        name: str,
        weight: NDArray[np.float32],
        axis: int | None,
        narrow: bool,
        least: NDArray[np.float64] | float = 0.0,
    ) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """A weight as int8 with its scales, (channels,) or () where it has one.

        Args:
            name: of the weight.
            weight: its numbers.
            axis: of the channels; None: one scale for all.
            narrow: in 7 bits.
            least: scales, (channels,), under which a bias would not fit beside the weight.
        """
        key = (name, axis, narrow)
        if key not in self._known:
            self._known[key] = _symmetric(weight, weight_scales(weight, axis, narrow), axis)
        found = self._known[key]
        return _symmetric(weight, np.maximum(found[1], least), axis) if np.any(found[1] < least) else found


def weight_scales(weight: NDArray[np.float32], axis: int | None, narrow: bool) -> NDArray[np.float32]:
    """Scales with which the largest weight of each channel is the largest integer; 1 where all are 0."""
    rest = None if axis is None else tuple(place for place in range(weight.ndim) if place != axis)
    largest = np.abs(weight).max(axis=rest) / LARGEST[narrow]
    return np.where(largest > 0, largest, 1).astype(np.float32)


def _symmetric(
    weight: NDArray[np.float32], scales: NDArray[np.float32], axis: int | None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    scales = np.asarray(scales, np.float32)
    shape = [1] * weight.ndim
    if axis is not None:
        shape[axis] = -1
    return np.clip(np.rint(weight / scales.reshape(shape)), -127, 127).astype(np.int8), scales


def least_scales(bias: NDArray[np.float32], scale: np.float32) -> NDArray[np.float64]:
    """Scales of a weight under which the bias of its layer does not fit into 32 bits, (channels,)."""
    return np.abs(bias.astype(np.float64)) / (float(scale) * _BIAS_LIMIT)


def quantise_bias(bias: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.int32]:
    """A bias in steps of the products of its layer."""
    return np.rint(bias.astype(np.float64) / scales.astype(np.float64)).astype(np.int32)
