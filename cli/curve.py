"""What a search has found, as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import ndonnx
from ndonnx.runtime.units import count_text, part_text, seconds_text

from .tables import milliseconds_text, print_text, print_unforeseen, table_of


def print_search(report: ndonnx.SearchReport, *, dry_run: bool = False) -> None:
    """The students, and what became of the candidates."""
    print_text(table_of(("candidate", ">neighbourhoods", "status", "reason"), _candidates(report)))
    if dry_run:
        print_text(f"nothing was trained\nrun directory {report.run_dir}")
        return
    print_unforeseen({f"{o.neighbourhood} {o.candidate}": o.traceback for o in report.options if o.traceback})
    columns = ("student", "", ">parameters", ">share", ">MACs", ">share", ">latency", f">{report.quality} lost", "file")
    print_text(table_of(columns, _students(report)))
    print_text(
        f"measured on {report.samples} samples that no training saw\nrun directory {report.run_dir}\n"
        f"took {seconds_text(report.seconds['total'])}"
    )


def _candidates(report: ndonnx.SearchReport) -> Iterator[tuple[str, ...]]:
    counted = Counter((option.candidate, option.status, option.reason or "") for option in report.options)
    order = dict.fromkeys(option.candidate for option in report.options)
    for candidate in order:
        for (name, status, reason), count in counted.items():
            if name == candidate:
                yield name, str(count), status, reason


def _students(report: ndonnx.SearchReport) -> Iterator[tuple[str, ...]]:
    for student in sorted(report.students, key=lambda student: (student.source, student.shares.get(report.cost, 1.0))):
        lost = student.measured_drop
        share = {cost: part_text(part) for cost, part in student.shares.items()}
        yield (
            student.name,
            student.source,
            count_text(student.params),
            share.get("params", ""),
            "" if student.macs is None else count_text(student.macs),
            share.get("macs", ""),
            milliseconds_text(student.latency) if student.latency is not None else "",
            "" if lost is None else f"{lost:.4g}" if report.quality == "nmse" else f"{lost:.2%}",
            student.path or "",
        )
