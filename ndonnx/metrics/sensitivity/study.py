"""The whole study: figures 1, 4 and 6 of the paper for one model, and every neighbourhood's tolerance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from ndonnx.assemble.splice import splice
from ndonnx.distill.gate import open_slice
from ndonnx.errors import SliceError, UsageError
from ndonnx.graph.precision import in_float32, in_own_types
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.metrics.partial import PartialModels, Quality
from ndonnx.metrics.sensitivity.noise import AMPLITUDES, Draws, JointNoise, Point, noise_curve, noisy_weights
from ndonnx.metrics.sensitivity.tolerance import Tolerance, tolerance_of
from ndonnx.runtime.faults import Fault, tried
from ndonnx.runtime.progress import Progress, Silent
from ndonnx.students import TeacherSlice
from ndonnx.students.methods.width import Width

KEEP = (0.25, 0.5, 0.75)
REPEATS = 3
_PROBE = 8
"""Samples on which it is tried how many a slice takes at once."""
SHAPING_SAMPLES, _SHAPING_BYTES = 1024, 32 * 2**20
"""Most samples, and most bytes of them, by which a student is shaped, as in a distillation."""
STUDIED = 0.75
"""Part of the samples at hand by which outputs are compared; students are shaped on the others."""

Where = Literal["one", "half", "all"]
Scale = Literal["relative", "absolute"]


@dataclass(frozen=True)
class Curve:
    """Noise of growing amplitude (figure 1), behind one neighbourhood or behind several at once."""

    where: Where
    """`half` is every second neighbourhood, the first among them."""
    name: str
    """The neighbourhood, or the same as `where`."""
    scale: Scale
    """Noise in proportion to each activation's deviation, or of one size for all of them."""
    points: tuple[Point, ...]


@dataclass(frozen=True)
class WeightNoise:
    """Noise on the weights of one neighbourhood after the other, and of all at once (figure 4)."""

    amplitude: float
    """Deviation of the noise, as a part of each weight tensor's own."""
    singles: Mapping[str, float]
    """Drop when one neighbourhood alone has it."""
    composed: float
    """Drop when all have it."""

    @property
    def total(self) -> float:
        """What the composed drop would be, were drops additive."""
        return math.fsum(self.singles.values())


@dataclass(frozen=True)
class Shrunk:
    """One neighbourhood with part of its width, weights in closed form and untrained (figure 6)."""

    name: str
    keep: float
    nmse: float | None
    drop: float | None
    divergence: float | None
    reason: str | None = None
    """Why there is no such student."""


@dataclass(frozen=True)
class ThresholdReport:
    """What a study has found; drops are in the unit of `metric`, 0 means as good as the teacher."""

    model: str
    data: str
    samples: int
    metric: str
    """`accuracy`, `agreement` with the teacher's top class, or `nmse` of the outputs."""
    teacher: float
    """The teacher's own figure."""
    max_drop: float
    repeats: int
    seed: int
    deviations: Mapping[str, float]
    """Deviation of each neighbourhood's exit: the square root of its mean variance over samples."""
    noise: tuple[Curve, ...]
    weights: tuple[WeightNoise, ...]
    width: tuple[Shrunk, ...]
    tolerances: tuple[Tolerance, ...]
    """Read off the curves of noise."""
    student_tolerances: tuple[Tolerance, ...]
    """Read off the students of `width`: stricter, for what follows averages independent noise away."""
    kept: Mapping[str, str]
    """Neighbourhoods that noise could not be put behind, and why."""
    seconds: float = 0.0
    files: tuple[str, ...] = ()
    """What was written."""
    exits: Mapping[str, str] = field(default_factory=dict)
    """The value at which each neighbourhood ends: a run that is given the study knows by it whose it is."""

    def to_json(self) -> dict[str, Any]:
        """As one JSON document, which has no NaN or Inf: such numbers become null."""
        document = asdict(self)
        for found, written in zip(self.weights, document["weights"], strict=True):
            written["sum"] = found.total
        cleaned = _clean(document)
        assert isinstance(cleaned, dict)
        return cleaned


def check_study(samples: int, amplitudes: Sequence[float], repeats: int, keep: Sequence[float]) -> None:
    """Refuse numbers with which nothing can be measured.

    Raises:
        UsageError: with the flag that is out of range.
    """
    for flag, value in (("samples", samples), ("repeats", repeats)):
        if value < 1 + (flag == "samples"):
            raise UsageError(f"--{flag} {value}: expected at least {1 + (flag == 'samples')}")
    for flag, numbers, most in (("amplitudes", amplitudes, math.inf), ("keep", keep, 1.0)):
        wrong = next((number for number in numbers if not 0 < number <= most or math.isinf(number)), None)
        if wrong is not None or not numbers:
            expected = "numbers above 0" + ("" if math.isinf(most) else f" to {most:g}")
            raise UsageError(f"--{flag}: expected {expected}, found {'none' if wrong is None else f'{wrong:g}'}")


