"""Overhead: what the SDK costs on top of the work that cannot be avoided.

    python -m benchmarks.overhead MODEL --data SRC [--recipe FILE] [--out FILE]
    python -m benchmarks.overhead --field ppocr-rec --cache DIR --samples 3000 --only fixed
    python -m benchmarks.overhead --demo

Four measurements; --only takes a choice of them. In the first three, both ways are run in turn, the order changing from
one repetition to the next, and the ratio is the median of the ratios of neighbouring runs. --field takes a real model
of `benchmarks.field` with its data instead of MODEL and --data.

distil   A distil job, run by the serial executor, against the barest training loop of the same slice: the same
         candidate, steps, batch size, precision and threads. The job's time is all of it: reading the slice,
         shrinking and its closed-form start, both parity gates, batches from the memory map, held-out evaluation,
         checks, writing. The loop has its activations in memory as float32 tensors before the clock starts, draws
         its batches with `index_select`, and does forward (autocast), MSE, backward and a fused Adam, nothing else.
         --threads is 1 by default, as in a run with a worker for each core; with more, other work on the machine
         makes the threads of a small slice wait for each other many times longer than they compute.
         Ratio of times, SDK over loop, for each slice and for all together: at most 1.15. The job's fixed part
         weighs less the more --steps there are, and the larger the slices.
capture  `ndonnx.teacher.capture` of all values between neighbourhoods, against an onnxruntime session that computes
         the same values as float32 and drops them. Both are fed the same batches, decoded and in memory; both times
         hold the opening of the session; capture's hold the halving, checksums, writing and closing of the store.
         Ratio of throughputs, capture over session: at least 0.85.
workers  The distil jobs of all slices, by two worker processes with one thread each against one worker process with
         one thread: the wall time of the stage, with the start of the processes. Ratio of times, one worker over
         two: at least 1.6. It needs two cores.

fixed    A run of the command with no step for any neighbourhood and two of fine-tuning: what a neighbourhood costs
         besides training (ranking, least squares, conversion, gates, checks), of the slowest one at most 3 s, and
         the most memory that the run held with all its workers, at most 3 GB. Left out unless --only asks for it.

The floor is the time of the loop, of the session, half the time of one worker, and for `fixed` the 3 s and the 3 GB.
--out writes it all as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
import torch.nn.functional as F
from onnx_ir.passes.common import RemoveUnusedNodesPass

from benchmarks import common
from benchmarks.common import Notes, Slice, Stopwatch, Subject
from benchmarks.measured import FIXED, Measured, measured_line
from ndonnx.convert import to_torch
from ndonnx.distill.job import DistilJob
from ndonnx.distill.plan import Plan
from ndonnx.distill.schedule import FIRST_LR
from ndonnx.errors import ShrinkError, UsageError
from ndonnx.graph import save, serialise
from ndonnx.partition import Partition
from ndonnx.runtime.executor import Executor, ProcessExecutor, SerialExecutor
from ndonnx.runtime.machine import pick_device, usable_cores
from ndonnx.runtime.run_directory import RunDir
from ndonnx.students.registry import method_of
from ndonnx.teacher import ActivationStore, CaptureSettings, capture

MEASUREMENTS = ("distil", "capture", "workers")
FIXED_SECONDS, FIXED_GIGABYTES = 3.0, 3.0
WORKERS = 2
WARM_UP = 2
"""Steps of the bare loop before a slice's first measured run: libraries prepare their kernels for its shapes."""
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_COLUMNS = ("measurement", "SDK", "floor", "ratio", "target", "met")
_COMMAND = "from ndonnx_cli.main import main; main()"


