"""The mechanism of training: trials captured for, trained as jobs, found again where a run stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from ndonnx.assemble.propagation import held_values
from ndonnx.distill.job import DistilJob, DistilResult, read_result
from ndonnx.errors import RunDirError
from ndonnx.flow.error_budgets import ErrorBudgets
from ndonnx.flow.jobs import Jobs, NeighbourhoodResult, Trial
from ndonnx.flow.run import Run
from ndonnx.partition import Neighbourhood
from ndonnx.partition.removable import step_of_integers
from ndonnx.runtime.executor import Executor, machines_of, make_executor
from ndonnx.runtime.faults import Fault, tried
from ndonnx.runtime.machine import pick_device, usable_cores
from ndonnx.runtime.run_directory import Entry
from ndonnx.students import StudentMethod
from ndonnx.students.methods.width import Width
from ndonnx.students.registry import method_of
from ndonnx.teacher import ActivationStore, CaptureSettings, capture
from ndonnx.teacher.batches import read_batch, value_bytes, whole_batches
from ndonnx.teacher.capture_plan import CapturePlan, gigabytes

Stores = Sequence[Mapping[str, Path]]
"""The activation store of each value that a job needs; of several places with one student, one after the other."""


@dataclass
class Distillation:
    """Trains trials in any order, and knows how they ended: what takes long in a run, and can be continued."""

    run: Run
    workers_rss: int = 0
    outcomes: dict[str, NeighbourhoodResult] = field(default_factory=dict)
    """By the label of the trial."""
    jobs: Jobs = field(init=False)
    captures: CapturePlan = field(init=False)
    _plan: tuple[int, list[list[Neighbourhood]]] | None = None
    _executor: Executor = field(init=False)
    """Where jobs run, inside `workers_kept`."""

    def __post_init__(self) -> None:
        self.jobs = Jobs(self.run)
        in_order = self.run.recipe.inputs == "student"
        wanted = self.jobs.exits if in_order else self.jobs.wanted
        beside = self._beside() if in_order else 0
        self.captures = CapturePlan(
            self.run.parts, self.run.split.source, self.run.recipe.cache_budget, wanted, self.run.progress, beside
        )

    @cached_property
    def budgets(self) -> ErrorBudgets | None:
        """Error budgets of the neighbourhoods; None where the recipe names no study.

        Raises:
            UsageError: the study is of another model.
        """
        return None if self.run.study is None else ErrorBudgets(self.run.study, self.run.parts)

    def _beside(self) -> int:
        """Bytes of one sample that sequential propagation holds at most."""
        held = held_values(self.run.parts, self.run.parts.in_order)
        sizes = value_bytes(self.run.parts.model, sorted(set().union(*held)), self.run.split.source)
        return max((sum(sizes.get(name, 0) for name in names) for names in held), default=0)

    @property
    def data(self) -> tuple[str, ...]:
        """What all students depend on: the model, the rows of the data, the seed."""
        self.planned()
        return self.jobs.data

    def trial(
        self,
        neighbourhood: Neighbourhood,
        method: StudentMethod | None = None,
        steps: int | None = None,
        label: str = "",
    ) -> Trial:
        """A student of a neighbourhood, as the recipe says where nothing else is given."""
        plan = self.run.schedule.distil(len(self.run.parts.trained), self._workers())
        plan = replace(plan, memory=self.run.memory.step(math.ceil(self._workers() / len(self.machines))))
        plan = plan if steps is None else replace(plan, steps=steps)
        method = method or self._method(neighbourhood)
        if getattr(method, "init", None) != "least-squares":
            plan = replace(plan, worth=0)  # few steps are worth more than none where no closed form has been fitted
        return Trial(label or neighbourhood.name, neighbourhood, method, plan)

    def _method(self, neighbourhood: Neighbourhood) -> StudentMethod:
        """The recipe's method, with widths that products of integers like where 8 bits follow."""
        method = method_of(self.run.recipe)
        return self.suited(method, neighbourhood) if self.run.recipe.quantises else method

    def suited(self, method: StudentMethod, neighbourhood: Neighbourhood) -> StudentMethod:
        """A method with widths that products of integers like, where the recipe does not say which."""
        if isinstance(method, Width) and method.round_to is None:
            return replace(method, round_to=step_of_integers(neighbourhood.widths))
        return method

    def needed(self, neighbourhood: Neighbourhood) -> Trial:
        """A student as the recipe says, trained no further than its neighbourhood needs."""
        trial, uses = self.trial(neighbourhood), self.run.parts.uses(neighbourhood)
        if self.budgets is None:
            return trial
        plans = [self.budgets.plan(use.name, trial.plan, self._workers()) for use in uses]
        # One student has to be near enough at its most sensitive place, and may take the time of all.
        plan = min(plans, key=lambda plan: 0.0 if plan.enough is None else plan.enough)
        seconds = None if plan.seconds is None else sum(each.seconds or 0.0 for each in plans)
        return replace(trial, plan=replace(plan, seconds=seconds))

    def keep_the_rest(self) -> None:
        """Give what cannot be distilled its outcome."""
        for neighbourhood in self.run.parts.neighbourhoods:
            if not neighbourhood.distillable:
                self.outcomes[neighbourhood.name] = NeighbourhoodResult("kept", reason=neighbourhood.reason)

    def reuse(self, trial: Trial) -> bool:
        entry = self.jobs.entry(trial)
        if not entry.done:
            return False
        result = read_result(entry)
        self.outcomes[trial.label] = NeighbourhoodResult("reused", entry, result)
        self.run.progress.finished(trial.label, "reused", result.nmse, None)
        return True

    def planned(self) -> tuple[int, list[list[Neighbourhood]]]:
        """How many samples the cache budget holds, and the sweeps of the capture."""
        if self._plan is None:
            self._plan = self.captures.plan(self.run.samples)
            rows = self.run.split.to_train(self._plan[0]).fingerprint()
            self.jobs.data = (self.run.model_key, rows, str(self.run.recipe.seed))
        return self._plan

    def batches(self, samples: int) -> Callable[[], Iterator[Mapping[str, np.ndarray]]]:
        source = self.run.split.to_train(samples)
        return lambda: whole_batches(source, read_batch(source))

    def capture(self, entry: Entry, values: list[str], samples: int) -> ActivationStore:
        folder = entry.path / "store"
        if entry.done:
            try:
                store = ActivationStore.open(folder)
                for name in store.names:
                    store.verify(name)
                return store
            except RunDirError as error:
                self.run.progress.note(f"captured activations are damaged and are captured again ({error})")
        folder = entry.begin() / "store"
        self.run.progress.stage("capture", samples, "samples")
        store = capture(
            self.run.parts.model,
            values,
            self.batches(samples),
            folder,
            samples=samples,
            settings=CaptureSettings(device=pick_device(self.run.recipe.device)),
            on_batch=self.run.progress.advance,
        )
        entry.commit({"samples": samples}, digest=False)
        return store

    def train(self, trials: Sequence[Trial], stores: Mapping[str, Stores], ordered: bool = False) -> None:
        """Train trials, each job made when it can start.

        Args:
            trials: in any order.
            stores: of each trial, by its label.
            ordered: start them as they come; otherwise those with the largest activations first.
        """
        in_order = list(trials)
        if not ordered:
            # Those with most of a time budget first, so that no worker is left with one alone in the end.
            in_order.sort(key=lambda trial: (-(trial.plan.seconds or 0.0), -self._boundary_bytes(trial)))
        entries = {trial.label: self.jobs.entry(trial) for trial in trials}
        for outcome in self._executor.run(self._jobs(in_order, stores), self.run.progress.step):
            if outcome.fault is not None:
                self.keep(outcome.name, outcome.fault)
            else:
                result: DistilResult | None = outcome.result
                self.outcomes[outcome.name] = NeighbourhoodResult("distilled", entries[outcome.name], result)
                self.run.progress.finished(outcome.name, "distilled", result.nmse if result else None, None)
            if self.run.recipe.inputs != "student":
                self.run.progress.advance()
        self.workers_rss = max(self.workers_rss, self._executor.peak_rss_bytes)

    def _boundary_bytes(self, trial: Trial) -> int:
        return sum(self.captures.sizes.get(name, 0) for name in self.jobs.wanted([trial.neighbourhood]))

    @contextmanager
    def workers_kept(self) -> Iterator[None]:
        """Keep worker processes from one training to the next."""
        recipe = self.run.recipe
        with make_executor(recipe.executor, self._workers(), recipe) as self._executor:
            yield

    @cached_property
    def machines(self) -> Sequence[int]:
        """Cores of each machine that jobs run on."""
        return machines_of(self.run.recipe) or [usable_cores()]

    @cached_property
    def _most_workers(self) -> int:
        machines = len(self.machines)
        wanted = self.run.recipe.workers or min(sum(self.machines), len(self.run.parts.trained))
        found = min(wanted, machines * self.run.memory.workers(math.ceil(wanted / machines)))
        if found < wanted:
            self.run.progress.note(
                f"{found} of {wanted} workers: more would take more than the memory budget of "
                f"{gigabytes(self.run.memory.budget)}; --memory-budget raises it"
            )
        return found

    def keep(self, label: str, fault: Fault) -> None:
        """End a trial without a student."""
        self.outcomes[label] = NeighbourhoodResult.kept(label, fault, self.run.directory)
        self.run.progress.finished(label, "kept", None, fault.reason)

    def _workers(self) -> int:
        # From the recipe and the partition alone: threads decide the last bits, and a continued run has fewer jobs.
        if self.run.recipe.inputs == "student" or (
            self.run.recipe.executor == "serial" and self.run.recipe.workers is None
        ):
            return 1
        return self._most_workers

    def _jobs(self, trials: Iterable[Trial], stores: Mapping[str, Stores]) -> Iterator[DistilJob]:
        """The job of each trial, made when it is asked for; a trial of which none can be made ends here."""
        threads = max(1, min(*self.machines, sum(self.machines) // self._workers()))
        for trial in trials:
            first, *further = stores[trial.label]
            job = tried(partial(self.jobs.job, trial, first, threads, further or None))
            if isinstance(job, Fault):
                self.keep(trial.label, job)
            else:
                yield job
