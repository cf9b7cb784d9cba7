"""The block library: every candidate of every neighbourhood, trained once for all searches on the teacher."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version

from ndonnx.flow.jobs import NeighbourhoodResult, Trial
from ndonnx.flow.measure import Loss, Measures
from ndonnx.flow.mixed_precision import MixedPrecision
from ndonnx.flow.run import Run
from ndonnx.flow.strategies import Parallel
from ndonnx.flow.train import Distillation
from ndonnx.partition import Neighbourhood
from ndonnx.report.search import OptionReport
from ndonnx.runtime.fingerprints import fingerprint
from ndonnx.runtime.run_directory import Entry
from ndonnx.select import INT8, TEACHER, Candidate, Option, Table, bits_of, in_float
from ndonnx.students import WHOLE, StudentMethod
from ndonnx.students.registry import method_of

_FAR = 3.0
"""A candidate that alone loses so many times what the whole may is clearly beyond its neighbourhood's tolerance."""


@dataclass
class Library:
    """Trains and measures candidates; `flow/block_table.py` lays them out as the table of a search."""

    run: Run
    distillation: Distillation
    measures: Measures
    candidates: tuple[Candidate, ...]
    """Cheapest first."""
    precision: MixedPrecision | None = None
    """Makes what candidates in 8 bits are; None where there is none among them."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Why a candidate was not trained, by its label."""
    _trials: dict[str, tuple[Neighbourhood, Candidate, Trial]] = field(default_factory=dict)
    """What there is to train, by its label."""
    _rows: list[tuple[Neighbourhood, Candidate, Trial]] = field(default_factory=list)
    """Every candidate of every neighbourhood, aliases included."""
    aliases: dict[tuple[str, str], str] = field(default_factory=dict)
    """The candidate that stands for another one with the same student, by neighbourhood and that other one."""
    _refused: dict[tuple[str, str], str] = field(default_factory=dict)
    """Why there is no such student, as far as that is known beforehand, by neighbourhood and candidate."""

    def __post_init__(self) -> None:
        for candidate in self.trained.values():
            for n in self.run.parts.trained:
                method = self.method(n, candidate)
                trial = self.distillation.trial(n, method, self.steps, label(n.name, candidate.spec))
                self._rows.append((n, candidate, trial))
                if n.groups is not None and (reason := method.needs_more(n.groups)) is not None:
                    self._refused[n.name, candidate.spec] = reason
        self._find_aliases()
        other = self.aliases.keys() | self._refused.keys()
        distinct = (row for row in self._rows if (row[0].name, row[1].spec) not in other)
        self._trials = {trial.label: (n, candidate, trial) for n, candidate, trial in distinct}
        self._find_aliases_in_bits()

    @cached_property
    def trained(self) -> dict[str, Candidate]:
        """Candidates that are trained, by name: those in float, and what the others are made of."""
        found = [c for candidate in self.candidates if (c := candidate.in_float) is not None]
        return {candidate.spec: candidate for candidate in sorted(found, key=lambda candidate: candidate.size)}

    @cached_property
    def in_bits(self) -> list[Candidate]:
        """Candidates in 8 bits."""
        return [candidate for candidate in self.candidates if candidate.bits < 32]

    @cached_property
    def listed(self) -> frozenset[str]:
        """Names of all candidates of the search; what is trained for one in 8 bits need not be among them."""
        return frozenset(candidate.spec for candidate in self.candidates)

    def method(self, neighbourhood: Neighbourhood, candidate: Candidate) -> StudentMethod:
        """The student method of a candidate in float; widths suit products of integers where it is needed in 8 bits."""
        method = method_of(candidate.recipe(self.run.recipe))
        followed = any(each.of == candidate.spec for each in self.in_bits)
        return self.distillation.suited(method, neighbourhood) if followed else method

    def _find_aliases_in_bits(self) -> None:
        """Of two candidates with the same student, both in 8 bits, the same one stands for the other."""
        for candidate in self.in_bits:
            for n in self.run.parts.trained:
                same = self.aliases.get((n.name, candidate.of))
                other = None if same is None else INT8 if same == TEACHER else f"{same} + {INT8}"
                if other in self.listed:
                    self.aliases[n.name, candidate.spec] = other

    def _find_aliases(self) -> None:
        """Candidates with the same student: the first stands for all, or the first that an earlier run has trained."""
        equal: dict[tuple[str, type[StudentMethod], Hashable], list[tuple[str, Trial]]] = defaultdict(list)
        for n, candidate, trial in self._rows:
            assert n.groups is not None
            shape = trial.method.shape_key(n.groups)
            if shape == WHOLE:
                self.aliases[n.name, candidate.spec] = TEACHER
            elif shape is not None:
                equal[n.name, type(trial.method), shape].append((candidate.spec, trial))
        for (name, _, _), same in equal.items():
            if len(same) > 1:
                there = (spec for spec, trial in same if self.distillation.jobs.entry(trial).done)
                first = next(there, same[0][0])
                self.aliases.update({(name, spec): first for spec, _ in same if spec != first})

    @property
    def steps(self) -> int:
        """Number of optimizer steps of a candidate's training."""
        steps = self.run.recipe.search.steps
        return math.ceil(self.run.recipe.steps / 5) if steps is None else steps

    def plan(self) -> list[OptionReport]:
        """What there is and what would be trained; trains nothing."""
        found = []
        for n, candidate, trial in self._rows:
            alias = self.aliases.get((n.name, candidate.spec))
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
        for candidate in self.in_bits:
            for n in self.run.parts.trained:
                alias = self.aliases.get((n.name, candidate.spec))
                status, reason = ("derived", _made_of(candidate)) if alias is None else ("alias", f"same as {alias}")
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

    def in_float(self, neighbourhood: str, candidate: str) -> str:
        """What a candidate of a neighbourhood is in float, by the name under which it was trained."""
        found = in_float(candidate)
        return self.aliases.get((neighbourhood, found), found)

    def entry(self, neighbourhood: str, candidate: str) -> Entry | None:
        """The trained student of a choice, in float; None for the teacher's own slice."""
        ended = self.outcome(neighbourhood, candidate)
        return ended.entry if ended is not None else None

    def entry_in_bits(self, neighbourhood: Neighbourhood, candidate: str) -> Entry | None:
        """The slice of a candidate in 8 bits; None where it cannot be had."""
        trained = self.in_float(neighbourhood.name, candidate)
        student = None if trained == TEACHER else self.entry(neighbourhood.name, trained)
        if self.precision is None or (student is None and trained != TEACHER):
            return None
        return self.precision.of_slice(neighbourhood, student)

    def outcome(self, neighbourhood: str, candidate: str) -> NeighbourhoodResult | None:
        """How the training of a candidate ended; None where it was left out, or is the teacher's own slice."""
        return self.distillation.outcomes.get(label(neighbourhood, self.in_float(neighbourhood, candidate)))

    def entries(self, choice: Mapping[str, str]) -> dict[str, Entry]:
        """The trained students of a choice, in float, by neighbourhood."""
        found = {name: self.entry(name, candidate) for name, candidate in choice.items() if candidate != TEACHER}
        return {name: entry for name, entry in found.items() if entry is not None}

    def students(self, n: Neighbourhood) -> dict[str, Entry]:
        """What stands for each candidate of a neighbourhood that is there, by name: in float, then in 8 bits."""
        trained = {spec: e for spec in self.trained if (e := self._own_entry(n.name, spec)) is not None}
        own = (c.spec for c in self.in_bits if (n.name, c.spec) not in self.aliases)
        return trained | {spec: e for spec in own if (e := self.entry_in_bits(n, spec)) is not None}

    def _own_entry(self, name: str, spec: str) -> Entry | None:
        return None if (name, spec) in self.aliases else self.entry(name, spec)

    def losses(self) -> dict[tuple[str, str], Loss]:
        """What every trained candidate loses alone, by neighbourhood and candidate."""
        found = {}
        for n, candidate, _ in self._trials.values():
            entry = self.entry(n.name, candidate.spec)
            if entry is not None:
                found[n.name, candidate.spec] = self.measures.of_candidate(n, entry)
        for n, spec, entry in self._made_in_bits():
            found[n.name, spec] = self.measures.of_candidate(n, entry)
        return found

    def _made_in_bits(self) -> Iterator[tuple[Neighbourhood, str, Entry]]:
        """All candidates in 8 bits that could be had, aliases aside."""
        for n in self.run.parts.trained if self.in_bits else ():
            for spec, entry in self.students(n).items():
                if bits_of(spec) < 32:
                    yield n, spec, entry

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
        found |= {(o.neighbourhood, o.candidate): o for o in self._options_in_bits(measured)}
        for (name, spec), same in self.aliases.items():
            alias = replace(found[name, same], candidate=spec, status="alias", reason=f"same as {same}")
            found[name, spec] = alias
        rows = [(n.name, candidate.spec) for n, candidate, _ in self._rows]
        rows += [(n.name, candidate.spec) for candidate in self.in_bits for n in self.run.parts.trained]
        kept = [key for key in measured if key[1] == INT8 and key not in rows]
        return [found[key] for key in rows] + [_derived(measured[key], "of the teacher's own") for key in kept]

    def _options_in_bits(self, measured: Mapping[tuple[str, str], Option]) -> Iterator[OptionReport]:
        for candidate in self.in_bits:
            for n in self.run.parts.trained:
                key = (n.name, candidate.spec)
                if key in measured:
                    yield _derived(measured[key], _made_of(candidate))
                elif key not in self.aliases:
                    there = self.entry_in_bits(n, candidate.spec) is not None
                    why = "the model with it gives no finite answers" if there else "it cannot be had in 8 bits"
                    yield OptionReport(*key, "failed", {}, None, None, why)

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
        todo += [(n, entry) for n, _, entry in self._made_in_bits() if not self.measures.known(entry)]
        if todo:
            _ = self.measures.partials
            self.run.progress.stage("measure", len(todo), "students")
        for n, entry in todo:
            self.measures.of_candidate(n, entry)
            self.run.progress.advance()

    def _failure(self, trial: Trial) -> Entry:
        """Where it is kept that a candidate cannot be had, by this version."""
        return self.run.directory.entry(
            "failures", fingerprint(self.distillation.jobs.key(trial), version("ndonnx-compress"))
        )


def label(neighbourhood: str, candidate: str) -> str:
    """What a candidate of a neighbourhood is called in a run."""
    return f"{neighbourhood} {candidate}"


def _made_of(candidate: Candidate) -> str:
    return f"of {candidate.of}" if candidate.of else "of the teacher's own"


def _derived(option: Option, reason: str) -> OptionReport:
    """A candidate in 8 bits, of which nothing was trained."""
    return OptionReport(
        option.neighbourhood, option.candidate, "derived", dict(option.costs), option.drop, None, reason
    )
