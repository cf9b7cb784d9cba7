"""Baselines of a teacher, each as a file or with the reason why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ndonnx.data import DataSource
from ndonnx.data.inputs import interface_of
from ndonnx.errors import UsageError
from ndonnx.metrics.baselines.quantise import Dynamic, Feeds, Float16, MakeBaseline, Static
from ndonnx.metrics.evaluation import Batching, Evaluation, evaluate
from ndonnx.runtime.executor import Executor, ProcessExecutor

NAMES = {"int8": "INT8 static", "dynamic": "INT8 dynamic", "fp16": "float16"}
"""What each kind is called, by its name in a recipe."""
CALIBRATIONS = ("MinMax", "Percentile", "Entropy")
"""Ways to find ranges, of which the best on held-out samples is taken."""
CALIBRATION = 100
"""Most runs of the teacher that ranges are found on."""
_BYTES = 64 * 2**20
"""Most bytes of them."""
_CHOSEN_ON = 256
"""Most samples by which a calibration is chosen."""


@dataclass(frozen=True)
class Made:
    """One baseline: a file, or the reason why there is none."""

    name: str
    path: Path | None = None
    how: str | None = None
    """How it was made, in words."""
    reason: str | None = None


@dataclass(frozen=True)
class Material:
    """What baselines are made from."""

    teacher: Path
    folder: Path
    """Where the files go; it is there."""
    calibration: DataSource | None
    """Samples that ranges are found on. None: there are no data."""
    choosing: DataSource | None
    """Samples by which a calibration is chosen."""
    tasks: Sequence[str] = ()
    """What the user says of the outputs, as `--task` takes it."""
    metric: str | None = None
    """The user's own metric, as `--metric` takes it, which then chooses the calibration."""

    def score(self, path: Path) -> Evaluation:
        """How near a baseline is to the teacher, on the samples that choose."""
        assert self.choosing is not None
        return evaluate(
            path,
            self.choosing,
            teacher=self.teacher,
            batching=Batching(samples=_CHOSEN_ON),
            tasks=self.tasks,
            metric=self.metric,
        )


def make_baselines(kinds: Sequence[str], material: Material) -> list[Made]:
    """Make each kind of baseline; what the tools refuse is told with its reason, and ends nothing.

    Args:
        kinds: of `NAMES`.
        material: the teacher, data, and the folder that the files go to.
    """
    with ProcessExecutor(1) as worker:
        return [_made(kind, material, worker) for kind in dict.fromkeys(kinds)]


def _made(kind: str, material: Material, worker: Executor) -> Made:
    name = NAMES[kind]
    if kind == "int8":
        return _static(name, material, worker)
    path = material.folder / f"{kind}.onnx"
    make = Dynamic() if kind == "dynamic" else Float16()
    how, reason = _run(worker, MakeBaseline(name, material.teacher, path, make))
    return Made(name, None if how is None else path, how, reason)


def _static(name: str, material: Material, worker: Executor) -> Made:
    """The best calibration's file."""
    if material.calibration is None:
        return Made(name, reason="there are no data to calibrate on; give --data")
    runs = _runs(material.calibration)
    found: list[tuple[Evaluation, str, Path]] = []
    reasons = []
    for calibration in CALIBRATIONS:
        path = material.folder / f"int8-{calibration.lower()}.onnx"
        job = MakeBaseline(f"{name}, {calibration}", material.teacher, path, Static(calibration, runs))
        how, reason = _run(worker, job)
        score, reason = (None, reason) if how is None else _scored(material, path)
        if how is not None and score is not None:
            found.append((score, how, path))
        else:
            reasons.append(f"{calibration}: {reason}")
    if not found:
        return Made(name, reason="; ".join(reasons))
    _, how, best = _best(found)
    target = best.replace(material.folder / "int8.onnx")
    for _, _, path in found:
        path.unlink(missing_ok=True)
    return Made(name, target, f"{how}, the best of {len(found)} calibrations")


def _best(found: Sequence[tuple[Evaluation, str, Path]]) -> tuple[Evaluation, str, Path]:
    """The first that no other one beats."""
    best, *others = found
    for other in others:
        best = other if other[0].beats(best[0]) else best
    return best


def _scored(material: Material, path: Path) -> tuple[Evaluation | None, str | None]:
    """How near a file is to the teacher, or why that cannot be told."""
    try:
        return material.score(path), None
    except UsageError as error:
        return None, str(error)


def _run(worker: Executor, job: MakeBaseline) -> tuple[str | None, str | None]:
    """How a file was made, or why it was not."""
    job.path.unlink(missing_ok=True)
    (outcome,) = worker.run([job], lambda *_: None)
    return (outcome.result, None) if outcome.fault is None else (None, outcome.fault.reason)


def _runs(source: DataSource) -> list[Feeds]:
    """Inputs of single runs, as many as there is room for: of one sample, or of the batch that the model fixes."""
    interface = interface_of(source.inputs, source.fixed)
    size = source.fixed_batch or interface.batch or 1
    runs: list[Feeds] = []
    room = _BYTES
    for batch in source.batches(size, samples=CALIBRATION * size):
        fed = interface.feeds(batch.inputs)
        room -= sum(array.nbytes for array in fed.values())
        if len(batch) < size or (runs and room < 0) or len(runs) == CALIBRATION:
            break
        runs.append(fed)
    return runs
