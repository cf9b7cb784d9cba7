"""A run as a short table in Markdown, for a pull request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ndonnx.report.receipt.document import RunDocument, at, text
from ndonnx.report.receipt.fidelity import main_measure
from ndonnx.report.receipt.words import bytes_text, count_text, digits_text, seconds_text, share_text

Row = tuple[str, str, str, str, str]
"""Model, bytes, share of the teacher's bytes, share of its time, fidelity."""


def markdown(runs: Sequence[RunDocument]) -> str:
    """A heading, a table and the provenance of each run."""
    return "\n".join(line for run in runs for line in _of(run)) + "\n"


def _of(run: RunDocument) -> Iterator[str]:
    teacher, student = run.at("teacher"), run.at("student")
    yield f"### {_plain(run.name)}"
    yield ""
    yield _line(("model", "file size", "of the teacher's", "of its time", "fidelity"))
    yield "| --- | ---: | ---: | ---: | --- |"
    yield from map(_line, _rows(run))
    yield ""
    yield (
        f"{count_text(at(student, 'parameters'))} of {count_text(at(teacher, 'parameters'))} parameters; "
        f"took {seconds_text(run.at('seconds', 'total'))}, peak memory {bytes_text(run.at('peak_rss_bytes'))}."
    )
    missed = text(run.at("target", "missed"))
    if missed:
        yield f"\n**Target missed:** {_plain(missed)}"
    warnings = run.at("warnings")
    yield from (f"- {_plain(text(line))}" for line in (warnings if isinstance(warnings, list) else []))
    digest = text(run.at("files", "student", "sha256"))
    if digest:
        yield f"\nStudent SHA-256: `{_plain(digest)}`"
    command = text(run.at("command"))
    if command:
        yield from ("", "```sh", _unfenced(command), "```")


def _rows(run: RunDocument) -> Iterator[Row]:
    rows = run.rows("baselines", "rows")
    if not rows:
        for side in ("teacher", "student"):
            size, whole = run.at(side, "bytes"), run.at("teacher", "bytes")
            yield side, bytes_text(size), share_text(size, whole), "", main_measure(run.at("metrics", side))
        return
    for row in rows:
        size, ratio = row.get("bytes"), digits_text(at(row, "speed", "ratio", "median"), 2)
        told = text(row.get("reason")) or main_measure(row.get("fidelity"))
        yield text(row.get("name")), bytes_text(size), share_text(size, rows[0].get("bytes")), ratio, told


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_plain, cells))} |"


def _plain(words: str) -> str:
    """Text on one line in which nothing is markup, neither Markdown's nor HTML's."""
    shown = "".join(c if c.isprintable() else " " for c in words)
    return "".join(f"\\{c}" if c in "\\`*_[]|#" else {"<": "&lt;", ">": "&gt;", "&": "&amp;"}.get(c, c) for c in shown)


def _unfenced(command: str) -> str:
    """A command that cannot end the block it stands in."""
    return "".join(c if c.isprintable() else " " for c in command).replace("```", "'``'")
