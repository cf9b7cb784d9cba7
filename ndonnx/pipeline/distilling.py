"""Capture and distil: every neighbourhood to its end, in waves that the disk holds, continued where a run stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ndonnx.data import DataSource
from ndonnx.distil import DistilJob, DistilResult, HeadSlice, Plan, load_student, read_result
from ndonnx.errors import RecipeError, RunDirError, SliceError
from ndonnx.executor import make_executor
from ndonnx.graph import save
from ndonnx.graph.load import external_tensors
from ndonnx.machine import pick_device, usable_cores
from ndonnx.partition import Neighbourhood, Partition, extract, is_opaque, region_nodes
from ndonnx.pipeline.batches import CAPTURE_BATCH, sample_bytes, whole_batches
from ndonnx.pipeline.clock import Clock
from ndonnx.pipeline.schedule import Schedule
from ndonnx.progress import Progress
from ndonnx.recipe import Recipe
from ndonnx.report import NeighbourhoodReport
from ndonnx.rundir import Entry, RunDir, fingerprint, fingerprint_file
from ndonnx.students import method_of
from ndonnx.teacher import ActivationStore, capture
from ndonnx.teacher.moments import entry_noise
from ndonnx.teacher.noise import EntryNoise, noise_store
from ndonnx.walk import Prefix


@dataclass(frozen=True)
class Outcome:
    """How a neighbourhood ended."""

    status: str
    entry: Entry | None = None
    result: DistilResult | None = None
    reason: str | None = None

    def report(self, neighbourhood: Neighbourhood) -> NeighbourhoodReport:
        result = self.result
        return NeighbourhoodReport(
            name=neighbourhood.name,
            candidate=result.candidate if result else None,
            status=self.status,
            nmse=result.nmse if result else None,
            nmse_start=result.nmse_start if result else None,
            steps=result.steps if result else 0,
            seconds=round(result.seconds, 3) if result else 0.0,
            parameters=result.parameters if result else neighbourhood.cost.parameters,
            macs=result.macs if result else neighbourhood.cost.macs,
            reason=self.reason,
        )


@dataclass(frozen=True)
class _Head:
    """A teacher slice through which a neighbourhood looks ahead."""

    model: ir.Model
    context: tuple[str, ...]
    output: str


@dataclass
class Distillation:
    """Capture and distil: the part of a run that takes long and can be continued."""

    run: RunDir
    model_path: Path
    parts: Partition
    source: DataSource
    samples: int
    recipe: Recipe
    schedule: Schedule
    progress: Progress
    clock: Clock
    workers_rss: int = 0
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    data: tuple[str, ...] = ()
    """What all students depend on: the model, the data, how many samples, the seed."""
    _looked: dict[str, list[_Head]] = field(default_factory=dict)
    _chain: list[str] = field(default_factory=list)

    def distil(self) -> dict[str, Outcome]:
        """Bring every neighbourhood to an end: distilled, re-used, or kept with its reason."""
        for neighbourhood in self.parts.neighbourhoods:
            if not neighbourhood.distillable:
                self.outcomes[neighbourhood.name] = Outcome("kept", reason=neighbourhood.reason)
        samples, waves = self._waves()
        self.data = (self._model_fingerprint(), self.source.fingerprint(), str(samples), str(self.recipe.seed))
        if self.recipe.inputs == "student":
            self._in_order(waves, samples)
        elif self.recipe.inputs == "noise":
            self._on_noise(waves, samples)
        else:
            self._apart(waves, samples)
        return self.outcomes

    def _apart(self, waves: list[list[Neighbourhood]], samples: int) -> None:
        """Each on the teacher's activations, in parallel: the paper's method."""
        todo = [[n for n in wave if not self._reuse(n, self._entry(n))] for wave in waves]
        self._estimate(todo, waves, samples)
        total = sum(map(len, todo))
        done = 0
        for wave, open_ in zip(waves, todo, strict=True):
            if not open_:
                continue
            values = self._wanted(wave)
            entry = self.run.entry("activations", fingerprint(*self.data, values))
            with self.clock.measure("capture"):
                store = self._capture(entry, values, samples)
            with self.clock.measure("distil"):
                self.progress.stage("distil", total, "neighbourhoods")
                self.progress.advance(done)
                stores = dict.fromkeys(values, store.path)
                self._train({n.name: self._job(n, stores, self._entry(n)) for n in open_})
            done += len(open_)
            entry.remove()

    def _on_noise(self, waves: list[list[Neighbourhood]], samples: int) -> None:
        """Each on Gaussian noise at its own input, rectified behind a ReLU: no data at all (section 6)."""
        if self.recipe.look_ahead:
            raise RecipeError("look_ahead: noise at each neighbourhood says nothing of what follows; leave it out")
        drawn = entry_noise(self.parts, carry=False, seed=self.recipe.seed, threads=1)
        folder = self.run.path / "noise"
        for wave in waves:
            jobs = {}
            with self.clock.measure("capture"):
                for number, neighbourhood in enumerate(wave):
                    entry = self._entry(neighbourhood)
                    if self._reuse(neighbourhood, entry):
                        continue
                    noise = drawn.get(neighbourhood.name, EntryNoise("white", None))
                    slice_ = self.parts.slice_of(neighbourhood)
                    try:
                        store = noise_store(
                            slice_, folder / f"{number:04}", samples, self.recipe.seed, noise.kind, noise.moments
                        )
                    except SliceError as error:
                        self.outcomes[neighbourhood.name] = Outcome("kept", reason=str(error))
                        continue
                    jobs[neighbourhood.name] = self._job(neighbourhood, dict.fromkeys(store.names, store.path), entry)
            with self.clock.measure("distil"):
                self.progress.stage("distil", len(jobs), "neighbourhoods")
                self._train(jobs)
            shutil.rmtree(folder, ignore_errors=True)

    def _in_order(self, waves: list[list[Neighbourhood]], samples: int) -> None:
        """One after the other, each on what the students before it give, so that errors do not add up."""
        open_ = [n for wave in waves for n in wave]
        if all(self._entry(n).done for n in self._chained(open_)):
            waves = []
        folder = self.run.path / "prefix"
        prefix = Prefix(self.parts, open_, self._batches(samples), folder, samples) if waves else None
        self._chain.clear()
        for neighbourhood in self._chained([] if waves else open_):
            self._reuse(neighbourhood, self._entry(neighbourhood))
        for wave in waves:
            exits = self._exits(wave)
            entry = self.run.entry("activations", fingerprint(*self.data, exits))
            with self.clock.measure("capture"):
                store = self._capture(entry, exits, samples)
            with self.clock.measure("distil"):
                self.progress.stage("distil", len(open_), "neighbourhoods")
                for neighbourhood in self._chained(wave):
                    assert prefix is not None
                    self._after(prefix, neighbourhood, store)
            entry.remove()
        if prefix is not None:
            prefix.close()
            shutil.rmtree(folder, ignore_errors=True)

    def _chained(self, neighbourhoods: Iterable[Neighbourhood]) -> Iterator[Neighbourhood]:
        """In order, the key of each going into those of all after it."""
        for neighbourhood in neighbourhoods:
            yield neighbourhood
            self._chain.append(self._entry(neighbourhood).path.name)

    def _after(self, prefix: Prefix, neighbourhood: Neighbourhood, store: ActivationStore) -> None:
        """Train one neighbourhood behind the students before it."""
        entry = self._entry(neighbourhood)
        if not self._reuse(neighbourhood, entry):
            stores = dict.fromkeys(store.names, store.path)
            stores |= {name: given.path for name, given in prefix.inputs_of(neighbourhood).items()}
            self._train({neighbourhood.name: self._job(neighbourhood, stores, entry)})
        ended = self.outcomes[neighbourhood.name].entry
        prefix.put(neighbourhood, load_student(ended) if ended is not None else self.parts.slice_of(neighbourhood))
        self.progress.advance()

    def _model_fingerprint(self) -> str:
        """Of the file and of the weights that it keeps beside it."""
        beside = sorted({str(tensor.path) for tensor in external_tensors(self.parts.model)})
        return fingerprint(*map(fingerprint_file, [str(self.model_path), *beside]))

    def _reuse(self, neighbourhood: Neighbourhood, entry: Entry) -> bool:
        if not entry.done:
            return False
        result = read_result(entry)
        self.outcomes[neighbourhood.name] = Outcome("reused", entry, result)
        self.progress.finished(neighbourhood.name, "reused", result.nmse, None)
        return True

    def _entry(self, neighbourhood: Neighbourhood) -> Entry:
        """Where a student lives: the key says everything that it depends on."""
        method = method_of(self.recipe)
        ahead = [self.recipe.look_ahead, *self._weights()] if self.recipe.look_ahead else []
        key = fingerprint(
            *self.data,
            boundary([neighbourhood]),
            type(method).__name__,
            asdict(method),  # type: ignore[call-overload]
            asdict(self._plan()),
            self.recipe.holdout,
            self.recipe.parity,
            ahead,
            self.recipe.inputs == "noise",
            list(self._chain),
        )
        return self.run.entry("students", f"{neighbourhood.name}-{key}")

    def _wanted(self, neighbourhoods: Iterable[Neighbourhood]) -> list[str]:
        """Names of the values to capture for these neighbourhoods, each once, in order."""
        open_ = list(neighbourhoods)
        ahead = (name for n in open_ for head in self._heads(n) for name in (*head.context, head.output))
        return list(dict.fromkeys([*boundary(open_), *ahead]))

    def _exits(self, neighbourhoods: Iterable[Neighbourhood]) -> list[str]:
        """The same without what the students before them give."""
        open_ = list(neighbourhoods)
        own = [n.exit.name or "" for n in open_ if n.exit is not None]
        ahead = (name for n in open_ for head in self._heads(n) for name in (*head.context, head.output))
        return list(dict.fromkeys([*own, *ahead]))

    def _weights(self) -> tuple[float, ...]:
        weights = self.recipe.look_ahead_weights or (1.0,) * self.recipe.look_ahead
        if len(weights) != self.recipe.look_ahead:
            raise RecipeError(
                f"look_ahead_weights: {len(weights)} given for --look-ahead {self.recipe.look_ahead}; give one for each"
            )
        return weights

    def _heads(self, neighbourhood: Neighbourhood) -> list[_Head]:
        """The teacher slices behind a neighbourhood: each up to the exit of the next one on the chain."""
        if neighbourhood.name not in self._looked:
            self._looked[neighbourhood.name] = _heads(self.parts, neighbourhood, self.recipe.look_ahead)
        return self._looked[neighbourhood.name]

    def _waves(self) -> tuple[int, list[list[Neighbourhood]]]:
        """Neighbourhoods in order, in as few and as even waves as the cache budget allows, and the samples it holds.

        Depends on the recipe alone, not on what is done, so that a continued run captures the same.
        """
        budget = self.recipe.cache_budget
        open_ = self.parts.distillable
        one = [self._bytes([n]) for n in open_]
        samples = self.samples
        if open_ and max(one) * samples > budget:
            samples = max(2, budget // max(one))
            self.progress.note(
                f"the cache budget of {gigabytes(budget)} holds {samples} of {self.samples} samples of the largest "
                f"neighbourhood; raise --cache-budget to use them all"
            )
        low, high = max(one, default=0), budget // samples
        fewest = len(self._fill(open_, high))
        while low < high:  # the smallest limit that needs no more waves makes them even
            middle = (low + high) // 2
            if len(self._fill(open_, middle)) == fewest:
                high = middle
            else:
                low = middle + 1
        return samples, self._fill(open_, low)

    def _fill(self, neighbourhoods: list[Neighbourhood], limit: int) -> list[list[Neighbourhood]]:
        """Runs of neighbours whose boundaries take at most `limit` bytes a sample."""
        waves: list[list[Neighbourhood]] = []
        held: set[str] = set()
        for neighbourhood in neighbourhoods:
            wanted = held | set(self._wanted([neighbourhood]))
            if waves and sum(self.sizes[name] for name in wanted) <= limit:
                waves[-1].append(neighbourhood)
                held = wanted
            else:
                waves.append([neighbourhood])
                held = set(self._wanted([neighbourhood]))
        return waves

    def _bytes(self, neighbourhoods: list[Neighbourhood]) -> int:
        """Bytes that one sample of these neighbourhoods' boundaries takes in the store."""
        names = self._wanted(neighbourhoods)
        for name in names:
            if name not in self.sizes:
                self.sizes[name] = sample_bytes(self.parts.model, [name], self.source)
        return sum(self.sizes[name] for name in names)

    def _estimate(self, todo: list[list[Neighbourhood]], waves: list[list[Neighbourhood]], samples: int) -> None:
        sizes = [self._bytes(wave) * samples for wave, open_ in zip(waves, todo, strict=True) if open_]
        if sizes:
            sweeps = f"in {len(sizes)} sweeps of at most " if len(sizes) > 1 else ""
            self.progress.note(
                f"activations of {samples} samples take {sweeps}{gigabytes(max(sizes))} on disk "
                f"(cache budget {gigabytes(self.recipe.cache_budget)})"
            )

    def _batches(self, samples: int) -> Callable[[], Iterator[Mapping[str, np.ndarray]]]:
        return lambda: whole_batches(self.source, CAPTURE_BATCH, samples=samples, seed=self.recipe.seed)

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

    def _train(self, jobs: Mapping[str, DistilJob]) -> None:
        executor = make_executor(self.recipe.executor, self._workers())
        longest_first = sorted(jobs.values(), key=lambda job: -sum(self.sizes[name] for name in job.stores))
        for outcome in executor.run(longest_first, self.progress.step):
            result = outcome.result
            self.outcomes[outcome.name] = (
                Outcome("distilled", jobs[outcome.name].entry, result)
                if result is not None
                else Outcome("kept", reason=outcome.error)
            )
            end = self.outcomes[outcome.name]
            self.progress.finished(outcome.name, end.status, result.nmse if result else None, end.reason)
            if self.recipe.inputs != "student":
                self.progress.advance()
        self.workers_rss = max(self.workers_rss, executor.peak_rss_bytes)

    def _workers(self) -> int:
        # From the recipe and the partition alone: threads decide the last bits, and a continued run has fewer jobs.
        if self.recipe.inputs == "student" or (self.recipe.executor == "serial" and self.recipe.workers is None):
            return 1
        return self.recipe.workers or min(usable_cores(), len(self.parts.distillable))

    def _job(self, neighbourhood: Neighbourhood, stores: Mapping[str, Path], entry: Entry) -> DistilJob:
        slices = self.run.path / "slices"
        slices.mkdir(exist_ok=True)
        slice_path = slices / f"{neighbourhood.name}.onnx"
        model = self.parts.slice_of(neighbourhood)
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
        return DistilJob(
            name=neighbourhood.name,
            slice_path=slice_path,
            groups=neighbourhood.groups,
            inputs=inputs,
            target=target,
            stores={name: stores[name] for name in read},
            entry=entry,
            method=method_of(self.recipe),
            plan=self._plan(),
            holdout=self.recipe.holdout,
            parity=self.recipe.parity,
            threads=max(1, usable_cores() // self._workers()),
            heads=tuple(heads),
            head_weights=self._weights()[: len(heads)],
        )

    def _plan(self) -> Plan:
        return self.schedule.distil(len(self.parts.distillable), self._workers())


def _heads(parts: Partition, neighbourhood: Neighbourhood, count: int) -> list[_Head]:
    """Up to `count` teacher slices behind a neighbourhood, each from where the one before ends."""
    heads: list[_Head] = []
    order = parts.distillable
    start = neighbourhood.exit
    for following in order[order.index(neighbourhood) + 1 :]:
        if len(heads) == count or start is None or following.exit is None:
            break
        nodes, context = region_nodes(parts.flow, start, following.exit)
        if any(map(is_opaque, nodes)) or not any(start in node.inputs for node in nodes):
            break
        model = extract(parts.model, nodes, [start, *context], [following.exit])
        heads.append(_Head(model, tuple(value.name or "" for value in context), following.exit.name or ""))
        start = following.exit
    return heads


def boundary(neighbourhoods: Iterable[Neighbourhood]) -> list[str]:
    """Names of the values to capture for these neighbourhoods, each once, in order."""
    names: dict[str, None] = {}
    for n in neighbourhoods:
        assert n.entry is not None and n.exit is not None
        names.update(dict.fromkeys(value.name or "" for value in (n.entry, *n.context, n.exit)))
    return list(names)


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
