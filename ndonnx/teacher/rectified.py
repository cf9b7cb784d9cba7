"""The rectified normal distribution, max(0, x): its moments, and the normal that has given moments behind a ReLU."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_REACH = 6.0
"""Means, in deviations, beyond which a channel counts as always off (below) or always on (above)."""
_STEPS = 4001
_erfc = np.frompyfunc(math.erfc, 1, 1)  # unlike 1 + erf it keeps its digits far below the mean


def rectified_moments(mean: npt.ArrayLike, std: npt.ArrayLike) -> tuple[Array, Array]:
    """Mean and deviation of max(0, x) for a normal x with these moments; a deviation of 0 is allowed."""
    mu, sigma = np.broadcast_arrays(np.asarray(mean, np.float64), np.asarray(std, np.float64))
    ratio = mu / np.maximum(sigma, np.finfo(np.float64).tiny)
    first, second = _standard_moments(np.clip(ratio, -40, 40))
    first, second = first * sigma, second * sigma**2
    fixed = np.abs(ratio) >= 40  # what the ReLU does to (almost) a constant
    on = np.maximum(mu, 0)
    first = np.where(fixed, on, first)
    variance = np.where(fixed, np.where(mu > 0, sigma**2, 0), np.maximum(second - first**2, 0))
    return first, np.sqrt(variance)


def rectified_parameters(mean: npt.ArrayLike, std: npt.ArrayLike) -> tuple[Array, Array]:
    """Mean and deviation of the normal x for which max(0, x) has these moments.

    Channels that never exceed 0 become 0; those whose mean lies more than 6 deviations above it stay as they are.
    """
    wanted, spread = np.broadcast_arrays(np.asarray(mean, np.float64), np.asarray(std, np.float64))
    ratios, grid = _table()
    alive = wanted > 0
    share = np.where(alive, wanted**2 / np.where(alive, wanted**2 + spread**2, 1), 0)
    position = np.interp(share, ratios, grid)
    first, _ = _standard_moments(position)
    sigma = np.where(alive, wanted / first, 0)
    mu = position * sigma
    always = alive & (share >= ratios[-1])
    return np.where(always, wanted, mu), np.where(always, spread, sigma)


@cache
def _table() -> tuple[Array, Array]:
    """Square of the mean over the second moment, which grows with the mean in deviations; and those means."""
    grid = np.linspace(-_REACH, _REACH, _STEPS)
    first, second = _standard_moments(grid)
    return first**2 / second, grid


def _standard_moments(mean: Array) -> tuple[Array, Array]:
    """First and second moment of max(0, x) for a normal x with this mean and deviation 1."""
    density = np.exp(-mean * mean / 2) / math.sqrt(2 * math.pi)
    part = np.asarray(_erfc(-mean / math.sqrt(2)), dtype=np.float64) / 2
    return density + mean * part, (mean * mean + 1) * part + mean * density
