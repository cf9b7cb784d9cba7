"""What there is to train, the key under which its student is found again by any later run, and how it ended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import onnx_ir as ir

from ndonnx.distill.job import DistilJob, DistilResult, HeadSlice
from ndonnx.distill.plan import Plan
from ndonnx.errors import RecipeError
from ndonnx.flow.run import Run
from ndonnx.graph import save
from ndonnx.partition import Neighbourhood, Partition, extract, is_opaque, region_nodes
from ndonnx.partition.parts import boundary
from ndonnx.report import NeighbourhoodReport
from ndonnx.runtime.faults import Fault
from ndonnx.runtime.fingerprints import Fingerprintable, fingerprint
from ndonnx.runtime.run_directory import Entry, RunDir
from ndonnx.students import StudentMethod


@dataclass(frozen=True)
class Trial:
    """A neighbourhood, and one way to make a student of it."""

    label: str
    """What it is called in outcomes and in progress; unique in a run."""
    neighbourhood: Neighbourhood
    method: StudentMethod
    plan: Plan


@dataclass(frozen=True)
class NeighbourhoodResult:
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
    def kept(cls, name: str, fault: Fault, run: RunDir) -> NeighbourhoodResult:
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
            input=None if neighbourhood.entry is None else neighbourhood.entry.name,
            output=None if neighbourhood.exit is None else neighbourhood.exit.name,
            teacher_parameters=neighbourhood.parameters,
            teacher_macs=parts.cost(neighbourhood).macs,
            curve=result.curve if result else (),
            lr=result.lr if result else None,
            format=result.format if result else None,
        )


@dataclass(frozen=True)
class _Head:
    """A teacher slice through which a neighbourhood looks ahead."""

    model: ir.Model
    context: tuple[str, ...]
    output: str


@dataclass
class Jobs:
    """Makes jobs of trials, and knows where their students live."""

    run: Run
    data: tuple[str, ...] = ()
    """What all students depend on: the model, the rows of the data, the seed."""
    chain: list[str] = field(default_factory=list)
    """Keys of the students before this one, where it depends on them."""
    _looked: dict[str, list[_Head]] = field(default_factory=dict)

    def entry(self, trial: Trial) -> Entry:
        """Where a student lives: the key says everything that it depends on."""
        return self.run.directory.entry("students", self.key(trial))

    def key(self, trial: Trial) -> str:
        """The name of the student's folder. A search and a plain run that want the same student agree on it."""
        recipe = self.run.recipe
        heads = self._heads(trial.neighbourhood)
        uses = self.run.parts.uses(trial.neighbourhood)
        # What only some neighbourhoods have is left out of the others' keys, so that older students are found.
        shared: list[Fingerprintable] = [[boundary([n]) for n in uses[1:]]] if len(uses) > 1 else []
        held: list[Fingerprintable] = [sorted(trial.neighbourhood.held)] if trial.neighbourhood.held else []
        seen: list[Fingerprintable] = [[*head.context, head.output] for head in heads]
        ahead: list[Fingerprintable] = [list(self._weights()), seen] if heads else []
        key = fingerprint(
            *self.data,
            boundary([trial.neighbourhood]),
            type(trial.method).__name__,
            asdict(trial.method),  # type: ignore[call-overload]
            trial.plan.key(),
            recipe.holdout,
            recipe.parity,
            ahead,
            recipe.inputs == "noise",
            list(self.chain),
            *shared,
            *held,
        )
        return f"{trial.neighbourhood.name}-{key}"

    def chained(self, trials: Iterable[Trial]) -> Iterator[Trial]:
        """In order, what became of each going into the keys of all after it: they are trained behind it."""
        for trial in trials:
            yield trial
            self.chain.append(self.key(trial) if self.entry(trial).done else f"{trial.neighbourhood.name} kept")

    def job(
        self,
        trial: Trial,
        stores: Mapping[str, Path],
        threads: int,
        further: Sequence[Mapping[str, Path]] | None = None,
    ) -> DistilJob:
        """The work of a trial on captured values, the store of each by its name.

        Args:
            trial: what is to be done.
            stores: of the values at the neighbourhood.
            threads: of the job.
            further: the same for each other place of its student, in order; None: all in `stores`.
        """
        neighbourhood = trial.neighbourhood
        slices = self.run.directory.path / "slices"
        slices.mkdir(exist_ok=True)
        slice_path = slices / f"{neighbourhood.name}.onnx"
        model = self.run.parts.slice_of(neighbourhood)
        save(model, slice_path)
        heads = []
        for number, head in enumerate(self._heads(neighbourhood), start=1):
            path = slices / f"{neighbourhood.name}-ahead-{number}.onnx"
            save(head.model, path)
            heads.append(HeadSlice(path, head.context, head.output))
        assert neighbourhood.groups is not None and neighbourhood.exit is not None
        inputs = tuple(value.name or "" for value in model.graph.inputs)
        target = neighbourhood.exit.name or ""
        read = (*inputs, target, *(name for head in heads for name in (*head.context, head.output)))
        padding = self._padding if self._padding in stores else None
        return DistilJob(
            name=trial.label,
            slice_path=slice_path,
            groups=neighbourhood.groups,
            inputs=inputs,
            target=target,
            stores={name: stores[name] for name in (*read, *([padding] if padding else []))},
            entry=self.entry(trial),
            method=trial.method,
            plan=trial.plan,
            holdout=self.run.recipe.holdout,
            parity=self.run.recipe.parity,
            threads=threads,
            heads=tuple(heads),
            head_weights=self._weights()[: len(heads)],
            neighbourhood=neighbourhood.name,
            further=self._further(neighbourhood, (*inputs, target), stores if further is None else further),
            held=neighbourhood.held,
            padding=padding,
        )

    def _further(
        self,
        neighbourhood: Neighbourhood,
        names: Iterable[str],
        stores: Mapping[str, Path] | Sequence[Mapping[str, Path]],
    ) -> tuple[Mapping[str, tuple[Path, str]], ...]:
        """Where the values of these names are kept for the other places of a student, by what they are called there."""
        others = self.run.parts.uses(neighbourhood)[1:]
        each = [stores] * len(others) if isinstance(stores, Mapping) else stores
        return tuple(
            {name: (found[n.names[name]], n.names[name]) for name in names}
            for n, found in zip(others, each, strict=True)
        )

    def wanted(self, neighbourhoods: Iterable[Neighbourhood]) -> list[str]:
        """Names of the values to capture for these neighbourhoods, each once, in order."""
        open_ = [use for n in neighbourhoods for use in self.run.parts.uses(n)]
        return list(dict.fromkeys([*boundary(open_), *self._ahead(open_), *self._lengths(open_)]))

    def exits(self, neighbourhoods: Iterable[Neighbourhood]) -> list[str]:
        """Names of the values to capture for sequential training: without what the students before them give.

        What a place of a student reads of that very student's other places is captured from the teacher.
        """
        open_ = [use for n in neighbourhoods for use in self.run.parts.uses(n)]
        own = [n.exit.name or "" for n in open_ if n.exit is not None]
        theirs = boundary([n for n in open_ if n.first is not None and not self.run.parts.together(n)])
        return list(dict.fromkeys([*own, *theirs, *self._ahead(open_), *self._lengths(open_)]))

    @property
    def _padding(self) -> str | None:
        """The value that says how many positions of a sample are filled; noise has no lengths."""
        return None if self.run.recipe.inputs == "noise" else self.run.padding

    def _lengths(self, neighbourhoods: Sequence[Neighbourhood]) -> list[str]:
        return [self._padding] if neighbourhoods and self._padding is not None else []

    def _ahead(self, neighbourhoods: Iterable[Neighbourhood]) -> Iterator[str]:
        return (name for n in neighbourhoods for head in self._heads(n) for name in (*head.context, head.output))

    def _weights(self) -> tuple[float, ...]:
        wanted = self.run.recipe.look_ahead
        weights = self.run.recipe.look_ahead_weights or (1.0,) * wanted
        if len(weights) != wanted:
            raise RecipeError(f"look_ahead_weights: {len(weights)} given for --look-ahead {wanted}; give one for each")
        return weights

    def _heads(self, neighbourhood: Neighbourhood) -> list[_Head]:
        """The teacher slices behind a neighbourhood: each up to the exit of the next one on the chain."""
        if neighbourhood.name not in self._looked:
            alone = len(self.run.parts.uses(neighbourhood)) == 1  # what lies behind several places is no one slice
            self._looked[neighbourhood.name] = (
                _heads(self.run.parts, neighbourhood, self.run.recipe.look_ahead) if alone else []
            )
        return self._looked[neighbourhood.name]


