"""The block library: every candidate of every neighbourhood, trained once for all searches on the teacher."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version

import onnx_ir as ir

from ndonnx.distill.job import load_student
from ndonnx.errors import first_line
from ndonnx.flow.jobs import NeighbourhoodResult, Trial
from ndonnx.flow.measure import Loss, Measures
from ndonnx.flow.mixed_precision import MixedPrecision
from ndonnx.flow.quantise_trials import REFUSED
from ndonnx.flow.run import Run
from ndonnx.flow.strategies import Parallel
from ndonnx.flow.train import Distillation
from ndonnx.graph import Cost
from ndonnx.graph.storage.files import file_bytes
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
    """Trains and measures candidates, and lays them out as the table of a search."""

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
    _aliases: dict[tuple[str, str], str] = field(default_factory=dict)
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
        other = self._aliases.keys() | self._refused.keys()
        distinct = (row for row in self._rows if (row[0].name, row[1].spec) not in other)
        self._trials = {trial.label: (n, candidate, trial) for n, candidate, trial in distinct}
        self._find_aliases_in_bits()

    @cached_property
    def trained(self) -> dict[str, Candidate]:
        """Candidates that are trained, by name: those in float, and what the others are made of."""
        found = [c for candidate in self.candidates if (c := candidate.in_float) is not None]
        return {candidate.spec: candidate for candidate in sorted(found, key=lambda candidate: candidate.size)}

    @cached_property
    def _in_bits(self) -> list[Candidate]:
        return [candidate for candidate in self.candidates if candidate.bits < 32]

    @cached_property
    def _listed(self) -> frozenset[str]:
        return frozenset(candidate.spec for candidate in self.candidates)

    def method(self, neighbourhood: Neighbourhood, candidate: Candidate) -> StudentMethod:
        """The student method of a candidate in float; widths suit products of integers where it is needed in 8 bits."""
        method = method_of(candidate.recipe(self.run.recipe))
        followed = any(each.of == candidate.spec for each in self._in_bits)
        return self.distillation.suited(method, neighbourhood) if followed else method

    def _find_aliases_in_bits(self) -> None:
        """Of two candidates with the same student, both in 8 bits, the same one stands for the other."""
        for candidate in self._in_bits:
            for n in self.run.parts.trained:
                same = self._aliases.get((n.name, candidate.of))
                other = None if same is None else INT8 if same == TEACHER else f"{same} + {INT8}"
                if other in self._listed:
                    self._aliases[n.name, candidate.spec] = other

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
        for candidate in self._in_bits:
            for n in self.run.parts.trained:
                alias = self._aliases.get((n.name, candidate.spec))
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
        return self._aliases.get((neighbourhood, found), found)

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

    def table(self, *, latency: bool) -> Table:
        """All options that there are. With `latency`, each slice is timed."""
        whole = self._costed(self.run.parts.whole, file_bytes(self.run.teacher.path))
        if latency:
            whole["latency"] = self._teacher_time
        options = []
        fixed = dict(whole)
        for n in self.run.parts.trained:
            slice_ = self.run.parts.slice_of(n)
            # What something else reads too is part of the rest: it stays, whatever becomes of this place.
            others, size = _held(slice_, n.elsewhere)
            cost = Cost(self.run.parts.cost(n).parameters - others, self._macs_of_places(n))
            own = self._costed(cost, weight_bytes(slice_) - size)
            students = self._students(n)
            times = self.measures.times_of(n, students) if latency else {}
            costs = own | _timed(times, TEACHER)
            fixed = {name: fixed[name] - costs[name] for name in fixed}
            options.append(Option(n.name, TEACHER, costs, 0.0))
            for spec in students:
                loss = self._loss(n, spec)
                if spec in self._listed and math.isfinite(loss):
                    costs = self._costs(n, spec, own) | _timed(times, spec)
                    options.append(Option(n.name, spec, costs, loss, self._rounding(n, spec, loss)))
        if self.precision is None:
            return Table(options, fixed, self._aliases)
        aliases = dict(self._aliases)
        for kept in self._kept_pieces(fixed, aliases, timed=latency):
            options.append(kept)
        table = Table(options, fixed, aliases)
        return table.sped_up(self.precision.way.time) if latency else table

    def _students(self, n: Neighbourhood) -> dict[str, Entry]:
        """What stands for each candidate of a neighbourhood that is there, by name: in float, then in 8 bits."""
        trained = {spec: e for spec in self.trained if (e := self._own_entry(n.name, spec)) is not None}
        own = (c.spec for c in self._in_bits if (n.name, c.spec) not in self._aliases)
        return trained | {spec: e for spec in own if (e := self.entry_in_bits(n, spec)) is not None}

    def _own_entry(self, name: str, spec: str) -> Entry | None:
        return None if (name, spec) in self._aliases else self.entry(name, spec)

    def _kept_pieces(
        self, fixed: dict[str, float], aliases: dict[tuple[str, str], str], *, timed: bool
    ) -> Iterator[Option]:
        """Options of the kept pieces of the teacher that can be in 8 bits; what they cost leaves the rest's costs.

        Only what 8 bits change is told of them: the larger of the two has it, the other 0.
        """
        assert self.precision is not None
        if INT8 not in self._listed:
            return
        for name in self.precision.kept_pieces:
            try:
                found = self.precision.of_kept(name, timed=timed)
            except REFUSED as error:
                self.run.progress.note(f"{name} stays in float: {first_line(error)}")
                continue
            more = {"size": found.size, "latency": found.time * (self._teacher_time if timed else 0.0)}
            own, other = ({cost: max(0.0, sign * more.get(cost, 0.0)) for cost in fixed} for sign in (-1, 1))
            fixed.update({cost: fixed[cost] - own[cost] for cost in fixed})
            loss = found.loss.drop if self.run.recipe.search.quality == "metric" else found.loss.divergence
            yield Option(name, TEACHER, own, 0.0)
            if math.isfinite(loss):
                yield Option(name, INT8, other, loss, loss)
            aliases.update({(name, each.spec): INT8 for each in self._in_bits if each.spec != INT8})

    @cached_property
    def _teacher_time(self) -> float:
        return self.measures.time_of_whole()[0]

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
        for n in self.run.parts.trained if self._in_bits else ():
            for spec, entry in self._students(n).items():
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
        for (name, spec), same in self._aliases.items():
            alias = replace(found[name, same], candidate=spec, status="alias", reason=f"same as {same}")
            found[name, spec] = alias
        rows = [(n.name, candidate.spec) for n, candidate, _ in self._rows]
        rows += [(n.name, candidate.spec) for candidate in self._in_bits for n in self.run.parts.trained]
        kept = [key for key in measured if key[1] == INT8 and key not in rows]
        return [found[key] for key in rows] + [_derived(measured[key], "of the teacher's own") for key in kept]

    def _options_in_bits(self, measured: Mapping[tuple[str, str], Option]) -> Iterator[OptionReport]:
        for candidate in self._in_bits:
            for n in self.run.parts.trained:
                key = (n.name, candidate.spec)
                if key in measured:
                    yield _derived(measured[key], _made_of(candidate))
                elif key not in self._aliases:
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

    def _loss(self, n: Neighbourhood, spec: str) -> float:
        if bits_of(spec) < 32:
            made = self.entry_in_bits(n, spec)
            assert made is not None
            found = self.measures.of_candidate(n, made)
            return found.drop if self.run.recipe.search.quality == "metric" else found.divergence
        entry, ended = self.entry(n.name, spec), self.outcome(n.name, spec)
        assert entry is not None and ended is not None and ended.result is not None
        match self.run.recipe.search.quality:
            case "nmse":
                largest = [e for spec in self.trained if (e := self.entry(n.name, spec)) is not None][-1]
                return ended.result.nmse * self.measures.sensitivity(n, largest)
            case "metric":
                return self.measures.of_candidate(n, entry).drop
            case _:
                return self.measures.of_candidate(n, entry).divergence

    def _rounding(self, n: Neighbourhood, spec: str, loss: float) -> float:
        """What of a candidate's loss comes of its 8 bits."""
        if bits_of(spec) == 32:
            return 0.0
        trained = self.in_float(n.name, spec)
        return loss - (0.0 if trained == TEACHER else max(0.0, self._loss(n, trained)))

    def _costs(self, n: Neighbourhood, spec: str, own: Mapping[str, float]) -> dict[str, float]:
        """What a candidate costs; of the teacher's slice, which it may be in 8 bits, what that costs is given."""
        if bits_of(spec) < 32:
            made, trained = self.entry_in_bits(n, spec), self.in_float(n.name, spec)
            assert made is not None and self.precision is not None
            entry = self.entry(n.name, trained)
            student = self.run.parts.slice_of(n) if entry is None else load_student(entry)
            costs = dict(own) if trained == TEACHER else self._costs(n, trained, own)
            more = self.precision.bytes_more(student, load_student(made))
            return costs | {"size": max(0.0, costs["size"] + more)}
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


def _made_of(candidate: Candidate) -> str:
    return f"of {candidate.of}" if candidate.of else "of the teacher's own"


def _derived(option: Option, reason: str) -> OptionReport:
    """A candidate in 8 bits, of which nothing was trained."""
    return OptionReport(
        option.neighbourhood, option.candidate, "derived", dict(option.costs), option.drop, None, reason
    )


def _timed(times: Mapping[str, float], name: str) -> dict[str, float]:
    return {"latency": times[name]} if times else {}
