"""Jobs on a Ray cluster: what Ray costs beside worker processes, and what many workers would make of a large search.

    python -m benchmarks.cluster overhead MODEL --data SRC [--nodes 2] [--repeat 3] [--kill SECONDS] [FLAG...]
    python -m benchmarks.cluster jobs FILE.json [--samples 32] [--steps 2,8]
    python -m benchmarks.cluster simulate FILE.json [--workers 1,8,64,512] [--candidates 14] [--steps 200]
                                          [--samples 2000] [--cores 8] [--gigabits 10]

`overhead` compresses a model by worker processes and on a cluster of one-core nodes on this machine, in turn, each
with as many workers as nodes, by the command line; further flags go to `ndonnx compress`. Their students must have the
same bytes. With --kill one node is killed so many seconds after each run on the cluster began. Students that are
trained one after the other (`--inputs student`, the default without fine-tuning) say nothing: give `--inputs teacher`.

`jobs` runs a search of one candidate for each neighbourhood of a ResNet-50 with random weights, on one thread, with
each of two numbers of steps, and writes what a job takes at once and per step, in processor time, the bytes of a
sample that it reads, and the processor time of capturing and of measuring a candidate, per sample.

`simulate` puts that together: candidates of all neighbourhoods go to the next free worker, the longest jobs first.
Workers that share a node (--cores) fetch each value once, and everything goes through one network card (--gigabits).
Capturing and measuring candidates stay with the main process, on as many cores as a node has.
"""

from __future__ import annotations

import argparse
import heapq
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ndonnx
from benchmarks.common import positive, print_table, run
from ndonnx.runtime.executor import Job, MovableJob, OnStepNamed, Outcome, SerialExecutor, register_executor

_STORE = 200 * 2**20
"""Bytes of the object store of each node of `overhead`."""


@dataclass(frozen=True)
class Timed:
    """What one neighbourhood of a search takes, measured."""

    name: str
    fixed: float
    """Seconds of processor time of a job without its steps."""
    step: float
    """Seconds of a step."""
    values: dict[str, int]
    """Bytes of one sample of each value that its jobs read."""


@dataclass(frozen=True)
class Search:
    """A search, measured: its jobs, and what the main process does."""

    jobs: list[Timed]
    capture: float
    """Seconds of processor time for a training sample, all values together."""
    measure: float
    """The same of measuring a candidate, for a held-out sample."""


@dataclass(frozen=True)
class Cluster:
    """What a simulated search runs on."""

    workers: int
    cores: int
    """Workers that share a node."""
    bytes_a_second: float
    """Of the one network card through which everything goes."""


@dataclass(frozen=True)
class Simulated:
    """A search that was simulated: seconds from the first job's start to the last one's end."""

    seconds: float
    moved: int
    """Bytes through the network card."""
    busy: float
    """Part of the workers' time in which they compute."""


def simulate(jobs: Sequence[Timed], candidates: int, steps: int, samples: int, on: Cluster) -> Simulated:
    """Hand every candidate of every neighbourhood to the next free worker, the longest jobs first."""
    each = [job for job in sorted(jobs, key=lambda job: -(job.fixed + steps * job.step)) for _ in range(candidates)]
    free = [(0.0, worker) for worker in range(on.workers)]
    arrived: dict[tuple[int, str], float] = {}
    card = spent = end = 0.0
    moved = 0
    for job in each:
        now, worker = heapq.heappop(free)
        node, there = worker // on.cores, now
        for name, size in job.values.items():
            if (node, name) not in arrived:
                card = max(card, now) + samples * size / on.bytes_a_second
                arrived[node, name] = card
                moved += samples * size
            there = max(there, arrived[node, name])
        seconds = job.fixed + steps * job.step
        spent += seconds
        end = max(end, there + seconds)
        heapq.heappush(free, (there + seconds, worker))
    return Simulated(end, moved, spent / (on.workers * end))


