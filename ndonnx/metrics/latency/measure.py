"""A comparison from beginning to end: provider after provider, process after process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ndonnx.errors import UsageError
from ndonnx.graph.interface import Interface
from ndonnx.metrics.latency.feeds import Feeds, batch_of
from ndonnx.metrics.latency.fresh import Block, Setting, load_time, peak_memory, time_block
from ndonnx.metrics.latency.statistics import Latency, Ratio, latency, ratio_over_blocks
from ndonnx.runtime.progress import Progress, Silent

MODEL, AGAINST = "model", "against"
"""Names of the model and of the one that it is compared with."""
PROCESSES = 8
"""In each of which everything is loaded and timed anew: one observation each."""
_STEADY = 2.0
"""p95 over p50, beyond which something else than the models decides how long a run takes."""


@dataclass(frozen=True)
class Plan:
    """What is to be measured."""

    batch_sizes: tuple[int, ...]
    providers: tuple[str, ...]
    threads: int
    processes: int = PROCESSES
    rounds: int | None = None
    """Timed runs of each model in each process; None: what a second has room for."""
    memory: bool = True
    interface: Interface = field(default_factory=Interface)
    """How the models are fed."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            UsageError: a number is too small, or a list is empty.
        """
        for what, found, least in (
            ("batch sizes", min(self.batch_sizes, default=0), 1),
            ("threads", self.threads, 1),
            ("rounds", 1 if self.rounds is None else self.rounds, 1),
            ("processes, for an interval", self.processes, 2),
        ):
            if found < least:
                raise UsageError(f"benchmark: expected {what} of at least {least}, found {found}")
        if not self.providers:
            raise UsageError("benchmark: expected a provider, as cpu; found none")


@dataclass(frozen=True)
class Start:
    """What it takes to have a model ready, in processes of its own."""

    load_ms: float
    """From the file to a session: the median over processes, the file in the system's cache."""
    peak_memory_bytes: int | None
    """Most that a process grew by loading and running it; None where the system does not tell or nobody asked."""


@dataclass(frozen=True)
class Timing:
    """Times of a model at one batch size, and of the one that it was compared with in alternating runs."""

    batch_size: int
    """Samples in every run."""
    model: Latency
    against: Latency | None
    ratio: Ratio | None
    """Time of the model over that of the other one; each process is one observation behind the interval."""

    def to_json(self) -> dict[str, Any]:
        """As a mapping for JSON: how many runs instead of each one's time."""
        document = asdict(self)
        for entry in (document[MODEL], document[AGAINST]):
            if entry is not None:
                entry["runs"] = len(entry.pop("times_ms"))
        return document

    @property
    def is_steady(self) -> bool:
        """Whether runs of one model took about as long as each other, as they do on cores that nobody else uses."""
        found = [self.model, *([] if self.against is None else [self.against])]
        return all(entry.p95_ms <= _STEADY * entry.p50_ms for entry in found)


@dataclass(frozen=True)
class ProviderSpeed:
    """All that was measured on one of onnxruntime's execution providers."""

    provider: str
    """By the beginning of its name: `cpu`, `cuda`."""
    memory_batch_size: int
    """Samples in the runs whose peak memory was measured: the largest batch."""
    model: Start
    against: Start | None
    batches: list[Timing]

    def to_json(self) -> dict[str, Any]:
        """As a mapping for JSON."""
        return asdict(self) | {"batches": [timing.to_json() for timing in self.batches]}


def measure(
    models: Mapping[str, Path], samples: Feeds, plan: Plan, progress: Progress | None = None
) -> list[ProviderSpeed]:
    """Load and time the models in processes of their own, on one provider after the other.

    Args:
        models: files, by the names `model` and perhaps `against`.
        samples: arrays (n, ...) by input name; a larger batch than n begins anew.
        plan: sizes, providers, threads and how often.
        progress: told how many processes are over.

    Raises:
        ModelError: a model cannot be opened or run.
        DataError: an input is missing.
        UsageError: a provider is not there.
    """
    progress = Silent() if progress is None else progress
    return [_on_provider(provider, models, samples, plan, progress) for provider in plan.providers]


