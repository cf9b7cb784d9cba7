"""Confidence intervals of what was measured on samples."""

from __future__ import annotations

import math

_NORMAL = 1.959963984540054
"""Quantile of the standard normal distribution at 97.5%: two-sided intervals of 95%."""

Interval = tuple[float, float]
"""Lower and upper end."""


def of_part(part: float, samples: int) -> Interval:
    """Wilson's 95% interval of a part of the samples, which is not empty at 0 or 1.

    Args:
        part: found on the samples, 0 to 1.
        samples: number of independent samples, at least 1.
    """
    z = _NORMAL**2 / samples
    centre = (part + z / 2) / (1 + z)
    reach = _NORMAL / (1 + z) * math.sqrt(part * (1 - part) / samples + z / (4 * samples))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def of_mean(total: float, squares: float, samples: int) -> Interval | None:
    """The normal 95% interval of a mean; None where fewer than two samples, or infinite ones, tell none.

    Args:
        total: sum of the samples' values.
        squares: sum of their squares.
        samples: number of independent samples.
    """
    if samples < 2 or not (math.isfinite(total) and math.isfinite(squares)):
        return None
    mean = total / samples
    variance = max(0.0, squares - samples * mean * mean) / (samples - 1)
    reach = _NORMAL * math.sqrt(variance / samples)
    return mean - reach, mean + reach
