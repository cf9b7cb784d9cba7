"""What a search works with: one run directory, the library, and whole students made of its choices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import onnx_ir as ir

from ndonnx.data.split import Split
from ndonnx.errors import RecipeError, UsageError
from ndonnx.graph import load, save
from ndonnx.graph.declared import state_as_in_file
from ndonnx.graph.files import file_bytes
from ndonnx.partition import Neighbourhood, Partition
from ndonnx.pipeline.clock import Clock
from ndonnx.pipeline.composing import Composition, costs_of
from ndonnx.pipeline.distilling import Distillation, Outcome
from ndonnx.pipeline.finishing import Finishing
from ndonnx.pipeline.library import Library, label
from ndonnx.pipeline.measuring import STUDENT_FILE, Measures, WholeLoss
from ndonnx.pipeline.opening import Given, HeldOut, learning_on, partition_model, priced_for
from ndonnx.pipeline.schedule import Schedule
from ndonnx.pipeline.tolerating import Need, Tolerances, allowed_divergence, measured_need, study_of
from ndonnx.progress import Progress
from ndonnx.recipe import Recipe
from ndonnx.report import FinetuneReport
from ndonnx.rundir import Entry, RunDir, fingerprint
from ndonnx.search import DEFAULT_CANDIDATES, TEACHER, parse_candidates, parse_drop, parse_target
from ndonnx.students import method_of

_DECIDING = {
    *("inputs", "finetune_steps", "finetune_samples", "finetune_lr", "augment", "temperature", "label_weight"),
    *("holdout", "batch_size", "optimiser", "warmup", "seed", "precision", "device", "cache_budget", "parity", "steps"),
    "memory_budget",
}
"""Keys of the recipe that decide what is done to students together."""


_TO_CHOOSE, _TO_CONFIRM = 2, 5
"""Times as many samples as candidates are measured on, by which whole students are chosen, and by which a promise is
tested: its margin is narrow only with many."""


def held_out(recipe: Recipe, data: str | None, promised: bool) -> HeldOut:
    """What a search of this recipe holds out; of made-up data, whose samples cost time, less."""
    choosing, confirming = (1, 1) if data is None else (_TO_CHOOSE, _TO_CONFIRM)
    samples = recipe.search.samples
    return HeldOut(choosing * samples, confirming * samples if promised else 0)


@dataclass(frozen=True)
class Whole:
    """A choice as one student, in the run directory, with what it loses and costs."""

    candidates: dict[str, str]
    entry: Entry
    loss: WholeLoss
    """By the samples that choose, with the bound that a test should give."""
    costs: dict[str, float]
    """`params`, `macs`, `size` as they are."""
    shares: dict[str, float]
    """The same as parts of the teacher's, and the latency's where it was measured."""
    tuned: FinetuneReport | None
    outcomes: dict[str, Outcome]
    """The students in it, by neighbourhood."""

    @property
    def path(self) -> Path:
        return self.entry.path / STUDENT_FILE

    def model(self) -> ir.Model:
        """The student itself, with the types that its file states: what is written must be what was made."""
        model = load(self.path)
        return state_as_in_file(model, model)


class Workbench:
    """Everything of one search; as a context manager, it holds the run directory."""

    def __init__(self, given: Given, folder: Path, recipe: Recipe, progress: Progress, clock: Clock) -> None:
        """Plan the search; nothing is trained yet.

        Raises:
            RecipeError: the recipe has candidates that are none, or a way to learn that candidates cannot share.
            UsageError: its threshold study cannot be read.
        """
        if recipe.inputs in ("student", "noise"):
            raise RecipeError(
                f"inputs = '{recipe.inputs}': a search trains its candidates apart from each other, on the teacher's "
                "activations; use refit or teacher"
            )
        if recipe.time_budget is not None:
            raise RecipeError("time_budget: a search has steps, not a time to fit into; give --steps instead")
        recipe = learning_on(recipe, given.teacher, alone=False)
        self.given, self.recipe, self.progress, self.clock = given, recipe, progress, clock
        self.candidates = parse_candidates(recipe.search.candidates or DEFAULT_CANDIDATES)
        for candidate in self.candidates:
            method_of(candidate.recipe(recipe))  # what is wrong with one is told before the first is trained
        self.study = study_of(recipe)
        self.schedule = Schedule(recipe, finetunable=len(given.teacher.graph.outputs) == 1)
        self.run = RunDir(folder)

    def __enter__(self) -> Self:
        self.run.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if "measures" in self.__dict__:
            self.measures.close()
        self.run.__exit__(kind, error, trace)

    @cached_property
    def parts(self) -> Partition:
        with self.clock.measure("partition"):
            self.progress.stage("partition")
            methods = {candidate.method for candidate in self.candidates}
            parts = partition_model(self.given.teacher, self.recipe, self.given.interface, methods)
            return priced_for(self.given.split.source, parts)

    @property
    def split(self) -> Split:
        """The data, and which rows do what."""
        return self.given.split

    @cached_property
    def distillation(self) -> Distillation:
        given = self.given
        made = Distillation(
            self.run,
            given.path,
            self.parts,
            given.split,
            given.samples,
            self.recipe,
            self.schedule,
            self.progress,
            self.clock,
        )
        made.planned()  # keys of students depend on it
        return made

    @cached_property
    def measures(self) -> Measures:
        key = self.distillation.jobs.model_fingerprint()
        return Measures(self.run, self.given.path, key, self.parts, self.split, self.recipe, self.progress)

    @cached_property
    def library(self) -> Library:
        return Library(self.run, self.parts, self.recipe, self.distillation, self.measures, self.candidates)

    @cached_property
    def tolerances(self) -> Tolerances | None:
        """What the neighbourhoods bear, where the recipe names a study."""
        return None if self.study is None else Tolerances(self.study, self.parts)

    @cached_property
    def composition(self) -> Composition:
        given, source = self.given, self.split.source
        return Composition(
            given.original,
            given.teacher,
            self.parts,
            source,
            self.recipe,
            self.schedule,
            self.finishing,
            self.progress,
            self.clock,
        )

    @cached_property
    def finishing(self) -> Finishing:
        given = self.given
        return Finishing(self.run, self.parts, given.split, given.samples, self.recipe, self.schedule, self.progress)

    @cached_property
    def whole(self) -> dict[str, float]:
        """Costs of the teacher: `params`, `macs`, `size`."""
        return _costs(self.given.teacher, self.given.path, self.parts)

    @property
    def workers_rss(self) -> int:
        """Most memory of workers, in bytes."""
        return max(self.distillation.workers_rss, self.finishing.workers_rss)

    def train(self, max_drop: float | None = None) -> None:
        """Fill the library.

        Raises:
            UsageError: the threshold study of the recipe is of another model, or MACs are to be reached that cannot be
                told.
        """
        if "macs" in parse_target(self.recipe.target or ()) and "macs" not in self.whole:
            raise UsageError(f"{self.given.path}: {self.parts.why_no_macs}; give another target than macs")
        _ = self.tolerances
        self.distillation.keep_the_rest()
        self.library.train(max_drop)

    def spliced(self, choice: Mapping[str, str]) -> ir.Model:
        """A choice as it was searched, for a look at it."""
        return self.composition.spliced(self.library.entries(choice))

    def finish(self, choice: Mapping[str, str], *, in_full: bool, latency: float | None = None) -> Whole:
        """Make a whole student of a choice, or find it in the run directory.

        Args:
            choice: a candidate for each neighbourhood.
            in_full: train the chosen ones with the recipe's steps first, where the search used others; none of them
                further than it needs by `max_drop`, or by the recipe's threshold study.
            latency: the part of the teacher's that it was measured to take.
        """
        outcomes = self._chosen(choice, in_full)
        students = {name: ended.entry for name, ended in outcomes.items() if ended.entry is not None}
        keys = [students[n.name].key for n in self.parts.neighbourhoods if n.name in students]
        data = (*self.distillation.data, self.split.key())
        settings = self.recipe.model_dump(mode="json", include=_DECIDING)
        entry = self.run.entry("composed", fingerprint(*data, keys, settings))
        if not entry.done:
            composed = self.composition.compose(students, data)
            student, tuned = composed.model, composed.tuned
            with self.clock.measure("evaluate"):
                loss = self.measures.expected(student)
            folder = entry.begin()
            save(student, folder / STUDENT_FILE)
            costs = _costs(student, folder / STUDENT_FILE, self.parts)
            made = {"loss": loss.to_json(), "tuned": None if tuned is None else asdict(tuned), "costs": costs}
            for name, fault in composed.refused.items():
                self.run.record(name, fault)
            entry.commit(made | {"refused": {name: fault.reason for name, fault in composed.refused.items()}})
        meta = entry.meta()
        costs = {str(name): float(cost) for name, cost in meta["costs"].items()}
        shares = {name: cost / (self.whole[name] or 1.0) for name, cost in costs.items() if name in self.whole}
        outcomes |= {name: Outcome("kept", reason=reason) for name, reason in meta["refused"].items()}
        return Whole(
            candidates=dict(choice),
            entry=entry,
            loss=WholeLoss.of_json(meta["loss"]),
            costs=costs,
            shares=shares if latency is None else shares | {"latency": latency},
            tuned=None if meta["tuned"] is None else FinetuneReport(**meta["tuned"]),
            outcomes=outcomes,
        )

    def _chosen(self, choice: Mapping[str, str], in_full: bool) -> dict[str, Outcome]:
        """The students of a choice; one that cannot be trained in full stays as the search has it."""
        named = {name: spec for name, spec in choice.items() if spec != TEACHER}
        found = {name: ended for name, spec in named.items() if (ended := self.library.outcome(name, spec)) is not None}
        if not in_full or self.library.steps == self.recipe.steps:
            return found
        methods = {c.spec: method_of(c.recipe(self.recipe)) for c in self.candidates}
        by_name = {n.name: n for n in self.parts.distillable}
        tasks = {
            name: self.distillation.task(by_name[name], methods[spec], None, f"{label(name, spec)} in full")
            for name, spec in named.items()
        }
        planned = {name: task.plan for name, task in tasks.items()}
        needs = {name: need for name, spec in named.items() if (need := self._need(by_name[name], spec)) is not None}
        for name, need in needs.items():
            result = found[name].result if name in found else None
            if result is not None and result.nmse <= need.enough:
                del tasks[name]  # the search has trained it as far as it needs
            elif not self.distillation.jobs.entry(tasks[name]).done:
                tasks[name] = replace(tasks[name], plan=replace(tasks[name].plan, enough=need.enough))
        self.distillation.apart(list(tasks.values()))
        for name, task in tasks.items():
            ended = self.distillation.outcomes[task.label]
            if ended.entry is not None:
                found[name] = ended
        return {n: needs[n].told(ended, planned[n]) if n in needs else ended for n, ended in found.items()}

    def _need(self, n: Neighbourhood, spec: str) -> Need | None:
        """How near a chosen student has to come: by what its own error costs, and by the recipe's study."""
        by_study = self.tolerances.need(n.name) if self.tolerances is not None else None
        entry, measured = self.library.entry(n.name, spec), None
        if self._allowed is not None and entry is not None:
            with self.clock.measure("evaluate"):
                sensitivity = self.measures.sensitivity(n, entry)
            measured = measured_need(self._allowed, sensitivity, len(self.parts.trained))
        return min((need for need in (by_study, measured) if need is not None), key=lambda n: n.enough, default=None)

    @cached_property
    def _allowed(self) -> float | None:
        """The divergence that goes with the drop that is allowed."""
        if self.recipe.max_drop is None:
            return None
        return allowed_divergence(self.library.losses().values(), parse_drop(self.recipe.max_drop))

    def judged(self, whole: Whole) -> Whole:
        """The same, with a note for each student that is beyond what its place bears by the recipe's study."""
        if self.tolerances is None:
            return whole
        plan, judge = self.schedule.plan(self.library.steps, self.recipe.lr), self.tolerances.judged
        by_name = {n.name: n for n in self.parts.distillable}
        outcomes = {name: judge(by_name[name], ended, plan, self.progress) for name, ended in whole.outcomes.items()}
        return replace(whole, outcomes=outcomes)


def _costs(model: ir.Model, path: Path, parts: Partition) -> dict[str, float]:
    """Costs by name; no MACs where they cannot be told."""
    cost = costs_of(model, parts)
    named = {"params": float(cost.parameters), "size": float(file_bytes(path))}
    return named if cost.macs is None else named | {"macs": float(cost.macs)}
