"""The largest error that each neighbourhood may have: where the curve of drop against NMSE crosses a given drop."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ndonnx.errors import SliceError
from ndonnx.metrics.partial import PartialModels, Quality
from ndonnx.metrics.sensitivity.noise import Draws, Point, Step, error_curve, noise_curve

_SMALL = 0.011
"""NMSE up to which noise counts as small: a tenth of the activation's deviation."""
_ENOUGH = 3.0
"""Curves are followed up to so many times the allowed drop."""


@dataclass(frozen=True)
class Tolerance:
    """What one neighbourhood tolerates when there is an error at its exit alone."""

    name: str
    nmse: float | None
    """The largest NMSE at the exit that costs at most the allowed drop; None where not even `largest` costs more,
    or nothing could be measured."""
    largest: float
    """The largest NMSE that was tried."""
    sensitivity: float | None
    """Divergence of the answers over the NMSE at the exit, for small noise; None where nothing could be measured."""
    reason: str | None = None
    """Why nothing could be measured."""

    def to_json(self) -> dict[str, Any]:
        """As a mapping for JSON."""
        return {key: value if _finite(value) else None for key, value in asdict(self).items()}


def tolerances(
    partials: PartialModels,
    quality: Quality,
    max_drop: float,
    *,
    names: Collection[str] | None = None,
    students: Mapping[str, ir.Model] | None = None,
    draws: Draws | None = None,
    on_step: Step = lambda: None,
) -> dict[str, Tolerance]:
    """How much error each neighbourhood tolerates (the threshold of section 2), by a few amplitudes of noise at each.

    Args:
        partials: the teacher.
        quality: how its outputs are compared.
        max_drop: what one neighbourhood's error may cost, in the quality's own unit (0.01: a point of accuracy).
        names: of neighbourhoods; all by default.
        students: slices whose own error, scaled, takes the noise's place in their neighbourhoods. Their tolerance is
            the stricter and the truer one: what follows averages independent noise away.
        draws: the noise; None: one draw at each usual amplitude. A curve is followed up to three times the allowed
            drop.
        on_step: called after every run.

    Returns:
        One for each name, in the partition's order; of one that cannot be measured, the reason.
    """
    found: dict[str, Tolerance] = {}
    draws = draws or Draws()
    for name in partials.names:
        if names is not None and name not in names:
            continue
        student, enough = (students or {}).get(name), _ENOUGH * max_drop
        try:
            points = (
                noise_curve(partials, quality, name, draws, enough=enough, on_step=on_step)
                if student is None
                else error_curve(partials, quality, name, student, draws.amplitudes, enough=enough, on_step=on_step)
            )
        except SliceError as error:
            found[name] = Tolerance(name, None, 0.0, None, str(error))
        else:
            found[name] = tolerance_of(name, points, max_drop)
    return found


def tolerance_of(name: str, points: Sequence[Point], max_drop: float) -> Tolerance:
    """Read the tolerance off a measured curve, made monotone and linear in between; it begins at no error, no drop."""
    ordered = sorted(points, key=lambda point: point.nmse)
    errors = [0.0, *(point.nmse for point in ordered)]
    drops = [max(0.0, drop) for drop in isotonic([0.0, *(point.drop for point in ordered)])]
    over = next((i for i, drop in enumerate(drops) if drop > max_drop), None)
    limit = None if over is None else _crossing(errors, drops, over, max_drop)
    return Tolerance(name, limit, errors[-1], _sensitivity(ordered))


def isotonic(values: Sequence[float]) -> list[float]:
    """The non-decreasing sequence that is nearest by least squares: neighbours out of order become their mean."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (one, few), (other, more) = blocks[-2:]
            blocks[-2:] = [((one * few + other * more) / (few + more), few + more)]
    return [value for value, count in blocks for _ in range(count)]


def _crossing(errors: Sequence[float], drops: Sequence[float], over: int, max_drop: float) -> float:
    """Where the line to the first point over the allowed drop crosses it; the start itself is never over."""
    before, after = drops[over - 1], drops[over]
    part = (max_drop - before) / (after - before)
    return errors[over - 1] + part * (errors[over] - errors[over - 1])


def _sensitivity(points: Sequence[Point]) -> float | None:
    """Least-squares slope through the origin over the small errors, or that of the smallest one."""
    useful = [point for point in points if point.nmse > 0 and math.isfinite(point.divergence)]
    small = [point for point in useful if point.nmse <= _SMALL] or useful[:1]
    if not small:
        return None
    weight = float(np.sum([point.nmse**2 for point in small]))
    return float(np.sum([point.nmse * point.divergence for point in small])) / weight


def _finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
