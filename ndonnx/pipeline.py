"""The stages in order: load, partition, capture, distil, splice, verify, report.

This module alone knows all the others. Stages talk through the run directory, so a run that
was interrupted continues with what is done there, whichever executor did it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ndonnx.data import DataSource, input_specs, open_source
from ndonnx.distil import DistilJob, DistilResult, Plan, load_student, read_result
from ndonnx.errors import DataError, ModelError, RunDirError
from ndonnx.evaluate import Evaluation, evaluate
from ndonnx.executor import make_executor
from ndonnx.graph import fold_constants, load, save, slice_cost
from ndonnx.graph.load import check_writable, external_tensors
from ndonnx.machine import computes_in_bf16, peak_rss_bytes, pick_device, usable_cores
from ndonnx.partition import Neighbourhood, Partition, partition
from ndonnx.progress import Progress, Silent
from ndonnx.recipe import Recipe
from ndonnx.report import CompressReport, ModelSummary, NeighbourhoodReport, Seconds
from ndonnx.rundir import Entry, RunDir, fingerprint, fingerprint_file
from ndonnx.splice import is_changed, splice
from ndonnx.students import StudentMethod, Width
from ndonnx.teacher import ActivationStore, capture, capture_bytes, make_session
from ndonnx.verify import verify

_CAPTURE_BATCH = 64
_PROBE = 8
"""Samples on which the finished student is checked."""
_CHECK_SAMPLES = 2000
"""Samples of the calibration data on which teacher and student are compared without `--eval`."""


@dataclass(frozen=True)
class Student:
    """The compressed model."""

    model: ir.Model
    path: Path | None
    """Where it was written; None if no output was asked for."""

    def save(self, path: str | Path) -> None:
        """Write it under its final name only when complete (see `ndonnx.graph.save`)."""
        save(self.model, path)


@dataclass(frozen=True)
class CompressResult:
    """What `compress` returns: the student, and the report as `--json` prints it."""

    student: Student
    report: CompressReport


def compress(
    model: str | Path,
    *,
    data: str,
    recipe: Recipe | None = None,
    output: str | Path | None = None,
    eval_data: str | None = None,
    run_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> CompressResult:
    """Compress an ONNX model by neighbourhood distillation.

    Args:
        model: path of the teacher; never modified.
        data: unlabelled inputs to distil on, as a data source (`calib.npz`, `images/`, `gaussian`).
        recipe: what to build and how; the defaults otherwise.
        output: where the student is written. None: nowhere, see `CompressResult.student`.
        eval_data: data source for the final comparison; labels give accuracy. None: part of `data`.
        run_dir: where the run keeps its state, to be continued after an interruption.
            None: beside `output` (or the model), with the suffix `.run`.
        progress: told what goes on.

    Raises:
        UsageError: bad input; one line that names the file, node or value and the way out.
    """
    recipe = recipe or Recipe()
    progress = progress or Silent()
    clock = _Clock()
    with clock.measure("load"):
        progress.stage("load")
        teacher_path = Path(model)
        if output is not None:
            check_writable(output)
            if Path(output).exists() and Path(output).samefile(teacher_path):
                raise ModelError(f"{output}: is the teacher itself, which is never modified; choose another output")
        teacher = load(teacher_path)
        specs = input_specs(make_session(teacher_path))
        source = open_source(data, specs, recipe.data, seed=recipe.seed)
        judge = open_source(eval_data, specs, recipe.data, seed=recipe.seed) if eval_data is not None else source
        samples = _count_samples(source, recipe.samples)
    folder = Path(run_dir) if run_dir is not None else Path(output or model).with_suffix(".run")
    with RunDir(folder) as run:
        with clock.measure("partition"):
            progress.stage("partition")
            parts = partition_model(teacher, recipe)
        state = _Run(run, teacher_path, parts, source, samples, recipe, progress, clock)
        outcomes = state.distil()
        with clock.measure("splice"):
            progress.stage("splice")
            # In the teacher's order, not in that of completion: the same students are the same bytes.
            trained = [(n, load_student(entry)) for n in parts.neighbourhoods if (entry := outcomes[n.name].entry)]
            students = {n.name: student for n, student in trained if is_changed(student, parts.slice_of(n))}
            student = splice(teacher, students) if students else teacher.clone()
            verify(teacher, student, parts, students, _probe(source), recipe.parity)
            if output is not None:
                save(student, output)
        with clock.measure("evaluate"):
            limit = None if eval_data is not None else _CHECK_SAMPLES
            metrics = _metrics(teacher_path, student, judge, limit, progress)
        report = CompressReport(
            teacher=_summary(teacher, teacher_path),
            student=_summary(student, Path(output) if output is not None else None),
            metrics=metrics,
            neighbourhoods=[outcomes[n.name].report(n) for n in parts.neighbourhoods],
            seconds=clock.seconds(),
            peak_rss_bytes=peak_rss_bytes() + state.workers_rss,
            run_dir=str(folder),
        )
        report.write(run.path / "report.json")
    return CompressResult(Student(student, Path(output) if output is not None else None), report)


def partition_model(teacher: ir.Model, recipe: Recipe) -> Partition:
    """Partition a loaded teacher as a recipe says; the teacher is not changed."""
    working = fold_constants(teacher.clone())
    return partition(working, granularity=recipe.granularity, cut=recipe.cut, freeze=recipe.freeze)


def method_of(recipe: Recipe) -> StudentMethod:
    """The student method that a recipe asks for."""
    return Width(recipe.keep, recipe.round_to, recipe.init)


@dataclass(frozen=True)
class _Outcome:
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


@dataclass
class _Run:
    """Capture and distil: the part of a run that takes long and can be continued."""

    run: RunDir
    model_path: Path
    parts: Partition
    source: DataSource
    samples: int
    recipe: Recipe
    progress: Progress
    clock: _Clock
    workers_rss: int = 0
    outcomes: dict[str, _Outcome] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def distil(self) -> dict[str, _Outcome]:
        """Bring every neighbourhood to an end: distilled, re-used, or kept with its reason."""
        for neighbourhood in self.parts.neighbourhoods:
            if not neighbourhood.distillable:
                self.outcomes[neighbourhood.name] = _Outcome("kept", reason=neighbourhood.reason)
        samples, waves = self._waves()
        data = (self._model_fingerprint(), self.source.fingerprint(), samples, self.recipe.seed)
        todo = [[n for n in wave if not self._reuse(n, data)] for wave in waves]
        self._estimate(todo, waves, samples)
        total = sum(map(len, todo))
        done = 0
        for wave, open_ in zip(waves, todo, strict=True):
            if not open_:
                continue
            entry = self.run.entry("activations", fingerprint(*data, _boundary(wave)))
            with self.clock.measure("capture"):
                store = self._capture(entry, wave, samples)
            with self.clock.measure("distil"):
                self.progress.stage("distil", total, "neighbourhoods")
                self.progress.advance(done)
                self._train(open_, store, data)
            done += len(open_)
            entry.remove()
        return self.outcomes

    def _model_fingerprint(self) -> str:
        """Of the file and of the weights that it keeps beside it."""
        beside = sorted({str(tensor.path) for tensor in external_tensors(self.parts.model)})
        return fingerprint(*map(fingerprint_file, [str(self.model_path), *beside]))

    def _reuse(self, neighbourhood: Neighbourhood, data: tuple[object, ...]) -> bool:
        entry = self._entry(neighbourhood, data)
        if not entry.done:
            return False
        result = read_result(entry)
        self.outcomes[neighbourhood.name] = _Outcome("reused", entry, result)
        self.progress.finished(neighbourhood.name, "reused", result.nmse, None)
        return True

    def _entry(self, neighbourhood: Neighbourhood, data: tuple[object, ...]) -> Entry:
        """Where a student lives: the key says everything that it depends on."""
        key = fingerprint(
            *map(str, data),
            _boundary([neighbourhood]),
            type(method_of(self.recipe)).__name__,
            asdict(method_of(self.recipe)),  # type: ignore[call-overload]
            asdict(self._plan()),
            self.recipe.holdout,
            self.recipe.parity,
        )
        return self.run.entry("students", f"{neighbourhood.name}-{key}")

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
                f"the cache budget of {_gb(budget)} holds {samples} of {self.samples} samples of the largest "
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
            wanted = held | set(_boundary([neighbourhood]))
            if waves and sum(self.sizes[name] for name in wanted) <= limit:
                waves[-1].append(neighbourhood)
                held = wanted
            else:
                waves.append([neighbourhood])
                held = set(_boundary([neighbourhood]))
        return waves

    def _bytes(self, neighbourhoods: list[Neighbourhood]) -> int:
        """Bytes that one sample of these neighbourhoods' boundaries takes in the store."""
        for name in _boundary(neighbourhoods):
            if name not in self.sizes:
                self.sizes[name] = self._size(name)
        return sum(self.sizes[name] for name in _boundary(neighbourhoods))

    def _size(self, name: str) -> int:
        try:
            return capture_bytes(self.parts.model, [name], 1)
        except ModelError:  # its shape is not in the graph: run one batch and look
            return capture_bytes(self.parts.model, [name], 1, batch=_probe(self.source))

    def _estimate(self, todo: list[list[Neighbourhood]], waves: list[list[Neighbourhood]], samples: int) -> None:
        sizes = [self._bytes(wave) * samples for wave, open_ in zip(waves, todo, strict=True) if open_]
        if sizes:
            sweeps = f"in {len(sizes)} sweeps of at most " if len(sizes) > 1 else ""
            self.progress.note(
                f"activations of {samples} samples take {sweeps}{_gb(max(sizes))} on disk "
                f"(cache budget {_gb(self.recipe.cache_budget)})"
            )

    def _capture(self, entry: Entry, wave: list[Neighbourhood], samples: int) -> ActivationStore:
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
            _boundary(wave),
            lambda: _whole_batches(self.source, _CAPTURE_BATCH, samples=samples, seed=self.recipe.seed),
            folder,
            samples=samples,
            device=pick_device(self.recipe.device),
            on_batch=self.progress.advance,
        )
        entry.commit({"samples": samples}, digest=False)
        return store

    def _train(self, neighbourhoods: list[Neighbourhood], store: ActivationStore, data: tuple[object, ...]) -> None:
        # From the recipe and the partition alone: threads decide the last bits, and a continued run has fewer jobs.
        cores = usable_cores()
        workers = self.recipe.workers or min(cores, len(self.parts.distillable))
        if self.recipe.executor == "serial" and self.recipe.workers is None:
            workers = 1
        threads = max(1, cores // workers)
        jobs = {n.name: self._job(n, store, self._entry(n, data), threads) for n in neighbourhoods}
        longest_first = sorted(neighbourhoods, key=lambda n: -self._bytes([n]))
        executor = make_executor(self.recipe.executor, workers)
        for outcome in executor.run((jobs[n.name] for n in longest_first), self.progress.step):
            result = outcome.result
            self.outcomes[outcome.name] = (
                _Outcome("distilled", jobs[outcome.name].entry, result)
                if result is not None
                else _Outcome("kept", reason=outcome.error)
            )
            end = self.outcomes[outcome.name]
            self.progress.finished(outcome.name, end.status, result.nmse if result else None, end.reason)
            self.progress.advance()
        self.workers_rss = max(self.workers_rss, executor.peak_rss_bytes)

    def _job(self, neighbourhood: Neighbourhood, store: ActivationStore, entry: Entry, threads: int) -> DistilJob:
        slices = self.run.path / "slices"
        slices.mkdir(exist_ok=True)
        slice_path = slices / f"{neighbourhood.name}.onnx"
        model = self.parts.slice_of(neighbourhood)
        save(model, slice_path)
        assert neighbourhood.groups is not None and neighbourhood.exit is not None
        return DistilJob(
            name=neighbourhood.name,
            slice_path=slice_path,
            groups=neighbourhood.groups,
            inputs=tuple(value.name or "" for value in model.graph.inputs),
            target=neighbourhood.exit.name or "",
            store_path=store.path,
            entry=entry,
            method=method_of(self.recipe),
            plan=self._plan(),
            holdout=self.recipe.holdout,
            parity=self.recipe.parity,
            threads=threads,
        )

    def _plan(self) -> Plan:
        recipe = self.recipe
        device = pick_device(recipe.device)
        bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and computes_in_bf16(device))
        return Plan(recipe.steps, recipe.batch_size, recipe.lr, recipe.warmup, recipe.seed, device, bf16)


