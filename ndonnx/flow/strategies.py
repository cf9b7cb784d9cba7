"""The three ways to train all students: in parallel, one after the other, or on noise.

Each neighbourhood is trained on the teacher's activations, independently of the others (the paper's method); or on what
the students before it give, so that errors do not add up; or on noise at its own input, without any data (section 6).
"""

from __future__ import annotations

import itertools
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ndonnx.assemble.propagation import Prefix
from ndonnx.distill.job import load_student
from ndonnx.errors import RecipeError
from ndonnx.flow.jobs import NeighbourhoodResult, Trial
from ndonnx.flow.run import Run
from ndonnx.flow.train import Distillation, Stores
from ndonnx.partition import Neighbourhood
from ndonnx.runtime.faults import Fault, tried
from ndonnx.runtime.fingerprints import fingerprint
from ndonnx.teacher import ActivationStore
from ndonnx.teacher.moments import entry_noise
from ndonnx.teacher.noise import EntryNoise, noise_store

Rounds = Callable[[Sequence[Trial]], Iterator[Sequence[Trial]]]
"""Tasks of one capture in the order of their training: each round is over before the next one is asked for."""


class Strategy(ABC):
    """One way to train the students of a run."""

    def __init__(self, distillation: Distillation) -> None:
        """Nothing is trained yet."""
        self.distillation = distillation
        self.run: Run = distillation.run

    @abstractmethod
    def train(self, trials: Sequence[Trial]) -> None:
        """Bring every trial to an end: its result is in `distillation.outcomes` afterwards."""


@dataclass(frozen=True)
class Told:
    """What progress is told while trials are trained."""

    unit: str
    done: int
    total: int


class Parallel(Strategy):
    """Each student on the teacher's activations, independently of the others: the paper's method."""

    def train(
        self,
        trials: Sequence[Trial],
        rounds: Rounds | None = None,
        *,
        unit: str = "neighbourhoods",
        ordered: bool = False,
    ) -> None:
        """Train trials, as many at a time as there are workers.

        Args:
            trials: several of a neighbourhood share its capture.
            rounds: puts the trials of a sweep in order, and may leave some out; None trains them all at once.
            unit: what they are called in progress.
            ordered: start them as they come; otherwise those with the largest activations first.
        """
        samples, sweeps = self.distillation.planned()
        of_each: dict[str, list[Trial]] = {}
        for trial in trials:
            of_each.setdefault(trial.neighbourhood.name, []).append(trial)
        of_sweep = [[trial for n in sweep for trial in of_each.get(n.name, ())] for sweep in sweeps]
        known, reuse = self.distillation.outcomes, self.distillation.reuse
        open_ = [[t for t in several if t.label not in known and not reuse(t)] for several in of_sweep]
        self.distillation.captures.estimate([sweep for sweep, todo in zip(sweeps, open_, strict=True) if todo], samples)
        done, total = 0, sum(map(len, open_))
        with self.distillation.workers_kept():
            for sweep, several, todo in zip(sweeps, of_sweep, open_, strict=True):
                if todo:
                    in_turn = rounds(several) if rounds is not None else [several]
                    done = self._train_sweep(sweep, in_turn, Told(unit, done, total), ordered)

    def _train_sweep(
        self, sweep: Sequence[Neighbourhood], rounds: Iterable[Sequence[Trial]], told: Told, ordered: bool
    ) -> int:
        """The trials of one capture; how many are done by then."""
        done = told.done
        samples, _ = self.distillation.planned()
        values = self.distillation.jobs.wanted(sweep)
        entry = self.run.directory.entry("activations", fingerprint(*self.distillation.data, values))
        store: ActivationStore | None = None
        for these in rounds:
            left = [trial for trial in these if trial.label not in self.distillation.outcomes]
            if not left:
                continue
            if store is None:
                with self.run.clock.measure("capture"):
                    store = self.distillation.capture(entry, values, samples)
            stores = [dict.fromkeys(values, store.path)]
            with self.run.clock.measure("distil"):
                self.run.progress.stage("distil", told.total, told.unit)
                self.run.progress.advance(done)
                self.distillation.train(left, {trial.label: stores for trial in left}, ordered)
            done += len(left)
        entry.remove()
        return done


class FromNoise(Strategy):
    """Each student on Gaussian noise at its own input, rectified behind a ReLU: no data at all (section 6)."""

    def train(self, trials: Sequence[Trial]) -> None:
        """Train trials on noise.

        Raises:
            RecipeError: the recipe looks ahead, where noise says nothing.
        """
        if self.run.recipe.look_ahead:
            raise RecipeError("look_ahead: noise at each neighbourhood says nothing of what follows; leave it out")
        samples, sweeps = self.distillation.planned()
        of_each = {trial.neighbourhood.name: trial for trial in trials}
        drawn = entry_noise(self.run.parts, carry=False, seed=self.run.recipe.seed, threads=1)
        folder = self.run.directory.path / "noise"
        with self.distillation.workers_kept():
            for sweep in sweeps:
                self._train_sweep([of_each[n.name] for n in sweep if n.name in of_each], drawn, samples, folder)

    def _train_sweep(
        self, trials: Sequence[Trial], drawn: Mapping[str, EntryNoise], samples: int, folder: Path
    ) -> None:
        stores: dict[str, Stores] = {}
        with self.run.clock.measure("capture"):
            for number, trial in enumerate(trials):
                if self.distillation.reuse(trial):
                    continue
                places = tried(partial(self._noise, trial.neighbourhood, folder / f"{number:04}", samples, drawn))
                if isinstance(places, Fault):
                    self.distillation.keep(trial.label, places)
                else:
                    stores[trial.label] = places
        left = [trial for trial in trials if trial.label in stores]
        with self.run.clock.measure("distil"):
            self.run.progress.stage("distil", len(left), "neighbourhoods")
            self.distillation.train(left, stores)
        shutil.rmtree(folder, ignore_errors=True)

    def _noise(
        self, neighbourhood: Neighbourhood, folder: Path, samples: int, drawn: Mapping[str, EntryNoise]
    ) -> list[dict[str, Path]]:
        """Stores of the noise in each of the places of a student."""
        stores = []
        for place, use in enumerate(self.run.parts.uses(neighbourhood)):
            noise = drawn.get(use.name, EntryNoise("white", None))
            where = folder.with_name(f"{folder.name}-{place}" if place else folder.name)
            store = noise_store(
                self.run.parts.slice_of(use), where, samples, self.run.recipe.seed, noise.kind, noise.moments
            )
            stores.append(dict.fromkeys(store.names, store.path))
        return stores