class _Measured(SerialExecutor):
    """Runs jobs here, and notes their processor time and the files that they read."""

    seen: dict[str, tuple[float, dict[str, int]]]

    def __init__(self) -> None:
        self.seen = {}

    def run(self, jobs: Iterable[Job], on_step: OnStepNamed) -> Iterator[Outcome]:
        for job in jobs:
            assert isinstance(job, MovableJob)
            values = {str(path): path.stat().st_size for path in job.reads if path.suffix == ".npy"}
            began = time.process_time()
            (outcome,) = super().run([job], on_step)
            self.seen[job.name] = time.process_time() - began, values
            yield outcome


class _Stages:
    """Processor time of each stage of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage, self._began = "", time.process_time()

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        """The stage before has ended."""
        now = time.process_time()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._began
        self._stage, self._began = name, now

    def advance(self, amount: int = 1) -> None: ...

    def step(self, neighbourhood: str, step: int, steps: int, nmse: float) -> None: ...

    def finished(self, neighbourhood: str, status: str, nmse: float | None, reason: str | None) -> None: ...

    def note(self, message: str) -> None: ...


def measure(samples: int, steps: tuple[int, int], folder: Path) -> Search:
    """Search one candidate for each neighbourhood of a ResNet-50, with each number of steps."""
    model = folder / "resnet50.onnx"
    _export(model)
    executors = [_Measured(), _Measured()]
    for number, (executor, count) in enumerate(zip(executors, steps, strict=True)):
        register_executor("measured", "here, and measures")(lambda _, executor=executor: executor)
        stages = _Stages()
        ndonnx.search(
            model,
            data="gaussian",
            pareto=1,
            run_dir=folder / f"run{number}",
            progress=stages,
            recipe=_recipe(samples, count),
        )
        stages.stage("")
    jobs = []
    for name, (short, values) in executors[0].seen.items():
        step = (executors[1].seen[name][0] - short) / (steps[1] - steps[0])
        per_sample = {value: size // samples for value, size in values.items()}
        jobs.append(Timed(name, short - steps[0] * step, step, per_sample))
    scored = stages.seconds["measure"] / len(jobs) / samples
    return Search(jobs, stages.seconds["capture"] / samples, scored)


def _recipe(samples: int, steps: int) -> ndonnx.Recipe:
    table = {"candidates": ["width 0.5"], "steps": steps, "samples": samples}
    settings = {"executor": "measured", "workers": 1, "device": "cpu", "simplify": False, "samples": samples}
    return ndonnx.load_recipe(None, **settings, search=table)


class _Bottleneck(nn.Module):
    def __init__(self, given: int, inner: int, stride: int) -> None:
        super().__init__()
        out = 4 * inner
        self.inside = nn.Sequential(
            nn.Conv2d(given, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, stride, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        skip = nn.Sequential(nn.Conv2d(given, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.skip: nn.Module = skip if given != out or stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.inside(x) + self.skip(x))


def _export(path: Path) -> None:
    """Write a ResNet-50 with random weights."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    given = 64
    for stage, count in enumerate((3, 4, 6, 3)):
        for number in range(count):
            inner = 64 * 2**stage
            layers.append(_Bottleneck(given, inner, 2 if number == 0 and stage else 1))
            given = 4 * inner
    whole = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(given, 1000)).eval()
    torch.onnx.export(
        whole,
        (torch.zeros(1, 3, 224, 224),),
        path,
        opset_version=17,
        input_names=["image"],
        output_names=["scores"],
        dynamic_axes={"image": {0: "N"}, "scores": {0: "N"}},
        dynamo=False,
    )