@dataclass
class _Clock:
    """Wall time by stage, in seconds; a stage entered twice adds up."""

    _spent: dict[str, float] = field(default_factory=dict)
    _began: float = field(default_factory=time.perf_counter)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent[stage] = self._spent.get(stage, 0.0) + time.perf_counter() - began

    def seconds(self) -> Seconds:
        """The stages so far, and the total until now."""
        total = time.perf_counter() - self._began
        return Seconds(**{name: round(spent, 3) for name, spent in self._spent.items()}, total=round(total, 3))


def _boundary(neighbourhoods: Iterable[Neighbourhood]) -> list[str]:
    """Names of the values to capture for these neighbourhoods, each once, in order."""
    names: dict[str, None] = {}
    for n in neighbourhoods:
        assert n.entry is not None and n.exit is not None
        names.update(dict.fromkeys(value.name or "" for value in (n.entry, *n.context, n.exit)))
    return list(names)


def _count_samples(source: DataSource, wanted: int) -> int:
    """How many samples there are, up to what is wanted; a source that cannot tell is run through."""
    available = source.length
    if available is None:
        available = sum(len(batch) for batch in source.batches(_CAPTURE_BATCH, samples=wanted))
    if available < 2:
        raise DataError(f"{source.spec}: holds {available} samples; at least 2 are needed, better some hundreds")
    return min(available, wanted)


