"""The whole page: one file that needs no network and runs no script."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ndonnx.report.receipt.document import RunDocument, at, text
from ndonnx.report.receipt.fidelity import lines
from ndonnx.report.receipt.html import Column, Markup, escaped, joined, section, table, tag
from ndonnx.report.receipt.sections import headline, sections, signature
from ndonnx.report.receipt.style import CSS
from ndonnx.report.receipt.words import LEFT_OPEN, bytes_text, count_text, digits_text, seconds_text

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a browser may load for the page: nothing."""


def page(runs: Sequence[RunDocument]) -> str:
    """An HTML document of one run, or of several beside each other.

    Args:
        runs: at least one.
    """
    if len(runs) == 1:
        (run,) = runs
        title = f"Compression report: {run.name}"
        body = joined([tag("h1", title), tag("p", headline(run), cls="dim"), *sections(run, "c")])
    else:
        title = "Compression reports: " + ", ".join(run.name for run in runs)
        body = joined([tag("h1", title), _compared(runs), _differences(runs), *_each(runs)])
    return _document(title, joined([tag("main", body), signature()]))


def _document(title: str, body: Markup) -> str:
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escaped(title)}</title><style>{CSS}</style>"
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def _each(runs: Sequence[RunDocument]) -> Iterator[Markup]:
    for number, run in enumerate(runs):
        whole = joined([tag("p", headline(run), cls="dim"), *sections(run, f"r{number}-")])
        yield tag("details", tag("summary", tag("b", f"Run {number + 1}: {run.name}")), whole)


def _compared(runs: Sequence[RunDocument]) -> Markup:
    """The numbers of all runs, a column each."""
    columns = [Column(""), *(Column(f"{i + 1}: {run.name}", True) for i, run in enumerate(runs))]
    told = [dict(_figures(run)) for run in runs]
    names = dict.fromkeys(name for figures in told for name in figures)
    return section("Side by side", table(columns, [(name, *(each.get(name, "") for each in told)) for name in names]))


def _figures(run: RunDocument) -> Iterator[tuple[str, str]]:
    yield "teacher", text(run.at("teacher", "path"))
    yield "parameters", count_text(run.at("student", "parameters"))
    yield "MACs per sample", count_text(run.at("student", "macs"))
    yield "file size", bytes_text(run.at("student", "bytes"))
    yield from ((name, f"{value} ({interval})" if interval else value) for name, value, interval, _ in _measures(run))
    for row in run.rows("baselines", "rows"):
        if row.get("name") == "student":
            yield "of the teacher's time", digits_text(at(row, "speed", "ratio", "median"), 2)
    yield "neighbourhoods distilled", str(sum(row.get("status") != "kept" for row in run.rows("neighbourhoods")))
    yield "took", seconds_text(run.at("seconds", "total"))
    yield "peak memory", bytes_text(run.at("peak_rss_bytes"))


def _measures(run: RunDocument) -> Iterator[tuple[str, str, str, str]]:
    return lines(run.at("metrics", "student"))


def _differences(runs: Sequence[RunDocument]) -> Markup:
    """Settings, versions and digests that are not the same in all runs."""
    told = [dict(_origins(run)) for run in runs]
    names = dict.fromkeys(name for origins in told for name in origins)
    rows = [(name, *(each.get(name, "") for each in told)) for name in names]
    columns = [Column(""), *(Column(f"{i + 1}: {run.name}") for i, run in enumerate(runs))]
    unlike = [row for row in rows if len(set(row[1:])) > 1]
    if not unlike:
        return section("What differs", tag("p", "Neither settings nor versions nor files."))
    return section("What differs", table(columns, unlike))


def _origins(run: RunDocument) -> Iterator[tuple[str, str]]:
    for title, keys in (("", ("asked", "recipe")), ("version of ", ("versions",)), ("machine: ", ("machine",))):
        yield from ((f"{title}{key}", _plain(value)) for key, value in _mapping(run.at(*keys)).items())
    for name, entry in _mapping(run.at("files")).items():
        digest = text(at(entry, "sha256")) or text(at(entry, "fingerprint"))
        yield f"SHA-256 of the {name}", digest


def _mapping(found: Any) -> Mapping[str, Any]:
    return found if isinstance(found, Mapping) else {}


def _plain(value: Any) -> str:
    if value is None:
        return LEFT_OPEN
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
