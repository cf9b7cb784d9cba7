"""Teacher, students and baselines side by side: bytes, times from one interleaved run, and fidelity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ndonnx.config.recipe import Recipe
from ndonnx.data import DataSource, input_specs
from ndonnx.errors import ModelError, UsageError
from ndonnx.graph import load
from ndonnx.graph.storage.files import file_bytes
from ndonnx.metrics.baselines.making import Made, Material, make_baselines
from ndonnx.metrics.baselines.noise_floor import NAME as FLOOR
from ndonnx.metrics.baselines.noise_floor import moved
from ndonnx.metrics.evaluation import Evaluation, evaluate
from ndonnx.metrics.latency import Beside, Plan, measure_beside
from ndonnx.metrics.latency.feeds import Feeds, batch_of, feeds_for
from ndonnx.metrics.latency.timing import runner
from ndonnx.runtime.progress import Progress
from ndonnx.teacher import make_session

TEACHER = "teacher"


@dataclass(frozen=True)
class BaselineRow:
    """One model of a comparison."""

    name: str
    bytes: int | None = None
    """Of its files; None of what is no file."""
    speed: Beside | None = None
    """Times, and the ratio to the teacher's; None where it was not timed."""
    fidelity: Evaluation | None = None
    """How good it is on the data of the comparison; None without data."""
    how: str | None = None
    """How it was made, in words."""
    reason: str | None = None
    """Why it could not be made or run; None where it could."""

    def to_json(self) -> dict[str, Any]:
        """As a mapping for JSON."""
        return {
            "name": self.name,
            "bytes": self.bytes,
            "speed": None if self.speed is None else self.speed.to_json(),
            "fidelity": None if self.fidelity is None else self.fidelity.to_json(),
            "how": self.how,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Baselines:
    """A comparison of several models in one run."""

    batch_size: int
    """Samples in a timed run."""
    threads: int
    processes: int
    """In each of which all models were loaded and timed anew, in turn."""
    rows: tuple[BaselineRow, ...]
    """The teacher, the students, then the baselines."""

    def to_json(self) -> dict[str, Any]:
        """As one JSON document."""
        return {
            "batch_size": self.batch_size,
            "threads": self.threads,
            "processes": self.processes,
            "rows": [row.to_json() for row in self.rows],
        }


@dataclass(frozen=True)
class Comparison:
    """What is compared, on what."""

    teacher: Path
    students: Mapping[str, Path]
    """Files of the models that stand beside the baselines, by name."""
    comparison_data: DataSource | None
    """Samples that fidelity is measured on. None: there are no data, and none is."""
    recipe: Recipe
    """What the user says of the outputs, and a metric of the user's own."""
    progress: Progress

    def run(self, kinds: Sequence[str], material: Material, plan: Plan, feeds: Feeds) -> Baselines:
        """Make the baselines, measure and time everything.

        Args:
            kinds: of baselines.
            material: what they are made from.
            plan: how models are timed; of its batch sizes the first.
            feeds: a batch of inputs that they are timed on, by name.

        Raises:
            UsageError: the teacher or a student does not run.
        """
        self.progress.stage("baselines")
        made = [
            Made(TEACHER, self.teacher),
            *(Made(name, path) for name, path in self.students.items()),
            *make_baselines(kinds, material),
        ]
        own = {TEACHER, *self.students}
        rows = [self._measured(each, each.name in own, plan, feeds) for each in made]
        able = {each.name: each.path for each, row in zip(made, rows, strict=True) if each.path and not row.reason}
        speeds = measure_beside(able, TEACHER, feeds, plan, self.progress)
        timed = [replace(row, speed=speeds.get(row.name)) for row in rows]
        return Baselines(plan.batch_sizes[0], plan.threads, plan.processes, (*timed, *self._floor()))

    def _measured(self, made: Made, own: bool, plan: Plan, feeds: Feeds) -> BaselineRow:
        """A model's size and fidelity; of a baseline that does not run, the reason."""
        if made.path is None:
            return BaselineRow(made.name, how=made.how, reason=made.reason)
        size = file_bytes(made.path)
        try:
            if not own:  # before all are timed together, where one that fails would end the run
                _run_once(made.path, plan, feeds)
            fidelity = self._fidelity(made.path)
        except UsageError as error:
            if own:
                raise
            return BaselineRow(made.name, size, how=made.how, reason=str(error))
        return BaselineRow(made.name, size, fidelity=fidelity, how=made.how)

    def _fidelity(self, path: Path) -> Evaluation | None:
        if self.comparison_data is None:
            return None
        teacher = None if path == self.teacher else self.teacher
        return evaluate(path, self.comparison_data, teacher=teacher, tasks=self.recipe.task, metric=self.recipe.metric)

    def _floor(self) -> Iterator[BaselineRow]:
        """The teacher beside itself on inputs that nobody could tell apart, where they are images."""
        noisy = None if self.comparison_data is None else moved(load(self.teacher), self.comparison_data)
        if noisy is None or self.comparison_data is None:
            return
        told, metric = self.recipe.task, self.recipe.metric
        try:
            fidelity = evaluate(noisy, self.comparison_data, teacher=self.teacher, tasks=told, metric=metric)
        except ModelError as error:
            yield BaselineRow(FLOOR, reason=str(error))
        else:
            yield BaselineRow(FLOOR, fidelity=fidelity, how="how far the teacher's answers move by themselves")


def _run_once(path: Path, plan: Plan, feeds: Feeds) -> None:
    """Run a model as it will be timed.

    Raises:
        ModelError: onnxruntime does not open or run it.
    """
    session = make_session(path, threads=plan.threads)
    fed = plan.interface.feeds(batch_of(feeds, plan.batch_sizes[0]))
    runner(str(path), session, feeds_for(str(path), input_specs(session), fed))()
