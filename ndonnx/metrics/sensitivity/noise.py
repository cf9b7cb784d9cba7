"""Gaussian noise in the teacher: behind one neighbourhood, behind several at once, or on a slice's weights.

All draws come from (seed, repeat, neighbourhood, batch) alone: a larger amplitude scales the same
noise, so that curves are smooth, and the number of threads changes nothing.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ndonnx.graph.initializers import set_numbers
from ndonnx.graph.interface import samples_first
from ndonnx.metrics.partial import Change, PartialModels, Quality
from ndonnx.partition.layers import weight_slot
from ndonnx.teacher import make_session
from ndonnx.teacher.noise_inputs import Noise, add_noise_inputs

AMPLITUDES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Deviations of the noise, as parts of the activation's own."""

_ROUNDING = 1e-10
"""NMSE that comes of rounding alone: a student as near as this has no error to be scaled."""

Array = npt.NDArray[Any]
Step = Callable[[], None]


@dataclass(frozen=True)
class Point:
    """What noise of one amplitude does, mean over the repeats."""

    amplitude: float
    """Deviation of the noise, as a part of the activation's deviation over samples."""
    epsilon: float
    """Deviation of the noise in the activation's own units; the median where noise is at several places."""
    nmse: float
    """Normalised squared error of the noisy exit; the mean where there are several."""
    drop: float
    divergence: float


@dataclass(frozen=True)
class Draws:
    """The noise that is tried."""

    amplitudes: Sequence[float] = AMPLITUDES
    """Deviations of the noise, ascending, as fractions of each activation's own."""
    repeats: int = 1
    """Number of draws at each amplitude."""
    seed: int = 0

    @property
    def count(self) -> int:
        """Number of draws in all."""
        return len(self.amplitudes) * self.repeats


def noise_curve(
    partials: PartialModels,
    quality: Quality,
    name: str,
    draws: Draws,
    *,
    enough: float = math.inf,
    on_step: Step = lambda: None,
) -> tuple[Point, ...]:
    """What noise behind one neighbourhood does to the model's answers (section 2, figure 1).

    Args:
        partials: the teacher.
        quality: how its outputs are compared.
        name: of the neighbourhood.
        draws: the noise.
        enough: no further amplitude is tried once a drop is over this.
        on_step: called after every run.

    Raises:
        SliceError: the exit holds NaN or Inf, or has no sample axis.
    """
    deviation = math.sqrt(partials.variance(name))
    points: list[Point] = []
    for amplitude in draws.amplitudes:
        found = []
        for repeat in range(draws.repeats):
            found.append(_one_run(partials, quality, name, amplitude * deviation, (draws.seed, repeat)))
            on_step()
        points.append(Point(amplitude, amplitude * deviation, *_means(found)))
        if points[-1].drop > enough:
            break
    return tuple(points)


def _one_run(
    partials: PartialModels, quality: Quality, name: str, std: float, draw: tuple[int, int]
) -> tuple[float, float, float]:
    """NMSE, drop and divergence; noise of no size leaves the teacher, and nothing is run."""
    if std == 0:
        return 0.0, 0.0, 0.0
    outputs, error = partials.measured(
        name, lambda rows, start: rows + (std * _unit(draw, name, start, rows.shape)).astype(rows.dtype)
    )
    return error, quality.drop(outputs), quality.divergence(outputs)


def error_curve(
    partials: PartialModels,
    quality: Quality,
    name: str,
    student: ir.Model,
    amplitudes: Sequence[float],
    *,
    enough: float = math.inf,
    on_step: Step = lambda: None,
) -> tuple[Point, ...]:
    """As `noise_curve`, but with the error that a student makes, scaled to each amplitude, in the noise's place.

    What follows averages independent noise away, as a pooling does; a student's error goes the same way on
    many positions and samples, and costs more at the same NMSE.

    Args:
        partials: the teacher.
        quality: how its outputs are compared.
        name: of the neighbourhood.
        student: a slice for it, as `PartialModels.replaced` takes it; one without any error gives no points.
        amplitudes: as parts of the activation's deviation, ascending.
        enough: no further amplitude is tried once a drop is over this.
        on_step: called after every run.

    Raises:
        SliceError: as `noise_curve`, or onnxruntime does not run the student.
    """
    deviation = math.sqrt(partials.variance(name))
    answer = partials.answer_of(name, student)
    _, own = partials.measured(name, answer)
    points: list[Point] = []
    for amplitude in amplitudes if own > _ROUNDING else ():
        outputs, error = partials.measured(name, _scaled(answer, amplitude / math.sqrt(own)))
        drop, divergence = quality.drop(outputs), quality.divergence(outputs)
        points.append(Point(amplitude, amplitude * deviation, error, drop, divergence))
        on_step()
        if drop > enough:
            break
    return tuple(points)