class Bench:
    """A teacher partitioned, its data in memory and its activations captured."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject = subject
        self.folder = folder
        self.parts: Partition = subject.partition()
        self.device = pick_device(subject.recipe.device)
        source = subject.open(subject.data)
        self.data = common.training_data(source, subject.recipe.samples, subject.recipe)
        self.samples = self.data.length
        self.values = common.boundary(self.parts.distillable)

    @cached_property
    def batches(self) -> list[Mapping[str, np.ndarray]]:
        """The data, decoded."""
        return [batch.inputs for batch in self.data.batches(common.capture_batch(self.parts.model))]

    @cached_property
    def store(self) -> ActivationStore:
        """The captured activations."""
        return self.capture(self.folder / "store")

    def capture(self, folder: Path) -> ActivationStore:
        """The SDK's sweep."""
        return capture(
            self.parts.model,
            self.values,
            lambda: self.batches,
            folder,
            samples=self.samples,
            settings=CaptureSettings(device=self.device),
        )

    def slices(self) -> list[Slice]:
        """Those that can be shrunk, the largest activations first, as the pipeline starts them."""
        holdout = self.subject.recipe.holdout
        slices = [Slice.of(self.parts, n, self.store, holdout) for n in self.parts.distillable]
        return sorted(slices, key=lambda part: -part.samples.bytes_per_sample())

    def job(self, part: Slice, run: RunDir, threads: int) -> DistilJob:
        """The job that the pipeline would make of a slice."""
        recipe, name = self.subject.recipe, part.neighbourhood.name
        path = self.folder / f"{name}.onnx"
        save(part.model, path)
        assert part.neighbourhood.groups is not None
        bf16, rate = common.in_bf16(recipe), FIRST_LR if recipe.lr is None else recipe.lr
        return DistilJob(
            name=name,
            slice_path=path,
            groups=part.neighbourhood.groups,
            inputs=part.samples.inputs,
            target=part.target,
            stores=dict.fromkeys((*part.samples.inputs, part.target), self.folder / "store"),
            entry=run.entry("students", name),
            method=method_of(recipe),
            plan=Plan(recipe.steps, recipe.batch_size, rate, recipe.warmup, recipe.seed, self.device, bf16),
            holdout=recipe.holdout,
            parity=recipe.parity,
            threads=threads,
        )


def measure_distil(bench: Bench, repeat: int, threads: int) -> list[Measured]:
    """Each job against its bare loop, and the sums."""
    times: dict[str, list[tuple[float, float]]] = {}
    with RunDir(bench.folder / "distil") as run:
        for part in bench.slices():
            name = part.neighbourhood.name
            bare = bare_loop(bench, part, threads)
            if bare is None:
                continue
            job = bench.job(part, run, threads)
            bare(WARM_UP)
            times[name] = paired(
                partial(run_jobs, SerialExecutor(), [job]), partial(bare, bench.subject.recipe.steps), repeat
            )
            Notes().note(f"distil {name}: {_times(times[name])}")
    if not times:
        raise UsageError(f"{bench.subject.model}: no neighbourhood could be shrunk, there is nothing to measure")
    sums = [(sum(sdk for sdk, _ in turn), sum(bare for _, bare in turn)) for turn in zip(*times.values(), strict=True)]
    lines = [*times.items(), ("all", sums)]
    return [measured_line("distil", name, pairs, [sdk / bare for sdk, bare in pairs]) for name, pairs in lines]