def _heads(parts: Partition, neighbourhood: Neighbourhood, count: int) -> list[_Head]:
    """Up to `count` teacher slices behind a neighbourhood, each from where the one before ends."""
    heads: list[_Head] = []
    order = parts.distillable
    ends = [following.exit for following in order[order.index(neighbourhood) + 1 :]]
    start = neighbourhood.exit
    for end in [*ends, *_answer(parts)]:
        if len(heads) == count or start is None or end is None or start is end:
            break
        nodes, context = region_nodes(parts.flow, start, end)
        if any(map(is_opaque, nodes)) or not any(start in node.inputs for node in nodes):
            break
        model = extract(parts.model, nodes, [start, *context], [end])
        heads.append(_Head(model, tuple(value.name or "" for value in context), end.name or ""))
        start = end
    return heads


def _answer(parts: Partition) -> list[ir.Value]:
    """The teacher's output, to which the slice behind the last neighbourhood leads; none where it has several."""
    outputs = parts.model.graph.outputs
    if len(outputs) != 1 or outputs[0].dtype is None or not outputs[0].dtype.is_floating_point():
        return []
    return list(outputs)


def unchanged_results(parts: Partition) -> dict[str, NeighbourhoodResult]:
    """How all neighbourhoods end when every channel is kept and nothing is trained: they stay, with nothing to measure.

    Slices need not convert, nor even run by themselves, for that.
    """

    def ended(n: Neighbourhood) -> NeighbourhoodResult:
        if not n.distillable:
            return NeighbourhoodResult("kept", reason=n.reason)
        same = DistilResult("width k=1", 0.0, 0.0, 0, 0, 0.0, n.parameters, parts.cost(n).macs)
        return NeighbourhoodResult("distilled", result=same)

    return {n.name: ended(n) for n in parts.neighbourhoods}