@dataclass(frozen=True)
class StudyPlan:
    """What a study tries."""

    amplitudes: Sequence[float] = AMPLITUDES
    """Deviations of the noise, as fractions of each value's own."""
    repeats: int = REPEATS
    """Number of draws of the noise at each amplitude."""
    keep: Sequence[float] = KEEP
    """Multipliers of the untrained students (figure 6)."""
    max_drop: float = 0.01
    """Drop that the tolerances are for, in the metric's own unit."""
    round_to: int | None = None
    """Kept widths become multiples of this; None: as in a recipe."""
    seed: int = 0
    """Seed of all noise."""
    threads: int = 1
    """Number of onnxruntime's threads where a student is shaped."""

    @property
    def draws(self) -> Draws:
        """The noise that is tried."""
        return Draws(sorted(self.amplitudes), self.repeats, self.seed)


def study(
    partials: PartialModels,
    plan: StudyPlan,
    *,
    shaping: PartialModels | None = None,
    progress: Progress | None = None,
) -> ThresholdReport:
    """Measure how much error a model tolerates, and where (sections 2 and 5, figures 1, 4 and 6).

    Args:
        partials: the teacher on the samples by which it is compared.
        plan: what is tried.
        shaping: the teacher on other samples, by which students are shaped. None: the same ones, on which they then
            look better than they are.
        progress: told how far it has got.
    """
    progress = progress or Silent()
    quality, max_drop = partials.quality, plan.max_drop
    deviations, kept = _deviations(partials)
    study = _Study(partials, quality, plan, progress)
    curves = study.noise(deviations)
    weights = study.weights()
    width = study.width(shaping or partials)
    return ThresholdReport(
        model="",
        data="",
        samples=partials.samples,
        metric=quality.kind,
        teacher=quality.metric(partials.outputs),
        max_drop=max_drop,
        repeats=plan.repeats,
        seed=plan.seed,
        deviations=deviations,
        noise=tuple(curves),
        weights=weights,
        width=width,
        tolerances=tuple(tolerance_of(c.name, c.points, max_drop) for c in curves if c.where == "one"),
        student_tolerances=tuple(_of_students(width, deviations, max_drop)),
        kept=kept,
        exits={n.name: n.exit.name or "" for n in partials.parts.distillable if n.exit is not None},
    )


def _deviations(partials: PartialModels) -> tuple[dict[str, float], dict[str, str]]:
    """Deviation of every exit that noise can be added to; of the others, why not."""
    deviations: dict[str, float] = {}
    kept: dict[str, str] = {}
    for name in partials.names:
        try:
            deviations[name] = math.sqrt(partials.variance(name))
        except SliceError as error:
            kept[name] = str(error)
    return deviations, kept


