"""Capture and distil: every task to its end, in waves that the disk holds, continued where a run stopped."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from ndonnx.data.split import Split
from ndonnx.distil import DistilJob, DistilResult, load_student, read_result
from ndonnx.errors import RecipeError, RunDirError
from ndonnx.executor import Executor, make_executor
from ndonnx.faults import Fault, tried
from ndonnx.machine import pick_device, usable_cores
from ndonnx.partition import Neighbourhood, Partition
from ndonnx.pipeline.batches import read_batch, value_bytes, whole_batches
from ndonnx.pipeline.clock import Clock
from ndonnx.pipeline.jobs import Jobs, Task
from ndonnx.pipeline.memory import MemoryPlan
from ndonnx.pipeline.schedule import Schedule
from ndonnx.pipeline.tolerating import Tolerances
from ndonnx.pipeline.waves import Waves, gigabytes
from ndonnx.progress import Progress
from ndonnx.recipe import Recipe
from ndonnx.report import NeighbourhoodReport
from ndonnx.rundir import Entry, RunDir, fingerprint
from ndonnx.students import StudentMethod, method_of
from ndonnx.teacher import ActivationStore, capture
from ndonnx.teacher.moments import entry_noise
from ndonnx.teacher.noise import EntryNoise, noise_store
from ndonnx.walk import Prefix, held_values

Stores = Sequence[Mapping[str, Path]]
"""The activation store of each value that a job needs; of several places with one student, one after the other."""
Rounds = Callable[[Sequence[Task]], Iterator[Sequence[Task]]]
"""Tasks of one wave in the order of their training: each round is over before the next one is asked for."""


@dataclass(frozen=True)
class Outcome:
    """How a neighbourhood ended."""

    status: str
    entry: Entry | None = None
    result: DistilResult | None = None
    reason: str | None = None
    tolerance: float | None = None
    """See `NeighbourhoodReport`, as for the next two."""
    steps_saved: int | None = None
    warning: str | None = None
    traceback: str | None = None

    @classmethod
    def kept(cls, name: str, fault: Fault, run: RunDir) -> Outcome:
        """The teacher's slice stays, for a reason of which the run directory keeps what nobody foresaw."""
        path = run.record(name, fault)
        return cls("kept", reason=fault.reason, traceback=None if path is None else str(path))

    def report(self, neighbourhood: Neighbourhood, parts: Partition) -> NeighbourhoodReport:
        """What a run tells of it; MACs are those of the student, or of the teacher's own slice."""
        result = self.result
        return NeighbourhoodReport(
            name=neighbourhood.name,
            candidate=result.candidate if result else None,
            status=self.status,
            nmse=result.nmse if result else None,
            nmse_start=result.nmse_start if result else None,
            steps=result.steps if result else 0,
            seconds=round(result.seconds, 3) if result else 0.0,
            parameters=result.parameters if result else neighbourhood.parameters,
            macs=result.macs if result else parts.cost(neighbourhood).macs,
            reason=self.reason,
            tolerance=self.tolerance,
            steps_saved=self.steps_saved,
            warning=self.warning,
            student_of=neighbourhood.first,
            traceback=self.traceback,
        )


