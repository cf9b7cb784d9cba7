"""One search: the block library of a run, and whole students made of its choices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import onnx_ir as ir

from ndonnx.errors import UsageError, first_line
from ndonnx.flow.assembly import Assembly
from ndonnx.flow.block_library import Library, label
from ndonnx.flow.composed import Composed
from ndonnx.flow.error_budgets import Need, allowed_divergence, measured_need
from ndonnx.flow.finish import Finish
from ndonnx.flow.jobs import NeighbourhoodResult
from ndonnx.flow.measure import STUDENT_FILE, Measures, WholeLoss
from ndonnx.flow.mixed_precision import MixedPrecision
from ndonnx.flow.pieces_in_bits import PiecesInBits
from ndonnx.flow.quantise import check_quantisable
from ndonnx.flow.quantise_trials import REFUSED
from ndonnx.flow.run import Run
from ndonnx.flow.strategies import Parallel
from ndonnx.flow.train import Distillation
from ndonnx.graph import load, save
from ndonnx.graph.save import serialise
from ndonnx.graph.shapes.declared import copy_of, state_as_in_file
from ndonnx.graph.storage.files import file_bytes
from ndonnx.partition import Neighbourhood, Partition
from ndonnx.report import FinetuneReport, QuantisationReport
from ndonnx.runtime.fingerprints import fingerprint
from ndonnx.runtime.run_directory import Entry
from ndonnx.select import TEACHER, bits_of, parse_drop, parse_target

_DECIDING = {
    *("inputs", "finetune_steps", "finetune_samples", "finetune_lr", "augment", "temperature", "label_weight"),
    *("holdout", "batch_size", "optimiser", "warmup", "seed", "precision", "device", "cache_budget", "parity", "steps"),
    *("memory_budget", "task", "metric"),
}
"""Keys of the recipe that decide what is done to students together."""


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
    """Costs as fractions of the teacher's, the latency among them where it was measured."""
    tuned: FinetuneReport | None
    outcomes: dict[str, NeighbourhoodResult]
    """The students in it, by neighbourhood."""
    quantised: QuantisationReport | None = None
    """How pieces of it came to be in 8 bits; None where none is."""

    @property
    def path(self) -> Path:
        return self.entry.path / STUDENT_FILE

    def model(self) -> ir.Model:
        """The student itself, with the types that its file states: what is written must be what was made."""
        model = load(self.path)
        return state_as_in_file(model, model)