def bare_loop(bench: Bench, part: Slice, threads: int) -> Callable[[int], float] | None:
    """Seconds by steps of training the slice's candidate with nothing around; None where there is no candidate."""
    recipe, device = bench.subject.recipe, torch.device(bench.device)
    try:
        candidate = part.candidate(recipe, part.samples.blocks.holdout)
    except ShrinkError as error:
        Notes().note(f"{part.neighbourhood.name} is left out: {error}")
        return None
    bf16 = common.in_bf16(recipe)

    def loop(steps: int) -> float:
        torch.set_num_threads(threads)
        torch.manual_seed(recipe.seed)
        module = to_torch(candidate.model).to(device)
        arrays = part.samples.arrays(part.samples.blocks.holdout, part.samples.blocks.samples)
        *inputs, target = (torch.from_numpy(array).to(device) for array in arrays.values())
        weights = [p for p in module.parameters() if p.requires_grad]
        size = min(recipe.batch_size, len(target))
        clock = Stopwatch()
        optimiser = torch.optim.Adam(weights, lr=FIRST_LR if recipe.lr is None else recipe.lr, fused=True)
        for _ in range(steps):
            rows = torch.randint(len(target), (size,), device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                answer = module(*(t.index_select(0, rows) if len(t) == len(target) else t for t in inputs))
            loss = F.mse_loss(answer.float(), target.index_select(0, rows))
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimiser.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock.seconds

    return loop


def run_jobs(executor: Executor, jobs: Sequence[DistilJob]) -> float:
    """Seconds of the stage.

    Raises:
        UsageError: a job failed, so its time means nothing.
    """
    clock = Stopwatch()
    outcomes = list(executor.run(jobs, lambda name, step, steps, nmse: None))
    seconds = clock.seconds
    for outcome in outcomes:
        if outcome.fault is not None:
            raise UsageError(f"{outcome.name} cannot be distilled: {outcome.fault.reason}; leave it out with `freeze`")
    return seconds


def measure_capture(bench: Bench, repeat: int) -> list[Measured]:
    """Capture against bare runs of a session; the first turn of each warms up and is not counted."""
    target = bench.folder / "again"

    def sdk() -> float:
        clock = Stopwatch()
        bench.capture(target)
        seconds = clock.seconds
        shutil.rmtree(target)
        return seconds

    pairs = paired(sdk, lambda: bare_sweep(bench), repeat + 1)[1:]
    Notes().note(f"capture: {_times(pairs)}")
    return [measured_line("capture", "all", pairs, [bare / sdk for sdk, bare in pairs])]


def bare_sweep(bench: Bench) -> float:
    """Seconds of onnxruntime alone for the captured values."""
    model = bench.parts.model.clone()
    inputs = {value.name for value in model.graph.inputs}
    values = ir.convenience.create_value_mapping(model.graph)
    wanted = [name for name in bench.values if name not in inputs]
    model.graph.outputs[:] = [values[name] for name in wanted]
    RemoveUnusedNodesPass()(model)
    whole = serialise(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    gpu = ["CUDAExecutionProvider"] if bench.device == "cuda" else []
    clock = Stopwatch()
    session = ort.InferenceSession(whole, options, providers=[*gpu, "CPUExecutionProvider"])
    fed = [value.name for value in session.get_inputs()]
    for batch in bench.batches:
        session.run(wanted, {name: batch[name] for name in fed})
    return clock.seconds


def measure_workers(bench: Bench, repeat: int) -> list[Measured]:
    """The whole stage with two workers against one; nothing on a machine with one core."""
    if usable_cores() < WORKERS:
        Notes().note(f"workers: not measured, this process may use {usable_cores()} core")
        return []
    with RunDir(bench.folder / "workers") as run, one_thread():
        jobs = [bench.job(part, run, threads=1) for part in bench.slices()]
        pairs = paired(
            lambda: run_jobs(ProcessExecutor(WORKERS), jobs), lambda: run_jobs(ProcessExecutor(1), jobs), repeat
        )
    Notes().note(f"workers: {_times(pairs)}")
    floors = [(two, one / WORKERS) for two, one in pairs]
    return [measured_line("workers", "all", floors, [one / two for two, one in pairs])]


def measure_fixed(bench: Bench) -> list[Measured]:
    """The slowest neighbourhood of a run that does not train it, and the memory of the run.

    Raises:
        UsageError: the run failed.
    """
    subject, recipe = bench.subject, bench.folder / "fixed.toml"
    tables = subject.recipe.data.model_dump(mode="json", exclude_none=True)
    lines = [f"samples = {subject.recipe.samples}", f"keep = {subject.recipe.part_kept}", "[data]"]
    recipe.write_text("\n".join([*lines, *(f"{key} = {json.dumps(value)}" for key, value in tables.items())]))
    options = ["--recipe", str(recipe), "--inputs", "teacher", "--steps", "0", "--finetune-steps", "2", "--json", "-q"]
    options += ["--finetune-samples", str(subject.recipe.samples), "--augment", "none"]
    command = [sys.executable, "-c", _COMMAND, "compress", str(subject.model), "--data", subject.data, *options]
    done = subprocess.run([*command, "-o", str(bench.folder / "fixed.onnx")], stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise UsageError(f"{subject.model}: ndonnx compress ended with exit code {done.returncode}")
    report = json.loads(done.stdout)
    found = {each["name"]: each["seconds"] for each in report["neighbourhoods"] if each["status"] == "distilled"}
    slowest = max(found, key=lambda name: found[name])
    for name, seconds in found.items():
        Notes().note(f"fixed {name}: {seconds:.2f} s")
    held = report["peak_rss_bytes"] / 1e9
    return [
        measured_line(FIXED, part, [(value, limit)], [value / limit])
        for part, value, limit in ((slowest, found[slowest], FIXED_SECONDS), ("memory", held, FIXED_GIGABYTES))
    ]


def paired(sdk: Callable[[], float], floor: Callable[[], float], repeat: int) -> list[tuple[float, float]]:
    """Seconds of both ways, in turn; which goes first alternates."""
    pairs = []
    for turn in range(repeat):
        if turn % 2:
            bare = floor()
            pairs.append((sdk(), bare))
        else:
            pairs.append((sdk(), floor()))
    return pairs


@contextmanager
def one_thread() -> Iterator[None]:
    """Worker processes started inside have one thread in every numerical library, however few they are."""
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def measure(name: str, bench: Bench, options: argparse.Namespace) -> list[Measured]:
    """The lines of one measurement."""
    match name:
        case "distil":
            return measure_distil(bench, options.repeat, options.threads)
        case "capture":
            return measure_capture(bench, options.repeat)
        case "fixed":
            return measure_fixed(bench)
    return measure_workers(bench, options.repeat)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="ndonnx-", dir=options.work) as folder:
        subject = _field_subject(options, Path(folder)) if options.field else _subject(options)
        machine = common.machine(subject.recipe)
        print(common.machine_line(machine), flush=True)
        bench = Bench(subject, Path(folder))
        measured = [line for name in options.only or MEASUREMENTS for line in measure(name, bench, options)]
        samples = bench.samples
    recipe = subject.recipe
    title = f"Overhead: {recipe.steps} steps of {recipe.batch_size}, {samples} samples, median of {options.repeat}"
    common.print_table(title, _COLUMNS, [line.row() for line in measured])
    if options.out is not None:
        common.write_json(
            options.out,
            {
                "machine": machine,
                "model": subject.model.name,
                "recipe": recipe.model_dump(mode="json"),
                "samples": samples,
                "repeat": options.repeat,
                "distil_threads": options.threads,
                "measured": [{**asdict(line), "met": line.met} for line in measured],
            },
        )


def _subject(options: argparse.Namespace, **overrides: Any) -> Subject:
    return common.subject_of(options, judged=False, steps=options.steps, samples=options.samples, **overrides)


def _field_subject(options: argparse.Namespace, folder: Path) -> Subject:
    """A real model with its data: fetched, exported and made in the cache where they are not there."""
    from benchmarks.field.subjects import SUBJECTS, Part  # noqa: PLC0415 - needs more than the other measurements

    if options.field not in SUBJECTS or options.cache is None:
        raise UsageError(f"--field takes one of {', '.join(SUBJECTS)}, and needs --cache DIR")
    found = SUBJECTS[options.field]
    options.cache.mkdir(parents=True, exist_ok=True)
    arrays = found.data(options.cache, Part(test=False), options.samples)
    options.model, options.data = found.model(options.cache), str(folder / "field.npz")
    np.savez(options.data, **{name: array for name, array in arrays.items() if name != "label"})  # type: ignore[arg-type]
    return _subject(options, data=dict(found.preprocess or {}))


def _parser() -> argparse.ArgumentParser:
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--field", metavar="NAME", help="a real model of `benchmarks.field` instead of MODEL and --data")
    add("--cache", type=Path, metavar="DIR", help="where --field keeps what it fetches")
    add("--steps", type=common.positive, help="optimiser steps of each slice (default: the recipe's)")
    add("--samples", type=common.positive, default=2000, help="samples captured (default: %(default)s)")
    add("--repeat", type=common.positive, default=3, help="times that both ways are run (default: %(default)s)")
    add("--threads", type=common.positive, default=1, help="threads of `distil`'s job and loop (default: %(default)s)")
    add("--only", choices=(*MEASUREMENTS, FIXED), action="append", help="measure only this; may be given again")
    add("--out", type=Path, metavar="FILE", help="where the JSON goes")
    add("--work", type=Path, metavar="DIR", help="where scratch files go (default: the system's temporary folder)")
    return parser


def _times(pairs: Sequence[tuple[float, float]]) -> str:
    return ", ".join(f"{sdk:.2f} s against {bare:.2f} s" for sdk, bare in pairs)


if __name__ == "__main__":
    common.run(main)
