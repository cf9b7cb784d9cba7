"""`report`: finished runs as a page that a reviewer can sign, and as a table for a pull request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ndonnx.errors import UsageError
from ndonnx.report.receipt import markdown, page, read_run
from ndonnx.runtime.atomic import atomic_write

HTML, MARKDOWN = "report.html", "report.md"
_ENDINGS = (".html", ".htm")


@dataclass(frozen=True)
class WrittenReport:
    """What `write_report` wrote."""

    html: Path
    """One file that needs no network and runs no script."""
    markdown: Path
    """A short table of the same."""


def write_report(*runs: str | Path, output: str | Path | None = None) -> WrittenReport:
    """Write a finished compression as one self-contained HTML file, and beside it as a short table in Markdown.

    Args:
        runs: run directories or their `report.json`; several are compared on one page.
        output: the HTML file; the Markdown file has the same name with `.md`. None: `report.html` and `report.md`
            beside the first `report.json`.

    Raises:
        UsageError: there is no run, a report cannot be read, or the page cannot be written.
    """
    if not runs:
        raise UsageError("report: expected a run directory or its report.json, found none")
    documents = [read_run(run) for run in runs]
    target = documents[0].path.with_name(HTML) if output is None else Path(output)
    if target.suffix.lower() not in _ENDINGS:
        raise UsageError(f"{target}: a page is written as .html; give a name that ends so")
    if target.is_dir() or not target.parent.is_dir():
        raise UsageError(f"{target}: cannot write a page there; expected a file name in a folder that exists")
    beside = target.with_suffix(".md")
    _write(target, page(documents))
    _write(beside, markdown(documents))
    return WrittenReport(target, beside)


def _write(path: Path, content: str) -> None:
    atomic_write(path, content.encode("utf-8", errors="replace"))