@dataclass(frozen=True)
class _Study:
    """The three measurements of a study."""

    partials: PartialModels
    quality: Quality
    plan: StudyPlan
    progress: Progress

    def noise(self, deviations: Mapping[str, float]) -> list[Curve]:
        """Noise behind each neighbourhood alone, behind half of them, and behind all (figure 1)."""
        names, draws = list(deviations), self.plan.draws
        joint = 4 if names else 0  # half and all of them, each relative and absolute
        self.progress.stage("noise", (len(names) + joint) * draws.count, "runs")
        on_step = self.progress.advance
        curves = [
            Curve("one", name, "relative", noise_curve(self.partials, self.quality, name, draws, on_step=on_step))
            for name in names
        ]
        return [*curves, *self._joint(names, float(np.median(list(deviations.values()))))] if names else curves

    def _joint(self, names: Sequence[str], typical: float) -> Iterator[Curve]:
        """Noise behind half and behind all neighbourhoods; in absolute units of the median deviation, `typical`."""
        places: tuple[tuple[Where, Sequence[str]], ...] = (("half", names[::2]), ("all", names))
        for where, chosen in places:
            noise, draws = JointNoise(self.partials, self.quality, chosen), self.plan.draws
            for relative in (True, False):
                points = (
                    noise.point(
                        amplitude if relative else amplitude * typical,
                        draws,
                        relative=relative,
                        on_step=self.progress.advance,
                    )
                    for amplitude in draws.amplitudes
                )
                yield Curve(where, where, "relative" if relative else "absolute", tuple(points))

    def weights(self) -> tuple[WeightNoise, ...]:
        """Noise on the weights of each neighbourhood, and of all (figure 4)."""
        draws = self.plan.draws
        self.progress.stage("weights", (len(self.partials.names) + 1) * draws.count, "runs")
        return tuple(self._weight_noise(amplitude) for amplitude in draws.amplitudes)

    def _weight_noise(self, amplitude: float) -> WeightNoise:
        singles: dict[str, list[float]] = {}
        composed: list[float] = []
        partials, quality = self.partials, self.quality
        for repeat in range(self.plan.repeats):
            slices: dict[str, ir.Model] = {}
            for n in partials.parts.distillable:
                slice_ = noisy_weights(partials.parts.slice_of(n), n.name, amplitude, (self.plan.seed, repeat))
                if slice_ is not None:
                    slices[n.name] = slice_
                    drop = quality.drop(partials.replaced(n.name, slice_)) if amplitude else 0.0
                    singles.setdefault(n.name, []).append(drop)
                self.progress.advance()
            whole = bool(slices) and amplitude > 0
            composed.append(quality.drop(partials.whole(_spliced(partials, slices))) if whole else 0.0)
            self.progress.advance()
        means = {name: float(np.mean(drops)) for name, drops in singles.items()}
        return WeightNoise(amplitude, means, float(np.mean(composed)))

    def width(self, shaping: PartialModels) -> tuple[Shrunk, ...]:
        """Students by least squares, each alone in its place (figure 6)."""
        self.progress.stage("width", len(self.partials.names) * len(self.plan.keep), "students")
        return tuple(self._shrunk(shaping))

    def _shrunk(self, shaping: PartialModels) -> Iterator[Shrunk]:
        plan = self.plan
        for n in self.partials.parts.distillable:
            teacher = tried(partial(_teacher_slice, shaping, n.name, plan.threads))
            for multiplier in sorted(plan.keep):
                method = Width(multiplier, plan.round_to)
                found: Shrunk | Fault
                if isinstance(teacher, Fault):
                    found = teacher
                else:
                    found = tried(partial(_measured, self.partials, self.quality, teacher, method, plan.seed))
                yield (
                    Shrunk(n.name, multiplier, None, None, None, found.reason) if isinstance(found, Fault) else found
                )
                self.progress.advance()


def _spliced(partials: PartialModels, slices: Mapping[str, ir.Model]) -> ir.Model:
    parts = partials.parts
    return splice(parts.model, {name: parts.as_in_teacher(slice_) for name, slice_ in slices.items()})


def _measured(partials: PartialModels, quality: Quality, teacher: TeacherSlice, method: Width, seed: int) -> Shrunk:
    slice_ = partials.parts.slice_of(next(n for n in partials.parts.distillable if n.name == teacher.name))
    student = in_own_types(method.build(teacher, np.random.default_rng(seed)).model, slice_)
    outputs, nmse = partials.measured(teacher.name, partials.answer_of(teacher.name, student))
    return Shrunk(teacher.name, method.keep, nmse, quality.drop(outputs), quality.divergence(outputs))


def _of_students(width: Sequence[Shrunk], deviations: Mapping[str, float], max_drop: float) -> Iterator[Tolerance]:
    for name, deviation in deviations.items():
        points = [
            Point(math.sqrt(one.nmse), math.sqrt(one.nmse) * deviation, one.nmse, one.drop, one.divergence)
            for one in width
            if one.name == name and one.nmse is not None and one.drop is not None and one.divergence is not None
        ]
        if points:
            yield tolerance_of(name, points, max_drop)


def _teacher_slice(partials: PartialModels, name: str, threads: int) -> TeacherSlice:
    n = next(n for n in partials.parts.distillable if n.name == name)
    if n.groups is None:
        raise SliceError(f"{name}: no width to shrink inside")
    first = partials.inputs_of(name, 1)
    constants = frozenset(value for value in first if partials.is_constant(value))
    per_sample = sum(array.nbytes for value, array in first.items() if value not in constants)
    samples = partials.inputs_of(name, min(SHAPING_SAMPLES, max(1, _SHAPING_BYTES // max(1, per_sample))))
    model = in_float32(infer_shapes(partials.parts.slice_of(n)))
    probe = {value: array if value in constants else array[:_PROBE] for value, array in samples.items()}
    model = open_slice(model, [value for value in samples if value not in constants], probe, threads)
    return TeacherSlice(name, model, n.groups, samples, threads, constants)


def _clean(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