@dataclass(frozen=True)
class Beside:
    """Times of one of several models that were timed in turn, at one batch size on one provider."""

    start: Start
    latency: Latency
    ratio: Ratio | None
    """Time of this model over that of the reference; None of the reference itself."""

    def to_json(self) -> dict[str, Any]:
        """As a mapping for JSON: how many runs instead of each one's time."""
        document = asdict(self)
        document["latency"]["runs"] = len(document["latency"].pop("times_ms"))
        return document


def measure_beside(
    models: Mapping[str, Path], reference: str, samples: Feeds, plan: Plan, progress: Progress | None = None
) -> dict[str, Beside]:
    """Load and time any number of models in turn, in processes of their own, and compare each with one of them.

    Args:
        models: files by name.
        reference: name of the one that the others are compared with.
        samples: arrays (n, ...) by input name.
        plan: threads and how often; of its batch sizes and providers the first ones.
        progress: told how many processes are over.

    Raises:
        ModelError: a model cannot be opened or run.
        DataError: an input is missing.
        UsageError: the provider is not there.
    """
    progress = Silent() if progress is None else progress
    size, setting = plan.batch_sizes[0], Setting(plan.providers[0], plan.threads, plan.interface)
    plan = replace(plan, batch_sizes=(size,))
    total = plan.processes + (len(models) if plan.memory else 0)
    progress.stage(f"benchmark on {setting.provider}", total=total, unit="processes")
    blocks = _blocks(models, samples, plan, setting, progress)
    found = {}
    for name in models:
        times = [time for block in blocks for time in block.times_ms[size][name]]
        pairs = [(block.times_ms[size][name], block.times_ms[size][reference]) for block in blocks]
        over = None if name == reference else ratio_over_blocks(pairs)
        found[name] = Beside(
            _start(name, models[name], blocks, samples, plan, setting, progress), latency(times, size), over
        )
    return found


def _start(
    name: str, path: Path, blocks: Sequence[Block], samples: Feeds, plan: Plan, setting: Setting, progress: Progress
) -> Start:
    memory = None
    if plan.memory:
        memory = peak_memory(path, plan.interface.feeds(batch_of(samples, max(plan.batch_sizes))), setting)
        progress.advance()
    return Start(load_time(blocks, name), memory)


def _on_provider(
    provider: str, models: Mapping[str, Path], samples: Feeds, plan: Plan, progress: Progress
) -> ProviderSpeed:
    setting = Setting(provider, plan.threads, plan.interface)
    total = plan.processes + (len(models) if plan.memory else 0)
    progress.stage(f"benchmark on {provider}", total=total, unit="processes")
    blocks = _blocks(models, samples, plan, setting, progress)
    starts = {name: _start(name, path, blocks, samples, plan, setting, progress) for name, path in models.items()}
    timings = [_timing(blocks, size) for size in plan.batch_sizes]
    return ProviderSpeed(provider, max(plan.batch_sizes), starts[MODEL], starts.get(AGAINST), timings)


def _blocks(
    models: Mapping[str, Path], samples: Feeds, plan: Plan, setting: Setting, progress: Progress
) -> list[Block]:
    blocks: list[Block] = []
    rounds: Mapping[int, int] | int | None = plan.rounds
    for place in range(plan.processes):
        # By turns each model is loaded first, and finds the memory and the caches as that leaves them.
        order = list(models.items())
        if place % 2:
            order.reverse()
        block = time_block(dict(order), samples, plan.batch_sizes, setting, rounds)
        rounds = {size: len(next(iter(times.values()))) for size, times in block.times_ms.items()}
        blocks.append(block)
        progress.advance()
    return blocks


def _timing(blocks: Sequence[Block], size: int) -> Timing:
    pairs = [block.times_ms[size] for block in blocks]
    told = {name: latency([time for block in pairs for time in block[name]], size) for name in pairs[0]}
    if AGAINST not in told:
        return Timing(size, told[MODEL], None, None)
    over = ratio_over_blocks([(block[MODEL], block[AGAINST]) for block in pairs])
    return Timing(size, told[MODEL], told[AGAINST], over)
