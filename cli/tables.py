"""Results on stdout: tables for people, one JSON document for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

import ndonnx
from ndonnx import OutputFidelity, QuantisationReport, StageReport
from ndonnx.runtime.units import bytes_text, count_text, part_text, seconds_text

_UNBOUNDED = 10_000
"""Columns of a console that is no terminal: rows are not folded for a program that reads them."""


class _PatientConsole(Console):
    """Goes on in silence when its reader has gone: a run must not die because `head` had enough."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)


_LONGEST_NAME = 36
_MOST_WIDTHS = 6
"""Different widths that are told of one neighbourhood."""


def make_console(*, stderr: bool = False) -> Console:
    """A console that shows names as they are: no markup, no emoji, no colour by guess."""
    console = _PatientConsole(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = _UNBOUNDED
    return console


def plain(text: str) -> str:
    """The text on one line and without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def nmse_text(value: float) -> str:
    """Three digits that count."""
    return f"{value:.3g}"


def metric_text(value: float) -> str:
    """Four digits that count."""
    return f"{value:.4g}"


def milliseconds_text(value: float) -> str:
    """`0.731 ms`."""
    return f"{value:.3g} ms"


def print_json(document: Mapping[str, Any]) -> None:
    """Exactly one JSON document; ASCII, so that no encoding can spoil it."""
    print_text(json.dumps(document, indent=2, allow_nan=False))


def print_report(report: ndonnx.CompressReport) -> None:
    """What became of the model, of each neighbourhood, and where everything lies."""
    print_text(_comparison(report))
    print_text(_neighbourhoods(report))
    if len(report.stages) > 1:
        print_text(_stages(report.stages))
    if report.quantised is not None:
        print_text(_quantised(report.quantised))
    elif report.unchanged:
        print_text("every channel kept and no steps: the student is the teacher, as asked")
    elif all(neighbourhood.status == "kept" for neighbourhood in report.neighbourhoods):
        why = (
            "nothing was distilled" if report.teacher.parameters else "nothing to distil, as the model holds no weights"
        )
        print_text(f"{why}: the student is the teacher; the reasons stand above")
    print_unforeseen(report.unforeseen)
    if report.student.compressed_bytes is not None:
        part = report.student.zeros / max(1, report.student.parameters)
        print_text(
            f"{part_text(part)} of the weights are zeros: onnxruntime gains no speed from them, "
            "the compressed file is what they save"
        )
    if (found := report.target) is not None:
        parts = ", ".join(f"{cost} {part_text(part)}" for cost, part in found.reached.items())
        kept = found.missed is None and found.max_drop is not None
        most = found.max_drop if kept else found.bound  # of all tests together, or of this one
        drop, bound = ("an unknown part" if lost is None else f"{lost:.2%}" for lost in (found.drop, most))
        print_text(
            f"of the teacher's: {parts}; on {found.samples} samples that nothing else saw, {found.quality} lost "
            f"{drop}, with 95% confidence at most {bound}"
        )
    spent = f"{seconds_text(report.seconds.total)}, peak memory {bytes_text(report.peak_rss_bytes)}"
    print_text(f"student written to {report.student.path}\nrun directory {report.run_dir}\ntook {spent}")


def print_unforeseen(tracebacks: Mapping[str, str]) -> None:
    """One line that something went wrong which nobody foresaw, and where to look; nothing where all is well."""
    if tracebacks:
        folder = os.path.dirname(next(iter(tracebacks.values())))
        print_text(
            f"something unexpected happened in {', '.join(tracebacks)}, which stayed as it was: a fault of ndonnx or "
            f"of this machine, worth reporting; {folder} tells more"
        )


def print_demo(report: ndonnx.CompressReport, speed: ndonnx.Speed, output: str | None) -> None:
    """Teacher against student, with the measured latency."""
    table = _comparison(report)
    timing = speed.providers[0].batches[0]
    if timing.against is not None and timing.ratio is not None:
        table.add_row(
            f"onnxruntime p50, batch {timing.batch_size}",
            milliseconds_text(timing.against.p50_ms),
            milliseconds_text(timing.model.p50_ms),
            f"{timing.ratio.median:.2f} ({timing.ratio.low:.2f} to {timing.ratio.high:.2f})",
        )
    print_text(table)
    print_text(_neighbourhoods(report))
    print_text(f"student written to {output}" if output else "keep the student with: ndonnx demo -o student.onnx")
    print_text("compress your own: ndonnx compress MODEL --data SRC")


def print_inspection(inspection: ndonnx.Inspection) -> None:
    """The model in two lines, then its neighbourhoods in order."""
    coverage, pieces = inspection.coverage, inspection.neighbourhoods
    open_ = sum(piece.status == "distillable" for piece in pieces)
    print_text(
        f"{inspection.model}: opset {inspection.opset}, {count_text(inspection.parameters)} parameters, "
        f"{_macs(inspection)}\n"
        f"distillable: {open_} of {len(pieces)} neighbourhoods, with {part_text(coverage.parameters)} of the "
        f"parameters"
        + ("" if coverage.macs is None else f" and {part_text(coverage.macs)} of the MACs")
        + ("" if coverage.removable is None else f"; {part_text(coverage.removable)} can go ({inspection.smallest})")
    )
    columns = (
        "name", "input → output", "context", ">nodes", ">parameters", ">share", ">can go", ">MACs", ">share", "widths",
        "status", ">parity", "reason",
    )  # fmt: skip
    rows = (
        (
            piece.name,
            f"{_value(piece.input)} → {_value(piece.output)}",
            _context(piece.context),
            str(piece.nodes),
            f"{piece.parameters:,}",
            _share(piece.parameters, inspection.parameters),
            _share(piece.removable, inspection.parameters),
            "" if piece.macs is None else f"{piece.macs:,}",
            _share(piece.macs, inspection.macs),
            _widths(piece.widths),
            piece.status,
            "" if piece.parity is None else f"{piece.parity:.1e}",
            piece.reason or _together(piece.student_of) or piece.note or "",
        )
        for piece in pieces
    )
    print_text(table_of(columns, rows))
    if inspection.data is not None:
        _print_data(inspection.data)


def _print_data(found: ndonnx.DataLook) -> None:
    """What the first samples hold, and what the model's answers are taken for."""
    length = "" if found.length is None else f" of {count_text(found.length)}"
    pace = "" if found.samples_a_second is None else f"; {found.samples_a_second:,.0f} are answered in a second here"
    print_text(f"data: the first {count_text(found.samples)}{length} samples{pace}")
    columns = ("", "name", "type", "shape of one", ">from", ">to", "taken for")
    sides = (("input", found.inputs), ("output", found.outputs))
    rows = (
        (
            side,
            value.name,
            value.dtype,
            " x ".join(map(str, value.shape)),
            _number(value.low),
            _number(value.high),
            value.looks,
        )
        for side, values in sides
        for value in values
    )
    print_text(table_of(columns, rows))
    if (took := found.time) is not None:
        whole = f", then the whole for {took.finetune_steps:,}" if took.finetune_steps else ""
        parts = (("reading", took.reading), ("neighbourhoods", took.training), ("fine-tuning", took.finetuning))
        told = ", ".join(f"{what} {seconds_text(seconds)}" for what, seconds in parts)
        print_text(
            f"compress would train {count_text(took.neighbourhoods)} neighbourhoods for {took.steps:,} steps each"
            f"{whole}: about {seconds_text(took.seconds)} here ({told})"
        )


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


def print_evaluation(model: str, found: ndonnx.Evaluation) -> None:
    """Whatever could be measured."""
    rows = [("samples", count_text(found.samples)), *measured(found)]
    print_text(table_of(("", f">{model}"), rows))


def _comparison(report: ndonnx.CompressReport) -> Table:
    teacher, student = report.teacher, report.student
    table = table_of(("", ">teacher", ">student", ">student / teacher"), ())
    for name, before, after, text in (
        ("parameters", teacher.parameters, student.parameters, count_text),
        (f"MACs per sample{_of_shapes(report.shapes)}", teacher.macs, student.macs, count_text),
        ("file size", teacher.bytes, student.bytes, bytes_text),
        ("file size, compressed", teacher.compressed_bytes, student.compressed_bytes, bytes_text),
    ):
        if before is not None and after is not None:
            table.add_row(name, text(before), text(after), f"{after / before:.2f}" if before else "")
    before_metrics = dict(measured(report.metrics["teacher"]))
    for name, value in measured(report.metrics["student"]):
        table.add_row(name, before_metrics.get(name, ""), value, "")
    return table


def measured(found: ndonnx.Evaluation) -> list[tuple[str, str]]:
    """Names and values of whatever could be measured, but the worst sample."""
    values = (
        (f"accuracy on {count_text(found.samples)} sample{'s' * (found.samples != 1)}", found.accuracy, part_text),
        ("agreement with the teacher", found.agreement, part_text),
        ("NMSE of the outputs", found.nmse, nmse_text),
        ("largest error of an output", found.max_error, nmse_text),
        ("KL divergence, nats", found.kl, nmse_text),
        (_OWN_METRIC, found.metric, metric_text),
    )
    told = [(name, text(value)) for name, value, text in values if value is not None]
    # What is told above is not told again of the output that it is of.
    several = found.agreement is None
    return told + [row for name, each in found.outputs.items() if several for row in _of_output(name, each)]


_OWN_METRIC = "metric of --metric"


def _of_output(name: str, found: OutputFidelity) -> Iterator[tuple[str, str]]:
    """The measures of an output's own task, in words."""
    if found.agreement is not None and found.kl is not None:
        yield f"'{name}': same top class", part_text(found.agreement)
        yield f"'{name}': KL divergence, nats", nmse_text(found.kl)
    elif found.distances:
        yield from ((f"'{name}': {measure}", nmse_text(value)) for measure, value in found.distances.items())
    elif found.cosine is not None:
        yield f"'{name}': cosine with the teacher's", f"{found.cosine:.4f}"
    elif found.nmse is not None:
        yield f"'{name}': NMSE", nmse_text(found.nmse)


def _stages(stages: Sequence[StageReport]) -> Table:
    """The whole student after each stage, on the rows that chose."""
    rows = []
    for stage in stages:
        told = [row for output, each in stage.outputs.items() for row in _of_output(output, each)]
        told += [] if stage.metric is None else [(_OWN_METRIC, metric_text(stage.metric))]
        words = "; ".join(f"{name}: {value}" for name, value in told)
        rows.append((stage.stage, words, "written" if stage.written else ""))
    return table_of(("student", "on the samples that choose", ""), rows)


def _quantised(found: QuantisationReport) -> str:
    """How the student came to be in 8 bits, in one line."""
    if found.reason is not None:
        return f"not quantised: {found.reason}"
    assert found.time is not None and found.size is not None
    nodes = f"{found.quantised_nodes} of {(found.quantised_nodes or 0) + (found.float_nodes or 0)} layers"
    return (
        f"{found.bits} bits ({found.scheme}): {nodes} with integers, {part_text(found.time)} of the time and "
        f"{part_text(found.size)} of the bytes of the same student in float, on this machine"
    )


def _neighbourhoods(report: ndonnx.CompressReport) -> Table:
    columns = (
        "neighbourhood", "candidate", ">bits", "status", ">NMSE start → end", ">tolerates", ">steps", ">saved", ">time",
        "reason",
    )  # fmt: skip
    rows = (
        (
            n.name,
            n.candidate or "",
            "" if n.bits is None else str(n.bits),
            n.status,
            "" if n.nmse is None or n.nmse_start is None else f"{nmse_text(n.nmse_start)} → {nmse_text(n.nmse)}",
            "" if n.tolerance is None else nmse_text(n.tolerance),
            str(n.steps) if n.candidate else "",
            str(n.steps_saved) if n.steps_saved else "",
            seconds_text(n.seconds) if n.candidate else "",
            n.reason or n.warning or _together(n.student_of),
        )
        for n in report.neighbourhoods
    )
    return table_of(columns, rows)


def _value(name: str | None) -> str:
    """The name of a value, with its middle left out where it is long: exporters put whole paths into them."""
    if not name:
        return "-"
    return name if len(name) <= _LONGEST_NAME else f"{name[:6]}…{name[7 - _LONGEST_NAME :]}"


def _context(names: Sequence[str]) -> str:
    """The first name, and how many more there are."""
    if not names:
        return ""
    return _value(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _share(part: int | None, whole: int | None) -> str:
    return part_text(part / whole) if part is not None and whole else ""


def _macs(inspection: ndonnx.Inspection) -> str:
    """MACs with the shapes that they are of, or why there is no number."""
    if inspection.macs is None:
        if inspection.open_sizes:
            return f"MACs not told: nothing states {', '.join(inspection.open_sizes)}; state it with --shape"
        return "MACs not told: shapes inside the model do not follow from those of its inputs"
    return f"{count_text(inspection.macs)} MACs a sample{_of_shapes(inspection.shapes)}"


def _of_shapes(shapes: Mapping[str, Sequence[int]] | None) -> str:
    """Shapes of the inputs, in brackets behind what is told of them; nothing where there are none, or many."""
    if not shapes or len(shapes) > _MOST_SHAPES:
        return ""
    told = (f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    return f" ({', '.join(told)})"


_MOST_SHAPES = 3
"""Inputs whose shapes are told in a table; JSON tells all."""


def _widths(widths: Sequence[int]) -> str:
    """Widths in order, with repetitions counted: `24×2, 40`."""
    runs = [(width, len(list(run))) for width, run in groupby(widths)]
    told = [f"{width}×{count}" if count > 1 else str(width) for width, count in runs]
    if len(told) > _MOST_WIDTHS:
        told = [*told[: _MOST_WIDTHS - 1], f"… ({len(widths)})"]
    return ", ".join(told)


def table_of(columns: Iterable[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table; a column whose head begins with `>` stands right, and one without any content is left out."""
    heads, lines = list(columns), [list(row) for row in rows]
    used = [i for i, head in enumerate(heads) if not lines or head == "" or any(line[i] for line in lines)]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i in used:
        right = heads[i].startswith(">")
        table.add_column(plain(heads[i].removeprefix(">")), justify="right" if right else "left", overflow="fold")
    for line in lines:
        table.add_row(*(plain(line[i]) for i in used))
    return table


def print_text(what: Table | str) -> None:
    """Print lines or a table on stdout, without trailing blanks."""
    console = make_console()
    if isinstance(what, Table):
        with console.capture() as drawn:
            console.print(what)
        # A column is padded even where nothing follows it, which helps nobody who reads a file.
        what = "\n".join(line.rstrip() for line in drawn.get().splitlines()) + "\n"
    console.out(what, highlight=False)


def _together(first: str | None) -> str:
    return f"one student with {first}" if first is not None else ""
