"""Thousands of hostile inputs, each met by a command in a process of its own; what did not end in a clean answer."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pkgutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.cases import Case, make
from benchmarks.faults.sandbox import Ended, Sandbox

_HEAVY = ("torch._dynamo", "torch.fx.experimental.symbolic_shapes", "torch.export", "onnx2torch", "pyarrow.parquet")
_HEAVY += ("rich.progress", "rich.table", "scipy.optimize", "scipy.linalg", "unittest.mock", "onnxruntime.quantization")
"""What is imported late, and would be imported anew by every case."""
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Outcome:
    """What became of a case."""

    number: int
    about: str
    command: str
    done: str
    code: int
    seconds: float
    memory: int
    fault: str | None


@dataclass
class Tally:
    """What became of all of them."""

    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def findings(self) -> list[Outcome]:
        """Those that did not end in a clean answer."""
        return [outcome for outcome in self.outcomes if outcome.fault is not None]

    def rows(self) -> Iterator[tuple[str, ...]]:
        """A row for each kind of input and command: how many, how they ended, the slowest, the largest."""
        groups = Counter((outcome.about, outcome.command) for outcome in self.outcomes)
        for about, command in sorted(groups):
            own = [each for each in self.outcomes if (each.about, each.command) == (about, command)]
            codes = Counter(each.code for each in own if each.fault is None)
            slowest, largest = max(each.seconds for each in own), max(each.memory for each in own)
            yield (
                about, command, str(len(own)), str(codes[0]), str(codes[2]), str(codes[3]),
                str(sum(each.fault is not None for each in own)), f"{slowest:.0f}", f"{largest / 1e9:.1f}",
            )  # fmt: skip


COLUMNS = ("input", "command", "cases", "exit 0", "exit 2", "exit 3", "findings", "slowest, s", "largest, GB")


def import_everything() -> None:
    """Bring in what commands need, so that a forked process starts at once; no thread may be started by it."""
    for name in _THREADS:
        os.environ[name] = "1"
    import ndonnx  # noqa: PLC0415 - after the number of threads is set

    names = [entry.name for entry in pkgutil.walk_packages(ndonnx.__path__, "ndonnx.")]
    for name in (*_HEAVY, *names, "ndonnx_cli.main", "ndonnx_cli.tables", "ndonnx_cli.progress"):
        try:
            importlib.import_module(name)
        except ImportError:  # an extra that is not installed
            continue


def meet(seed: int, number: int, sandbox: Sandbox) -> tuple[Case, Ended]:
    """Make a case and run its command."""
    from ndonnx_cli.main import main  # noqa: PLC0415, TID251 - after `import_everything`

    with sandbox.fresh() as folder:
        case = make(seed, number, folder, sandbox.bait)
        return case, sandbox.run(lambda: main(case.arguments))


def fuzz(seed: int, numbers: range, jobs: int, tell: Callable[[Outcome], None]) -> Tally:
    """Run the cases with these numbers, some at a time.

    Args:
        seed: of all of them.
        numbers: of the cases.
        jobs: processes side by side, each with every so-manyth case.
        tell: given each outcome as it comes.

    Returns:
        What became of them; of those that were done where Ctrl-C ended it.
    """
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    parts = [numbers[start::jobs] for start in range(jobs)]
    workers = [context.Process(target=_work, args=(seed, part, queue.put)) for part in parts]
    tally = Tally()
    for worker in workers:
        worker.start()
    try:
        for _ in numbers:
            outcome = queue.get()
            tally.outcomes.append(outcome)
            tell(outcome)
    except KeyboardInterrupt:  # what was done so far counts
        for worker in workers:
            worker.terminate()
    for worker in workers:
        worker.join()
    tally.outcomes.sort(key=lambda outcome: outcome.number)
    return tally


def _work(seed: int, numbers: range, put: Callable[[Outcome], None]) -> None:
    with tempfile.TemporaryDirectory(prefix="ndonnx-faults-") as root:
        sandbox = Sandbox(Path(root) / "case")
        for number in numbers:
            put(_outcome(seed, number, sandbox))


def _outcome(seed: int, number: int, sandbox: Sandbox) -> Outcome:
    began = time.perf_counter()
    try:
        case, ended = meet(seed, number, sandbox)
    except Exception as error:  # a fault of the benchmark's own, told as a finding
        return Outcome(number, "benchmark", "", "", 1, time.perf_counter() - began, 0, f"not made: {error!r}")
    fault = ended.fault()
    where = [line.strip() for line in ended.err.splitlines() if 'File "' in line and "ndonnx" in line]
    told = fault if fault is None or not where else f"{fault} | {where[-1]}"
    return Outcome(number, case.about, case.arguments[0], case.done, ended.code, ended.seconds, ended.memory, told)