def _whole_batches(
    source: DataSource, size: int, *, samples: int, seed: int | None = None
) -> Iterator[Mapping[str, np.ndarray]]:
    """Batches of about this size; where the model fixes it, of that, the last one filled up with its last sample."""
    fixed = [spec.shape[0] for spec in source.inputs if spec.shape and isinstance(spec.shape[0], int)]
    for batch in source.batches(fixed[0] if fixed else size, samples=samples, seed=seed):
        missing = fixed[0] - len(batch) if fixed else 0
        yield {
            name: np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]) if missing > 0 else rows
            for name, rows in batch.inputs.items()
        }


def _probe(source: DataSource) -> Mapping[str, np.ndarray]:
    """A few samples for the last check."""
    return next(_whole_batches(source, _PROBE, samples=_PROBE))


def _metrics(
    teacher: Path, student: ir.Model, judge: DataSource, limit: int | None, progress: Progress
) -> dict[str, Evaluation]:
    ours = evaluate(student, judge, teacher=teacher, samples=limit, progress=progress)
    theirs = evaluate(teacher, judge, samples=limit)
    return {"teacher": theirs, "student": ours}


def _summary(model: ir.Model, path: Path | None) -> ModelSummary:
    cost = slice_cost(fold_constants(model.clone()))
    size = None
    if path is not None:
        size = sum(part.stat().st_size for part in (path, path.with_name(f"{path.name}.data")) if part.exists())
    return ModelSummary(path=str(path) if path else None, parameters=cost.parameters, macs=cost.macs, bytes=size)


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