def overhead(options: argparse.Namespace, flags: Sequence[str]) -> None:
    """Compress by processes and on a cluster, in turn, and print what both took."""
    from ray.cluster_utils import Cluster as Nodes  # noqa: PLC0415 - an extra

    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    others = [nodes.add_node(num_cpus=1, object_store_memory=_STORE) for _ in range(options.nodes)]
    seconds: dict[str, list[float]] = {"process": [], "ray": []}
    students = set()
    command = [str(Path(sys.executable).with_name("ndonnx")), "compress", options.model, "--data", options.data, "-q"]
    command.append("--no-simplify")  # what is timed may be decided otherwise in one run: the bytes are compared
    command += ["--ray-address", nodes.address, "--workers", str(options.nodes), *flags]
    with tempfile.TemporaryDirectory() as folder:
        for number, executor in ((n, executor) for n in range(options.repeat) for executor in seconds):
            if options.kill is not None and executor == "ray":
                threading.Timer(options.kill, nodes.remove_node, (others.pop(), False)).start()
            output = Path(folder) / f"{executor}{number}.onnx"
            began = time.perf_counter()
            told = ["-o", str(output), "--executor", executor]
            subprocess.run([*command, *told], check=True, stdout=subprocess.DEVNULL)
            seconds[executor].append(time.perf_counter() - began)
            students.add(output.read_bytes())
            while len(others) < options.nodes:
                others.append(nodes.add_node(num_cpus=1, object_store_memory=_STORE))
    nodes.shutdown()
    rows = [[name, *(f"{t:.1f}" for t in times), f"{statistics.median(times):.1f}"] for name, times in seconds.items()]
    print_table("seconds", ["executor", *map(str, range(1, options.repeat + 1)), "median"], rows)
    ratio = statistics.median(seconds["ray"]) / statistics.median(seconds["process"])
    print(f"Ray takes {ratio:.3f} of the time; {'the same bytes' if len(students) == 1 else 'NOT THE SAME BYTES'}")


def _table(found: Search, options: argparse.Namespace) -> None:
    capture = found.capture * options.samples / options.cores
    scoring = found.measure * options.held_out * len(found.jobs) * options.candidates / options.cores
    rows = []
    for workers in options.workers:
        on = Cluster(workers, options.cores, options.gigabits * 1e9 / 8)
        simulated = simulate(found.jobs, options.candidates, options.steps, options.samples, on)
        total = capture + simulated.seconds + scoring
        row = [workers, f"{simulated.seconds:,.0f}", f"{simulated.busy:.0%}", f"{simulated.moved / 1e9:,.1f}"]
        rows.append([*map(str, row), f"{capture:,.0f}", f"{scoring:,.0f}", f"{total:,.0f}"])
    title = f"{len(found.jobs)} neighbourhoods by {options.candidates} candidates, seconds"
    print_table(title, ["workers", "jobs", "busy", "GB moved", "capture", "measure", "in all"], rows)


def _numbers(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    beside = commands.add_parser("overhead", help="Ray beside worker processes")
    beside.add_argument("model")
    beside.add_argument("--data", required=True)
    beside.add_argument("--nodes", type=positive, default=2)
    beside.add_argument("--repeat", type=positive, default=3)
    beside.add_argument("--kill", type=float, metavar="SECONDS")
    jobs = commands.add_parser("jobs", help="time the jobs of a ResNet-50")
    jobs.add_argument("file", type=Path)
    jobs.add_argument("--samples", type=positive, default=32)
    jobs.add_argument("--steps", type=_numbers, default=[2, 8])
    many = commands.add_parser("simulate", help="the same search on many workers")
    many.add_argument("file", type=Path)
    many.add_argument("--workers", type=_numbers, default=[1, 8, 64, 512])
    for name, number in (("candidates", 14), ("steps", 200), ("samples", 2000), ("held-out", 2000), ("cores", 8)):
        many.add_argument(f"--{name}", type=positive, default=number)
    many.add_argument("--gigabits", type=float, default=10.0)
    return parser


def main(arguments: Sequence[str] | None) -> None:
    """Run one of the three."""
    options, flags = _parser().parse_known_args(arguments)
    if options.command == "overhead":
        overhead(options, flags)
    elif options.command == "jobs":
        with tempfile.TemporaryDirectory() as folder:
            found = measure(options.samples, tuple(options.steps), Path(folder))
        options.file.write_text(json.dumps(asdict(found), indent=1), encoding="utf-8")
    else:
        told: dict[str, Any] = json.loads(options.file.read_text(encoding="utf-8"))
        jobs = [Timed(**job) for job in told.pop("jobs")]
        _table(Search(jobs, **told), options)


if __name__ == "__main__":
    run(main)