class Sequential(Strategy):
    """One student after the other, each on what the students before it give, so that errors do not add up."""

    def train(self, trials: Sequence[Trial]) -> None:
        """Train trials in topological order."""
        samples, sweeps = self.distillation.planned()
        self._tell_of_idle_nodes()
        of_each = {trial.neighbourhood.name: trial for trial in trials}
        turns = [[of_each[n.name] for n in sweep if n.name in of_each] for sweep in sweeps]
        chained, chain = self.distillation.jobs.chained, self.distillation.jobs.chain
        in_order = list(itertools.chain.from_iterable(turns))
        if all(self.distillation.jobs.entry(trial).done for trial in chained(in_order)):
            chain.clear()
            for trial in chained(in_order):
                self.distillation.reuse(trial)
            return
        chain.clear()
        self.distillation.captures.estimate(sweeps, samples)
        folder = self.run.directory.path / "prefix"
        prefix = Prefix(self.run.parts, self.run.parts.in_order, self.distillation.batches(samples), folder, samples)
        with self.distillation.workers_kept():
            for sweep, turn in zip(sweeps, turns, strict=True):
                exits = self.distillation.jobs.exits(sweep)
                entry = self.run.directory.entry("activations", fingerprint(*self.distillation.data, exits))
                with self.run.clock.measure("capture"):
                    store = self.distillation.capture(entry, exits, samples)
                with self.run.clock.measure("distil"):
                    self.run.progress.stage("distil", len(in_order), "neighbourhoods")
                    for trial in chained(turn):
                        self._after(prefix, trial, store)
                entry.remove()
        prefix.close()
        shutil.rmtree(folder, ignore_errors=True)

    def _tell_of_idle_nodes(self) -> None:
        nodes = len(self.distillation.machines)
        if nodes > 1:
            self.distillation.run.progress.note(
                f"students train one after the other, on one of {nodes} nodes at a time; --inputs refit trains them "
                "side by side, and then fits each to what the students before it give"
            )

    def _after(self, prefix: Prefix, trial: Trial, store: ActivationStore) -> None:
        """Train one neighbourhood behind the students before it."""
        neighbourhood = trial.neighbourhood
        if not self.distillation.reuse(trial):
            stores = tried(partial(self._stores, prefix, neighbourhood, store))
            if isinstance(stores, Fault):
                self.distillation.keep(trial.label, stores)
            else:
                self.distillation.train([trial], {trial.label: stores})
        for following in self._up_to_next(neighbourhood):
            self._go_on(prefix, following)
        self.run.progress.advance()

    def _stores(self, prefix: Prefix, neighbourhood: Neighbourhood, store: ActivationStore) -> list[dict[str, Path]]:
        """What each place of a student reads: the teacher's values, and what the students before it give."""
        captured = dict.fromkeys((*store.names, *store.unstorable), store.path)
        return [
            captured | {name: given.path for name, given in prefix.inputs_of(use).items()}
            if use is neighbourhood or self.run.parts.together(use)
            else captured
            for use in self.run.parts.uses(neighbourhood)
        ]

    def _go_on(self, prefix: Prefix, neighbourhood: Neighbourhood) -> None:
        """Put the student in a place, or leave the place to the teacher."""
        label = neighbourhood.first or neighbourhood.name
        ended = self.distillation.outcomes[label].entry
        if ended is not None:
            fault = tried(lambda: prefix.put(neighbourhood, self.run.parts.at(neighbourhood, load_student(ended))))
            if fault is None:
                return
            ended.remove()  # or a run that goes on here would take it for good
            self.distillation.keep(label, fault)
        prefix.leave(neighbourhood)

    def _up_to_next(self, neighbourhood: Neighbourhood) -> Iterator[Neighbourhood]:
        """A neighbourhood and those behind it whose student is trained by then."""
        order = self.run.parts.in_order
        yield neighbourhood
        yield from itertools.takewhile(lambda n: n.first is not None, order[order.index(neighbourhood) + 1 :])


_STRATEGIES: Mapping[str | None, type[Strategy]] = {"student": Sequential, "noise": FromNoise}
"""By what students learn on, as the recipe's `inputs` says; parallel where nothing else is said."""


def distil_all(distillation: Distillation) -> dict[str, NeighbourhoodResult]:
    """Bring every neighbourhood to an end: distilled, re-used, or kept with its reason."""
    parts, results = distillation.run.parts, distillation.outcomes
    distillation.keep_the_rest()
    distillation.planned()
    trials = [distillation.needed(n) for n in parts.trained]
    _STRATEGIES.get(distillation.run.recipe.inputs, Parallel)(distillation).train(trials)
    results.update({name: results[first] for name, first in parts.shared.items()})
    if distillation.budgets is not None:
        for n in parts.distillable:
            plan = distillation.needed(n).plan
            results[n.name] = distillation.budgets.compared(n, results[n.name], plan, distillation.run.progress)
    return results
