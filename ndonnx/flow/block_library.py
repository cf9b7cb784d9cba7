"""The block library: every candidate of every neighbourhood, trained once for all searches on the teacher."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version

import onnx_ir as ir

from ndonnx.distill.job import load_student
from ndonnx.flow.jobs import NeighbourhoodResult, Trial
from ndonnx.flow.measure import Loss, Measures
from ndonnx.flow.run import Run
from ndonnx.flow.strategies import Parallel
from ndonnx.flow.train import Distillation
from ndonnx.graph import Cost
from ndonnx.graph.storage.files import file_bytes
from ndonnx.partition import Neighbourhood
from ndonnx.report.search import OptionReport
from ndonnx.runtime.fingerprints import fingerprint
from ndonnx.runtime.run_directory import Entry
from ndonnx.select import TEACHER, Candidate, Option, Table
from ndonnx.students import WHOLE, StudentMethod
from ndonnx.students.registry import method_of

_FAR = 3.0
"""A candidate that alone loses so many times what the whole may is clearly beyond its neighbourhood's tolerance."""


@dataclass
class Library:
    """Trains and measures candidates, and lays them out as the table of a search."""

    run: Run
    distillation: Distillation
    measures: Measures
    candidates: tuple[Candidate, ...]
    """Cheapest first."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Why a candidate was not trained, by its label."""
    _trials: dict[str, tuple[Neighbourhood, Candidate, Trial]] = field(default_factory=dict)
    """What there is to train, by its label."""
    _rows: list[tuple[Neighbourhood, Candidate, Trial]] = field(default_factory=list)
    """Every candidate of every neighbourhood, aliases included."""
    _aliases: dict[tuple[str, str], str] = field(default_factory=dict)
    """The candidate that stands for another one with the same student, by neighbourhood and that other one."""
    _refused: dict[tuple[str, str], str] = field(default_factory=dict)
    """Why there is no such student, as far as that is known beforehand, by neighbourhood and candidate."""

    def __post_init__(self) -> None:
        for candidate in self.candidates:
            method = method_of(candidate.recipe(self.run.recipe))
            for n in self.run.parts.trained:
                trial = self.distillation.trial(n, method, self.steps, label(n.name, candidate.spec))
                self._rows.append((n, candidate, trial))
                if n.groups is not None and (reason := method.needs_more(n.groups)) is not None:
                    self._refused[n.name, candidate.spec] = reason
        self._find_aliases()
        other = self._aliases.keys() | self._refused.keys()
        distinct = (row for row in self._rows if (row[0].name, row[1].spec) not in other)
        self._trials = {trial.label: (n, candidate, trial) for n, candidate, trial in distinct}

    def _find_aliases(self) -> None:
        """Candidates with the same student: the first stands for all, or the first that an earlier run has trained."""
        equal: dict[tuple[str, type[StudentMethod], Hashable], list[tuple[str, Trial]]] = defaultdict(list)
        for n, candidate, trial in self._rows:
            assert n.groups is not None
            shape = trial.method.shape_key(n.groups)
            if shape == WHOLE:
                self._aliases[n.name, candidate.spec] = TEACHER
            elif shape is not None:
                equal[n.name, type(trial.method), shape].append((candidate.spec, trial))
        for (name, _, _), same in equal.items():
            if len(same) > 1:
                there = (spec for spec, trial in same if self.distillation.jobs.entry(trial).done)
                first = next(there, same[0][0])
                self._aliases.update({(name, spec): first for spec, _ in same if spec != first})

    @property
    def steps(self) -> int:
        """Number of optimizer steps of a candidate's training."""
        steps = self.run.recipe.search.steps
        return math.ceil(self.run.recipe.steps / 5) if steps is None else steps

    def plan(self) -> list[OptionReport]:
        """What there is and what would be trained; trains nothing."""
        found = []
        for n, candidate, trial in self._rows:
            alias = self._aliases.get((n.name, candidate.spec))
            if alias is not None:
                found.append(OptionReport(n.name, candidate.spec, "alias", {}, None, None, f"same as {alias}"))
                continue
            if (refused := self._refused.get((n.name, candidate.spec))) is not None:
                found.append(OptionReport(n.name, candidate.spec, "skipped", {}, None, None, refused))
                continue
            failed = self._failure(trial)
            there = self.distillation.jobs.entry(trial).done
            status = "reused" if there else "failed" if failed.done else "missing"
            reason = failed.meta()["reason"] if status == "failed" else None
            found.append(OptionReport(n.name, candidate.spec, status, {}, None, None, reason))
        return found

    def train(self, max_drop: float | None) -> None:
        """Bring every candidate to an end. With a `max_drop`, one far beyond it ends its method's smaller ones."""
        outcomes = self.distillation.outcomes
        trials = [trial for _, _, trial in self._trials.values()]
        for trial in trials:
            failed = self._failure(trial)
            if failed.done:
                outcomes[trial.label] = NeighbourhoodResult("kept", reason=failed.meta()["reason"])
        stops = max_drop is not None and self.run.recipe.search.early_stop

        def rounds(sweep: Sequence[Trial]) -> Iterator[Sequence[Trial]]:
            yield from self._from_the_largest(sweep, max_drop or 0.0) if stops else [sweep]

        Parallel(self.distillation).train(trials, rounds, unit="students", ordered=True)
        for trial in trials:
            ended = outcomes.get(trial.label)
            if ended is not None and ended.reason and ended.traceback is None:  # what was foreseen happens again
                failed = self._failure(trial)
                if not failed.done:
                    failed.begin()
                    failed.commit({"reason": ended.reason})
        self._measure()

    def entry(self, neighbourhood: str, candidate: str) -> Entry | None:
        """The trained student of a choice; None for the teacher's own slice."""
        ended = self.distillation.outcomes.get(label(neighbourhood, candidate))
        return ended.entry if ended is not None else None

    def outcome(self, neighbourhood: str, candidate: str) -> NeighbourhoodResult | None:
        """How a candidate ended; None where it was left out."""
        return self.distillation.outcomes.get(label(neighbourhood, candidate))

    def entries(self, choice: Mapping[str, str]) -> dict[str, Entry]:
        """The trained students of a choice, by neighbourhood."""
        found = {name: self.entry(name, candidate) for name, candidate in choice.items() if candidate != TEACHER}
        return {name: entry for name, entry in found.items() if entry is not None}

    def table(self, *, latency: bool) -> Table:
        """All options that there are. With `latency`, each slice is timed."""
        whole = self._costed(self.run.parts.whole, file_bytes(self.run.teacher.path))
        if latency:
            whole["latency"] = self.measures.time_of_whole()[0]
        options = []
        fixed = dict(whole)
        for n in self.run.parts.trained:
            slice_ = self.run.parts.slice_of(n)
            # What something else reads too is part of the rest: it stays, whatever becomes of this place.
            others, size = _held(slice_, n.elsewhere)
            cost = Cost(self.run.parts.cost(n).parameters - others, self._macs_of_places(n))
            own = self._costed(cost, weight_bytes(slice_) - size)
            students = {c.spec: e for c in self.candidates if (e := self.entry(n.name, c.spec)) is not None}
            times = self.measures.times_of(n, students) if latency else {}
            costs = own | _timed(times, TEACHER)
            fixed = {name: fixed[name] - costs[name] for name in fixed}
            options.append(Option(n.name, TEACHER, costs, 0.0))
            for spec in students:
                loss = self._loss(n, spec)
                if math.isfinite(loss):
                    options.append(Option(n.name, spec, self._costs(n, spec) | _timed(times, spec), loss))
        return Table(options, fixed, self._aliases)

    def losses(self) -> dict[tuple[str, str], Loss]:
        """What every trained candidate loses alone, by neighbourhood and candidate."""
        found = {}
        for n, candidate, _ in self._trials.values():
            entry = self.entry(n.name, candidate.spec)
            if entry is not None:
                found[n.name, candidate.spec] = self.measures.of_candidate(n, entry)
        return found

    def options(self, table: Table) -> list[OptionReport]:
        """All candidates with how they ended, in the table's neighbourhoods."""
        measured = {(o.neighbourhood, o.candidate): o for name in table.neighbourhoods for o in table.options(name)}
        found = {
            (name, TEACHER): OptionReport(name, TEACHER, "alias", dict(measured[name, TEACHER].costs), 0.0)
            for name in table.neighbourhoods
        }
        for n, candidate, trial in self._trials.values():
            ended = self.distillation.outcomes.get(trial.label)
            option = measured.get((n.name, candidate.spec))
            status, reason = "skipped", self.skipped.get(trial.label)
            if ended is not None:
                status = {"distilled": "trained", "kept": "failed"}.get(ended.status, ended.status)
                reason = ended.reason
                if option is None and ended.entry is not None:
                    status, reason = "failed", "the model with it gives no finite answers"
            result = ended.result if ended is not None else None
            found[n.name, candidate.spec] = OptionReport(
                n.name,
                candidate.spec,
                status,
                dict(option.costs) if option is not None else {},
                option.drop if option is not None else None,
                result.nmse if result is not None else None,
                reason,
                ended.traceback if ended is not None else None,
            )
        for (name, spec), reason in self._refused.items():
            found[name, spec] = OptionReport(name, spec, "skipped", {}, None, None, reason)
        for (name, spec), same in self._aliases.items():
            alias = replace(found[name, same], candidate=spec, status="alias", reason=f"same as {same}")
            found[name, spec] = alias
        return [found[n.name, candidate.spec] for n, candidate, _ in self._rows]

    def _from_the_largest(self, sweep: Sequence[Trial], max_drop: float) -> Iterator[list[Trial]]:
        """One candidate of each method and neighbourhood a round, until one of them is far beyond the tolerance."""
        ladders: dict[tuple[str, str], list[Trial]] = defaultdict(list)
        for trial in sweep:
            n, candidate, _ = self._trials[trial.label]
            ladders[n.name, candidate.method].insert(0, trial)
        while ladders:
            these = [ladder[0] for ladder in ladders.values()]
            yield sorted(these, key=lambda trial: self.run.parts.cost(self._trials[trial.label][0]).macs or 0)
            for key, ladder in list(ladders.items()):
                reason = self._beyond(ladder.pop(0), max_drop)
                if reason is not None:
                    # What an earlier search has trained stays an option.
                    left = [trial.label for trial in ladder if trial.label not in self.distillation.outcomes]
                    self.skipped.update(dict.fromkeys(left, reason))
                if reason is not None or not ladder:
                    del ladders[key]

    def _beyond(self, trial: Trial, max_drop: float) -> str | None:
        n, candidate, _ = self._trials[trial.label]
        entry = self.entry(n.name, candidate.spec)
        drop = self.measures.of_candidate(n, entry).drop if entry is not None else 0.0
        if drop <= _FAR * max_drop:
            return None
        return f"{candidate.spec} alone loses {drop:.2%}, where the whole may lose {max_drop:.2%}"

    def _measure(self) -> None:
        todo = []
        for n, candidate, _ in self._trials.values():
            entry = self.entry(n.name, candidate.spec)
            if entry is not None and not self.measures.known(entry):
                todo.append((n, entry))
        if todo:
            _ = self.measures.partials
            self.run.progress.stage("measure", len(todo), "students")
        for n, entry in todo:
            self.measures.of_candidate(n, entry)
            self.run.progress.advance()

    def _loss(self, n: Neighbourhood, spec: str) -> float:
        entry, ended = self.entry(n.name, spec), self.outcome(n.name, spec)
        assert entry is not None and ended is not None and ended.result is not None
        match self.run.recipe.search.quality:
            case "nmse":
                largest = [e for c in self.candidates if (e := self.entry(n.name, c.spec)) is not None][-1]
                return ended.result.nmse * self.measures.sensitivity(n, largest)
            case "metric":
                return self.measures.of_candidate(n, entry).drop
            case _:
                return self.measures.of_candidate(n, entry).divergence

    def _costs(self, n: Neighbourhood, spec: str) -> dict[str, float]:
        ended = self.outcome(n.name, spec)
        assert ended is not None and ended.result is not None and ended.entry is not None
        student, result = load_student(ended.entry), ended.result
        others, size = _held(student, n.held)
        return self._costed(
            Cost(result.parameters - others, self._in_places(n, result.macs)), weight_bytes(student) - size
        )

    def _macs_of_places(self, n: Neighbourhood) -> int | None:
        """Multiply-accumulates of the teacher's slice, summed over all places of its student; None where unknown."""
        return sum((self.run.parts.cost(use) for use in self.run.parts.uses(n)), Cost()).macs

    def _in_places(self, n: Neighbourhood, macs: int | None) -> int | None:
        """Multiply-accumulates of a student, summed over its places: where values are larger, both have more to do."""
        own, places = self.run.parts.cost(n).macs, self._macs_of_places(n)
        return macs if macs is None or own is None or places is None or own == 0 else round(macs * places / own)

    def _costed(self, cost: Cost, size: int) -> dict[str, float]:
        """Costs by name; MACs only where those of every option and of the whole can be told."""
        named = {"params": float(cost.parameters), "size": float(size)}
        return named | {"macs": float(cost.macs or 0)} if self._tells_macs else named

    @property
    def _tells_macs(self) -> bool:
        results = (ended.result for ended in self.distillation.outcomes.values() if ended.result is not None)
        return self.run.parts.whole.macs is not None and all(result.macs is not None for result in results)

    def _failure(self, trial: Trial) -> Entry:
        """Where it is kept that a candidate cannot be had, by this version."""
        return self.run.directory.entry(
            "failures", fingerprint(self.distillation.jobs.key(trial), version("ndonnx-compress"))
        )


def label(neighbourhood: str, candidate: str) -> str:
    """What a candidate of a neighbourhood is called in a run."""
    return f"{neighbourhood} {candidate}"


def weight_bytes(model: ir.Model) -> int:
    """What the weights of a slice take in a file."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _held(model: ir.Model, names: Collection[str]) -> tuple[int, int]:
    """Parameters and bytes of the named weights, as far as a slice has them."""
    values = (value for name, value in model.graph.initializers.items() if name in names)
    tensors = [value.const_value for value in values if value.const_value is not None]
    return sum(int(tensor.size) for tensor in tensors), sum(tensor.nbytes for tensor in tensors)


def _timed(times: Mapping[str, float], name: str) -> dict[str, float]:
    return {"latency": times[name]} if times else {}