class SearchSession:
    """Everything of one search. As a context manager it deletes, in the end, what it captured of the held-out rows."""

    def __init__(self, run: Run) -> None:
        """Begin a search; nothing is trained yet.

        Raises:
            UsageError: the sensitivity study of the recipe is of another model, or there is nothing to quantise.
        """
        searches_bits = any(candidate.bits < 32 for candidate in run.candidates)
        if searches_bits:
            check_quantisable(run)
        self.run = run
        self.candidates = run.candidates
        self.distillation = Distillation(run)
        self.distillation.planned()  # keys of students depend on it
        self.finishing = Finish(run)
        self.assembly = Assembly(run, self.finishing)
        self.measures = Measures(run)
        self.precision = MixedPrecision(run, self.measures) if searches_bits else None
        """Makes what is in 8 bits; None where no candidate is."""
        self.library = Library(run, self.distillation, self.measures, self.candidates, self.precision)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.measures.close()
        if self.precision is not None:
            self.precision.close()

    @cached_property
    def whole(self) -> dict[str, float]:
        """Costs of the teacher: `params`, `macs`, `size`."""
        return _costs(self.run.teacher.model, self.run.teacher.path, self.run.parts)

    @property
    def workers_rss(self) -> int:
        """Peak memory of the workers, in bytes."""
        return max(self.distillation.workers_rss, self.finishing.workers_rss)

    def train(self, max_drop: float | None = None) -> None:
        """Fill the library.

        Raises:
            UsageError: the threshold study of the recipe is of another model, or MACs are to be reached that cannot be
                told.
        """
        if "macs" in parse_target(self.run.recipe.target or ()) and "macs" not in self.whole:
            raise UsageError(f"{self.run.teacher.path}: {self.run.parts.why_no_macs}; give another target than macs")
        if self.precision is not None:
            _ = self.precision.way  # what cannot be quantised is told before the first training
        _ = self.distillation.budgets
        self.distillation.keep_the_rest()
        self.library.train(max_drop)

    def spliced(self, choice: Mapping[str, str]) -> ir.Model:
        """A choice as it was searched, in float, for a look at it."""
        return self.assembly.spliced(self.library.entries(choice))

    def pieces(self, choice: Mapping[str, str]) -> tuple[str, ...]:
        """Names of the neighbourhoods that are in 8 bits by a choice, all places of a student among them, in order."""
        chosen = {name for name, candidate in choice.items() if bits_of(candidate) < 32}
        return tuple(n.name for n in self.run.parts.neighbourhoods if (n.first or n.name) in chosen)

    def composed(self, choice: Mapping[str, str], *, timed: bool) -> Composed:
        """What a choice comes to as a whole, as it was searched; measured once and then found in the run directory."""
        entries, pieces = self.library.entries(choice), self.pieces(choice)
        key = [entries[name].key for name in sorted(entries)], list(pieces)
        precision = "" if self.precision is None else self.precision.key
        entry = self.measures.entry_here("composed-choices", *key, precision, timed)
        if not entry.done:
            with self.run.clock.measure("evaluate"):
                found = self._composed(choice, pieces, timed)
            entry.begin()
            entry.commit(found.to_json())
        return Composed.of_json(entry.meta())

    def _composed(self, choice: Mapping[str, str], pieces: tuple[str, ...], timed: bool) -> Composed:
        same = bool(pieces) and not self.library.entries(choice)
        in_float = copy_of(self.run.teacher.model) if same else self.spliced(choice)
        state_as_in_file(in_float, self.run.teacher.model)
        before = after = self._loss_of(in_float)
        model = in_float
        if pieces and self.precision is not None:
            try:
                model = self.precision.whole(in_float, pieces)
            except REFUSED as error:
                self.run.progress.note(f"a choice cannot be had in 8 bits: {first_line(error)}")
                return Composed(math.inf, before, math.inf, math.inf)
            after = self._loss_of(model)
        latency = self.measures.time_of_whole(model)[1] if timed else 1.0
        return Composed(after, before, len(serialise(model)), latency)

    def _loss_of(self, model: ir.Model) -> float:
        found = self.measures.of_whole(model)
        return found.drop if self.run.recipe.search.quality == "metric" else found.divergence

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
        keys = [students[n.name].key for n in self.run.parts.neighbourhoods if n.name in students]
        data = (*self.distillation.data, self.run.split.key())
        settings = self.run.recipe.model_dump(mode="json", include=_DECIDING)
        bits = None if self.precision is None else PiecesInBits(self.precision, self.pieces(choice))
        told = [] if bits is None or not bits.names else [list(bits.names), bits.precision.key]
        entry = self.run.directory.entry("composed", fingerprint(*data, keys, settings, *told))
        if not entry.done:
            assembled = self.assembly.assemble(students, data, bits)
            student, tuned = assembled.model, assembled.tuned
            with self.run.clock.measure("evaluate"):
                loss = self.measures.expected(student)
            folder = entry.begin()
            save(student, folder / STUDENT_FILE)
            costs = _costs(student, folder / STUDENT_FILE, self.run.parts)
            made = {"loss": loss.to_json(), "tuned": None if tuned is None else asdict(tuned), "costs": costs}
            if assembled.quantised is not None:
                made["quantised"] = asdict(assembled.quantised)
            for name, fault in assembled.refused.items():
                self.run.directory.record(name, fault)
            entry.commit(made | {"refused": {name: fault.reason for name, fault in assembled.refused.items()}})
        meta = entry.meta()
        costs = {str(name): float(cost) for name, cost in meta["costs"].items()}
        shares = {name: cost / (self.whole[name] or 1.0) for name, cost in costs.items() if name in self.whole}
        outcomes |= {name: NeighbourhoodResult("kept", reason=reason) for name, reason in meta["refused"].items()}
        return Whole(
            candidates=dict(choice),
            entry=entry,
            loss=WholeLoss.of_json(meta["loss"]),
            costs=costs,
            shares=shares if latency is None else shares | {"latency": latency},
            tuned=None if meta["tuned"] is None else FinetuneReport(**meta["tuned"]),
            outcomes=outcomes,
            quantised=QuantisationReport.read(meta["quantised"]) if "quantised" in meta else None,
        )

    def _chosen(self, choice: Mapping[str, str], in_full: bool) -> dict[str, NeighbourhoodResult]:
        """The students of a choice; one that cannot be trained in full stays as the search has it."""
        trained = {name: self.library.in_float(name, spec) for name, spec in choice.items()}
        named = {name: spec for name, spec in trained.items() if spec != TEACHER}
        found = {name: ended for name, spec in named.items() if (ended := self.library.outcome(name, spec)) is not None}
        if not in_full or self.library.steps == self.run.recipe.steps:
            return found
        by_name = {n.name: n for n in self.run.parts.distillable}
        methods = {name: self.library.method(by_name[name], self.library.trained[s]) for name, s in named.items()}
        tasks = {
            name: self.distillation.trial(by_name[name], methods[name], None, f"{label(name, spec)} in full")
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
        Parallel(self.distillation).train(list(tasks.values()))
        for name, task in tasks.items():
            ended = self.distillation.outcomes[task.label]
            if ended.entry is not None:
                found[name] = ended
        return {n: needs[n].told(ended, planned[n]) if n in needs else ended for n, ended in found.items()}

    def _need(self, n: Neighbourhood, spec: str) -> Need | None:
        """How near a chosen student has to come: by what its own error costs, and by the recipe's study."""
        by_study = self.distillation.budgets.need(n.name) if self.distillation.budgets is not None else None
        entry, measured = self.library.entry(n.name, spec), None
        if self._allowed is not None and entry is not None:
            with self.run.clock.measure("evaluate"):
                sensitivity = self.measures.sensitivity(n, entry)
            measured = measured_need(self._allowed, sensitivity, len(self.run.parts.trained))
        return min((need for need in (by_study, measured) if need is not None), key=lambda n: n.enough, default=None)

    @cached_property
    def _allowed(self) -> float | None:
        """The divergence that goes with the drop that is allowed."""
        if self.run.recipe.max_drop is None:
            return None
        return allowed_divergence(self.library.losses().values(), parse_drop(self.run.recipe.max_drop))

    def within_budgets(self, whole: Whole) -> Whole:
        """A student of a search, with a note for each part that is beyond what its place tolerates by the study."""
        if self.distillation.budgets is None:
            return whole
        plan, compared = self.run.schedule.plan(self.library.steps), self.distillation.budgets.compared
        by_name = {n.name: n for n in self.run.parts.distillable}
        outcomes = {
            name: compared(by_name[name], ended, plan, self.run.progress) for name, ended in whole.outcomes.items()
        }
        return replace(whole, outcomes=outcomes)


def _costs(model: ir.Model, path: Path, parts: Partition) -> dict[str, float]:
    """Costs by name; no MACs where they cannot be told."""
    cost = parts.cost_of(model)
    named = {"params": float(cost.parameters), "size": float(file_bytes(path))}
    return named if cost.macs is None else named | {"macs": float(cost.macs)}