@dataclass
class Distillation:
    """Capture and distil: the part of a run that takes long and can be continued."""

    run: RunDir
    model_path: Path
    parts: Partition
    split: Split
    samples: int
    """Of a neighbourhood's training, at most."""
    recipe: Recipe
    schedule: Schedule
    progress: Progress
    clock: Clock
    tolerances: Tolerances | None = None
    """What the students of `distil` have to come to; those of a search are the same whatever is asked of them."""
    workers_rss: int = 0
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    """By the label of the task."""
    jobs: Jobs = field(init=False)
    _waves: Waves = field(init=False)
    _plan: tuple[int, list[list[Neighbourhood]]] | None = None
    _executor: Executor = field(init=False)
    """Where jobs run, inside `_workers_kept`."""
    _done: int = 0
    """Tasks of `apart` that are over."""

    def __post_init__(self) -> None:
        self.jobs = Jobs(self.run, self.model_path, self.parts, self.recipe)
        in_order = self.recipe.inputs == "student"
        wanted = self.jobs.exits if in_order else self.jobs.wanted
        beside = self._beside() if in_order else 0
        self._waves = Waves(self.parts, self.split.source, self.recipe.cache_budget, wanted, self.progress, beside)

    def _beside(self) -> int:
        """Bytes of one sample that a walk down the chain holds at most."""
        held = held_values(self.parts, self.parts.in_order)
        sizes = value_bytes(self.parts.model, sorted(set().union(*held)), self.split.source)
        return max((sum(sizes.get(name, 0) for name in names) for names in held), default=0)

    @property
    def data(self) -> tuple[str, ...]:
        """What all students depend on: the model, the rows of the data, the seed."""
        self.planned()
        return self.jobs.data

    def task(
        self,
        neighbourhood: Neighbourhood,
        method: StudentMethod | None = None,
        steps: int | None = None,
        label: str = "",
    ) -> Task:
        """A student of a neighbourhood, as the recipe says where nothing else is given."""
        plan = self.schedule.distil(len(self.parts.trained), self._workers())
        plan = replace(plan, memory=self._memory.step(self._workers()))
        plan = plan if steps is None else replace(plan, steps=steps)
        return Task(label or neighbourhood.name, neighbourhood, method or method_of(self.recipe), plan)

    def distil(self) -> dict[str, Outcome]:
        """Bring every neighbourhood to an end: distilled, re-used, or kept with its reason."""
        self.keep_the_rest()
        samples, waves = self.planned()
        if self.recipe.inputs == "student":
            with self._workers_kept():
                self._in_order(waves, samples)
        elif self.recipe.inputs == "noise":
            with self._workers_kept():
                self._on_noise(waves, samples)
        else:
            self.apart([self._needed(n) for n in self.parts.trained])
        for name, first in self.parts.shared.items():
            self.outcomes[name] = self.outcomes[first]
        if self.tolerances is not None:
            for n in self.parts.distillable:
                ended, plan = self.outcomes[n.name], self._needed(n).plan
                self.outcomes[n.name] = self.tolerances.judged(n, ended, plan, self.progress)
        return self.outcomes

    def _needed(self, neighbourhood: Neighbourhood) -> Task:
        """A student as the recipe says, trained no further than its neighbourhood needs."""
        task, uses = self.task(neighbourhood), self.parts.uses(neighbourhood)
        if self.tolerances is None:
            return task
        plans = [self.tolerances.plan(use.name, task.plan, self._workers()) for use in uses]
        # One student has to be near enough at its most sensitive place, and may take the time of all.
        plan = min(plans, key=lambda plan: 0.0 if plan.enough is None else plan.enough)
        seconds = None if plan.seconds is None else sum(each.seconds or 0.0 for each in plans)
        return replace(task, plan=replace(plan, seconds=seconds))

    def keep_the_rest(self) -> None:
        """Give what cannot be distilled its outcome."""
        for neighbourhood in self.parts.neighbourhoods:
            if not neighbourhood.distillable:
                self.outcomes[neighbourhood.name] = Outcome("kept", reason=neighbourhood.reason)

    def apart(
        self,
        tasks: Sequence[Task],
        rounds: Rounds | None = None,
        *,
        unit: str = "neighbourhoods",
        ordered: bool = False,
    ) -> None:
        """Each on the teacher's activations, in parallel: the paper's method.

        Args:
            tasks: several of a neighbourhood share its capture.
            rounds: puts the tasks of a wave in order, and may leave some out; None trains them all at once.
            unit: what they are called in progress.
            ordered: start them as they come; otherwise those with the largest activations first.
        """
        samples, waves = self.planned()
        of_each: dict[str, list[Task]] = {}
        for task in tasks:
            of_each.setdefault(task.neighbourhood.name, []).append(task)
        of_wave = [[task for n in wave for task in of_each.get(n.name, ())] for wave in waves]
        open_ = [[t for t in several if t.label not in self.outcomes and not self._reuse(t)] for several in of_wave]
        self._waves.estimate([wave for wave, todo in zip(waves, open_, strict=True) if todo], samples)
        self._done, total = 0, sum(map(len, open_))
        with self._workers_kept():
            for wave, several, todo in zip(waves, of_wave, open_, strict=True):
                if todo:
                    self._train_wave(wave, rounds(several) if rounds is not None else [several], total, unit, ordered)

    def _train_wave(
        self, wave: Sequence[Neighbourhood], rounds: Iterable[Sequence[Task]], total: int, unit: str, ordered: bool
    ) -> None:
        samples, _ = self.planned()
        values = self.jobs.wanted(wave)
        entry = self.run.entry("activations", fingerprint(*self.data, values))
        store: ActivationStore | None = None
        for these in rounds:
            left = [task for task in these if task.label not in self.outcomes]
            if not left:
                continue
            if store is None:
                with self.clock.measure("capture"):
                    store = self._capture(entry, values, samples)
            stores = [dict.fromkeys(values, store.path)]
            with self.clock.measure("distil"):
                self.progress.stage("distil", total, unit)
                self.progress.advance(self._done)
                self._train(left, {task.label: stores for task in left}, ordered)
            self._done += len(left)
        entry.remove()

    def _on_noise(self, waves: list[list[Neighbourhood]], samples: int) -> None:
        """Each on Gaussian noise at its own input, rectified behind a ReLU: no data at all (section 6)."""
        if self.recipe.look_ahead:
            raise RecipeError("look_ahead: noise at each neighbourhood says nothing of what follows; leave it out")
        drawn = entry_noise(self.parts, carry=False, seed=self.recipe.seed, threads=1)
        folder = self.run.path / "noise"
        for wave in waves:
            stores: dict[str, Stores] = {}
            tasks = []
            with self.clock.measure("capture"):
                for number, neighbourhood in enumerate(wave):
                    task = self._needed(neighbourhood)
                    if self._reuse(task):
                        continue
                    places = tried(partial(self._noise, neighbourhood, folder / f"{number:04}", samples, drawn))
                    if isinstance(places, Fault):
                        self._keep(task.label, places)
                    else:
                        stores[task.label] = places
                        tasks.append(task)
            with self.clock.measure("distil"):
                self.progress.stage("distil", len(tasks), "neighbourhoods")
                self._train(tasks, stores)
            shutil.rmtree(folder, ignore_errors=True)

    def _noise(
        self, neighbourhood: Neighbourhood, folder: Path, samples: int, drawn: Mapping[str, EntryNoise]
    ) -> list[dict[str, Path]]:
        """Stores of the noise in each of the places of a student."""
        stores = []
        for place, use in enumerate(self.parts.uses(neighbourhood)):
            noise = drawn.get(use.name, EntryNoise("white", None))
            where = folder.with_name(f"{folder.name}-{place}" if place else folder.name)
            store = noise_store(self.parts.slice_of(use), where, samples, self.recipe.seed, noise.kind, noise.moments)
            stores.append(dict.fromkeys(store.names, store.path))
        return stores

    def _in_order(self, waves: list[list[Neighbourhood]], samples: int) -> None:
        """One after the other, each on what the students before it give, so that errors do not add up."""
        open_ = [n for wave in waves for n in wave]
        order = self.parts.in_order
        if all(self.jobs.entry(task).done for task in self._chained(open_)):
            waves = []
        folder = self.run.path / "prefix"
        if waves:
            self._waves.estimate(waves, samples)
        prefix = Prefix(self.parts, order, self._batches(samples), folder, samples) if waves else None
        self.jobs.chain.clear()
        for task in self._chained([] if waves else open_):
            self._reuse(task)
        for wave in waves:
            exits = self.jobs.exits(wave)
            entry = self.run.entry("activations", fingerprint(*self.data, exits))
            with self.clock.measure("capture"):
                store = self._capture(entry, exits, samples)
            with self.clock.measure("distil"):
                self.progress.stage("distil", len(open_), "neighbourhoods")
                for task in self._chained(wave):
                    assert prefix is not None
                    self._after(prefix, task, store)
            entry.remove()
        if prefix is not None:
            prefix.close()
            shutil.rmtree(folder, ignore_errors=True)

    def _chained(self, neighbourhoods: Iterable[Neighbourhood]) -> Iterator[Task]:
        return self.jobs.chained(map(self._needed, neighbourhoods))

    def _after(self, prefix: Prefix, task: Task, store: ActivationStore) -> None:
        """Train one neighbourhood behind the students before it."""
        neighbourhood = task.neighbourhood
        if not self._reuse(task):
            stores = tried(partial(self._stores, prefix, neighbourhood, store))
            if isinstance(stores, Fault):
                self._keep(task.label, stores)
            else:
                self._train([task], {task.label: stores})
        for following in self._up_to_next(neighbourhood):
            self._go_on(prefix, following)
        self.progress.advance()

    def _stores(self, prefix: Prefix, neighbourhood: Neighbourhood, store: ActivationStore) -> list[dict[str, Path]]:
        """What each place of a student reads: the teacher's values, and what the students before it give."""
        captured = dict.fromkeys((*store.names, *store.unstorable), store.path)
        return [
            captured | {name: given.path for name, given in prefix.inputs_of(use).items()}
            if use is neighbourhood or self.parts.together(use)
            else captured
            for use in self.parts.uses(neighbourhood)
        ]

    def _go_on(self, prefix: Prefix, neighbourhood: Neighbourhood) -> None:
        """Put the student in a place, or leave the place to the teacher."""
        label = neighbourhood.first or neighbourhood.name
        ended = self.outcomes[label].entry
        if ended is not None:
            fault = tried(lambda: prefix.put(neighbourhood, self.parts.at(neighbourhood, load_student(ended))))
            if fault is None:
                return
            ended.remove()  # or a run that goes on here would take it for good
            self._keep(label, fault)
        prefix.leave(neighbourhood)

    def _up_to_next(self, neighbourhood: Neighbourhood) -> Iterator[Neighbourhood]:
        """A neighbourhood and those behind it whose student is trained by then."""
        order = self.parts.in_order
        yield neighbourhood
        yield from itertools.takewhile(lambda n: n.first is not None, order[order.index(neighbourhood) + 1 :])

    def _reuse(self, task: Task) -> bool:
        entry = self.jobs.entry(task)
        if not entry.done:
            return False
        result = read_result(entry)
        self.outcomes[task.label] = Outcome("reused", entry, result)
        self.progress.finished(task.label, "reused", result.nmse, None)
        return True

    def planned(self) -> tuple[int, list[list[Neighbourhood]]]:
        """How many samples the cache budget holds, and the waves of the capture."""
        if self._plan is None:
            self._plan = self._waves.plan(self.samples)
            rows = self.split.to_train(self._plan[0]).fingerprint()
            self.jobs.data = (self.jobs.model_fingerprint(), rows, str(self.recipe.seed))
        return self._plan

    def _batches(self, samples: int) -> Callable[[], Iterator[Mapping[str, np.ndarray]]]:
        source = self.split.to_train(samples)
        return lambda: whole_batches(source, read_batch(source))

    def _capture(self, entry: Entry, values: list[str], samples: int) -> ActivationStore:
        folder = entry.path / "store"
        if entry.done:
            try:
                store = ActivationStore.open(folder)
                for name in store.names:
                    store.verify(name)
                return store
            except RunDirError as error:
                self.progress.note(f"captured activations are damaged and are captured again ({error})")
        folder = entry.begin() / "store"
        self.progress.stage("capture", samples, "samples")
        store = capture(
            self.parts.model,
            values,
            self._batches(samples),
            folder,
            samples=samples,
            device=pick_device(self.recipe.device),
            on_batch=self.progress.advance,
        )
        entry.commit({"samples": samples}, digest=False)
        return store

    def _train(self, tasks: Sequence[Task], stores: Mapping[str, Stores], ordered: bool = False) -> None:
        """Train tasks, each job made when it can start.

        Args:
            tasks: in any order.
            stores: of each task, by its label.
            ordered: start them as they come; otherwise those with the largest activations first.
        """
        in_order = list(tasks)
        if not ordered:
            # Those with most of a time budget first, so that no worker is left with one alone in the end.
            in_order.sort(key=lambda task: (-(task.plan.seconds or 0.0), -self._boundary_bytes(task)))
        entries = {task.label: self.jobs.entry(task) for task in tasks}
        for outcome in self._executor.run(self._jobs(in_order, stores), self.progress.step):
            if outcome.fault is not None:
                self._keep(outcome.name, outcome.fault)
            else:
                result: DistilResult | None = outcome.result
                self.outcomes[outcome.name] = Outcome("distilled", entries[outcome.name], result)
                self.progress.finished(outcome.name, "distilled", result.nmse if result else None, None)
            if self.recipe.inputs != "student":
                self.progress.advance()
        self.workers_rss = max(self.workers_rss, self._executor.peak_rss_bytes)

    def _boundary_bytes(self, task: Task) -> int:
        return sum(self._waves.sizes.get(name, 0) for name in self.jobs.wanted([task.neighbourhood]))

    @contextmanager
    def _workers_kept(self) -> Iterator[None]:
        """Keep worker processes from one training to the next."""
        with make_executor(self.recipe.executor, self._workers()) as self._executor:
            yield

    @cached_property
    def _memory(self) -> MemoryPlan:
        plan = MemoryPlan.of(self.recipe, self.parts, usable_cores())
        if plan.least > plan.budget:
            self.progress.note(
                f"the memory budget of {gigabytes(plan.budget)} is less than the {gigabytes(plan.least)}, about, that "
                "this model takes with one job at a time, and will be exceeded; raise --memory-budget"
            )
        return plan

    @cached_property
    def _most_workers(self) -> int:
        wanted = self.recipe.workers or min(usable_cores(), len(self.parts.trained))
        found = self._memory.workers(wanted)
        if found < wanted:
            self.progress.note(
                f"{found} of {wanted} workers: more would take more than the memory budget of "
                f"{gigabytes(self._memory.budget)}; --memory-budget raises it"
            )
        return found

    def _keep(self, label: str, fault: Fault) -> None:
        """End a task without a student."""
        self.outcomes[label] = Outcome.kept(label, fault, self.run)
        self.progress.finished(label, "kept", None, fault.reason)

    def _workers(self) -> int:
        # From the recipe and the partition alone: threads decide the last bits, and a continued run has fewer jobs.
        if self.recipe.inputs == "student" or (self.recipe.executor == "serial" and self.recipe.workers is None):
            return 1
        return self._most_workers

    def _jobs(self, tasks: Iterable[Task], stores: Mapping[str, Stores]) -> Iterator[DistilJob]:
        """The job of each task, made when it is asked for; a task of which none can be made ends here."""
        threads = max(1, usable_cores() // self._workers())
        for task in tasks:
            first, *further = stores[task.label]
            job = tried(partial(self.jobs.job, task, first, threads, further or None))
            if isinstance(job, Fault):
                self._keep(task.label, job)
            else:
                yield job


def unchanged_outcomes(parts: Partition) -> dict[str, Outcome]:
    """How all neighbourhoods end when every channel is kept and nothing is trained: they stay, with nothing to measure.

    Slices need not convert, nor even run by themselves, for that.
    """

    def ended(n: Neighbourhood) -> Outcome:
        if not n.distillable:
            return Outcome("kept", reason=n.reason)
        same = DistilResult("width k=1", 0.0, 0.0, 0, 0, 0.0, n.parameters, parts.cost(n).macs)
        return Outcome("distilled", result=same)

    return {n.name: ended(n) for n in parts.neighbourhoods}
