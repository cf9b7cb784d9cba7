"""The table of `ndonnx benchmark`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import ndonnx
from ndonnx.runtime.units import bytes_text, count_text

from .tables import measured, milliseconds_text, nmse_text, print_text, table_of

Row = tuple[str, str, str, str]
"""What it is, of the other model, of this one, and this one's part of it."""


def print_speed(speed: ndonnx.Speed) -> None:
    """Everything that was measured, then the ratios in words."""
    rows = [*_sizes(speed), *_answers(speed), *(row for entry in speed.providers for row in _times(speed, entry))]
    if speed.against is None:
        print_text(table_of(("", f">{speed.model.path}"), [(name, value) for name, _, value, _ in rows]))
    else:
        print_text(table_of(("", f">{speed.against.path}", f">{speed.model.path}", ">share"), rows))
    for line in (*speed.notes, *_executed(speed), *_verdicts(speed)):
        print_text(line)


def _executed(speed: ndonnx.Speed) -> Iterator[str]:
    """What of a quantised model is computed with integers."""
    if (found := speed.executed) is not None:
        yield (
            f"onnxruntime computes {found.quantised_nodes} layers with integers and {found.float_nodes} with floats, "
            f"and rounds or scales {found.qdq_left} times in between"
        )


def _sizes(speed: ndonnx.Speed) -> Iterator[Row]:
    texts: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("parameters", "parameters", count_text),
        ("MACs per sample", "macs", count_text),
        ("file size", "bytes", bytes_text),
        ("compressed size", "compressed_bytes", bytes_text),
    )
    for name, quantity, text in texts:
        values = (getattr(side, quantity, None) for side in (speed.against, speed.model))
        other, mine = ("" if value is None else text(value) for value in values)
        if other or mine:
            yield name, other, mine, _share_text(speed.share(quantity))


def _answers(speed: ndonnx.Speed) -> Iterator[Row]:
    if speed.fidelity is None:
        return
    others = dict(measured(speed.fidelity["against"])) if "against" in speed.fidelity else {}
    found = speed.fidelity["model"]
    for name, value in measured(found):
        yield name, others.get(name, ""), value, ""
    if found.worst_sample is not None and found.worst_nmse is not None:
        yield "worst sample", "", f"number {found.worst_sample}, NMSE {nmse_text(found.worst_nmse)}", ""


def _times(speed: ndonnx.Speed, entry: ndonnx.ProviderSpeed) -> Iterator[Row]:
    where, mine, other = entry.provider, entry.model, entry.against
    yield (
        f"{where}: loading",
        "" if other is None else milliseconds_text(other.load_ms),
        milliseconds_text(mine.load_ms),
        "" if other is None else _share_text(mine.load_ms / other.load_ms),
    )
    if mine.peak_memory_bytes is not None:
        beside = None if other is None else other.peak_memory_bytes
        yield (
            f"{where}: peak memory, batch {entry.memory_batch_size}",
            "" if beside is None else bytes_text(beside),
            bytes_text(mine.peak_memory_bytes),
            "" if beside is None else _share_text(mine.peak_memory_bytes / beside),
        )
    for timing in entry.batches:
        yield (
            f"{where}: p50 / p95 / p99, batch {timing.batch_size}",
            "" if timing.against is None else _percentiles(timing.against),
            _percentiles(timing.model),
            "" if timing.ratio is None else _ratio_text(timing.ratio),
        )
        yield (
            f"{where}: samples per second, batch {timing.batch_size}",
            "" if timing.against is None else count_text(timing.against.throughput),
            count_text(timing.model.throughput),
            "",
        )


def _verdicts(speed: ndonnx.Speed) -> Iterator[str]:
    share = speed.share("macs")
    work = "" if share is None else f", {share:.2f} of the MACs"
    for entry in speed.providers:
        for timing in entry.batches:
            if timing.ratio is not None:
                yield f"{entry.provider}, batch {timing.batch_size}: {_ratio_text(timing.ratio)} of the time{work}"
    confidence = next((t.ratio.confidence for e in speed.providers for t in e.batches if t.ratio is not None), None)
    threads = f"{speed.threads} thread{'s' if speed.threads > 1 else ''}"
    intervals = "" if confidence is None else f"; in brackets the ratio's {confidence:.0%} interval over them"
    yield f"timed with {threads} in {speed.processes} processes, one after the other{intervals}"


def _ratio_text(ratio: ndonnx.Ratio) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _percentiles(found: ndonnx.Latency) -> str:
    return f"{found.p50_ms:.3g} / {found.p95_ms:.3g} / {milliseconds_text(found.p99_ms)}"


def _share_text(share: float | None) -> str:
    return "" if share is None else f"{share:.2f}"