class JointNoise:
    """The whole teacher with noise behind several neighbourhoods at once (figure 1)."""

    def __init__(self, partials: PartialModels, quality: Quality, names: Sequence[str]) -> None:
        """Open the model once; `names` are neighbourhoods whose exits have a variance."""
        self._partials = partials
        self._quality = quality
        self._deviations = {name: math.sqrt(partials.variance(name)) for name in names}
        exits = {n.name: n.exit for n in partials.parts.distillable if n.exit is not None}
        self._exits = {name: exits[name].name or "" for name in names}
        noises = [Noise(self._exits[name], partials.exit(name).shape[1:], 1.0) for name in names if exits[name].uses()]
        self._fed = [name for name in names if exits[name].uses()]
        # An output that is noisy itself is no reader of its value, so its noise is added to the answers.
        self._after = [name for name in names if exits[name].is_graph_output()]
        noisy = samples_first(add_noise_inputs(partials.parts.model.clone(), noises))
        self._session = make_session(noisy, threads=1, spin=False)

    def point(self, amplitude: float, draws: Draws, *, relative: bool, on_step: Step) -> Point:
        """What noise of this amplitude does; relative to each activation's deviation, or the same at all.

        Args:
            amplitude: deviation of the noise, in place of those of the draws.
            draws: how often, and of which seed.
            relative: whether the amplitude is a fraction of each activation's own deviation.
            on_step: called after every run.
        """
        stds = {name: amplitude * (own if relative else 1.0) for name, own in self._deviations.items()}
        errors = [(stds[name] / own) ** 2 for name, own in self._deviations.items() if own > 0]
        found = []
        for repeat in range(draws.repeats):
            found.append((float(np.mean(errors)) if errors else 0.0, *self._one_run(stds, (draws.seed, repeat))))
            on_step()
        typical = float(np.median(list(self._deviations.values())))
        part = amplitude if relative else amplitude / typical if typical > 0 else 0.0
        return Point(part, float(np.median(list(stds.values()))), *_means(found))

    def _one_run(self, stds: Mapping[str, float], draw: tuple[int, int]) -> tuple[float, float]:
        if not any(stds.values()):
            return 0.0, 0.0
        dtypes = {name: self._partials.exit(name).dtype for name in stds}

        def noise(name: str, start: int, count: int) -> Array:
            shape = (count, *self._partials.exit(name).shape[1:])
            return (stds[name] * _unit(draw, name, start, shape)).astype(dtypes[name])

        outputs = self._partials.whole(
            self._session,
            lambda start, count: {f"{self._exits[name]}/noise": noise(name, start, count) for name in self._fed},
        )
        for name in self._after:
            clean, starts = outputs[self._exits[name]], self._partials.starts()
            added = [noise(name, start, min(starts.step, len(clean) - start)) for start in starts]
            outputs[self._exits[name]] = clean + np.concatenate(added)
        return self._quality.drop(outputs), self._quality.divergence(outputs)


def noisy_weights(slice_: ir.Model, name: str, amplitude: float, draw: tuple[int, int]) -> ir.Model | None:
    """A copy of a slice with noise on the weights of its linear operators (figure 4); None where it has none.

    Args:
        slice_: of the teacher; not changed.
        name: of the neighbourhood, for the draw.
        amplitude: deviation of the noise, as a part of each weight tensor's own.
        draw: seed and number of the repeat.
    """
    copy = slice_.clone()
    rng = np.random.default_rng([*draw, zlib.crc32(name.encode())])
    seen: set[str] = set()
    for node in copy.graph:
        slot = weight_slot(node)
        value = node.inputs[slot] if slot is not None else None
        if value is None or value.const_value is None or (value.name or "") in seen:
            continue
        seen.add(value.name or "")
        array = value.const_value.numpy()
        drawn = rng.standard_normal(array.shape, np.float32) * np.float32(
            amplitude * float(array.std(dtype=np.float64))
        )
        set_numbers(value, array + drawn)
    return copy if seen else None


def _scaled(answer: Change, scale: float) -> Change:
    """The teacher's rows, and so many times the answer's error."""

    def change(rows: Array, start: int) -> Array:
        moved: Array = rows + ((answer(rows, start) - rows) * scale).astype(rows.dtype)
        return moved

    return change


def _unit(draw: tuple[int, int], name: str, start: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng([*draw, zlib.crc32(name.encode()), start])
    return rng.standard_normal(shape, np.float32)


def _means(found: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(float(np.mean(column)) for column in zip(*found, strict=True))
