"""`report`: finished runs as a page that a reviewer can sign, and as a table for a pull request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ndonnx.config.recipe import Recipe, make_recipe
from ndonnx.errors import UsageError
from ndonnx.flow.baselines import beside_baselines_later
from ndonnx.flow.prepare import Request
from ndonnx.report.provenance import sha256_of
from ndonnx.report.receipt import RunDocument, markdown, page, read_run
from ndonnx.runtime.atomic import atomic_write, atomic_write_json
from ndonnx.runtime.progress import Listener, Progress, listening

HTML = "report.html"
_ENDINGS = (".html", ".htm")


@dataclass(frozen=True)
class WrittenReport:
    """What `write_report` wrote."""

    html: Path
    """One file that needs no network and runs no script."""
    markdown: Path
    """A short table of the same."""


def write_report(
    *runs: str | Path,
    output: str | Path | None = None,
    baselines: str | tuple[str, ...] = (),
    progress: Listener | None = None,
) -> WrittenReport:
    """Write a finished compression as one self-contained HTML file, and beside it as a short table in Markdown.

    Args:
        runs: run directories or their `report.json`; several are compared on one page.
        output: the HTML file; the Markdown file has the same name with `.md`. None: `report.html` and `report.md`
            beside the first `report.json`.
        baselines: `int8`, `dynamic`, `fp16`, which are made and measured now as `compress` would have, and added to
            each `report.json`; model, student and data must be where and what they were.
        progress: who is told what goes on, as a `Progress` or a callable that takes an `Event`. None: the logger
            `ndonnx`.

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
    kinds = make_recipe({"baselines": baselines}, "--baselines").baselines
    if kinds:
        told = listening(progress)
        documents = [_with_baselines(document, kinds, told) for document in documents]
    beside = target.with_suffix(".md")
    _write(target, page(documents))
    _write(beside, markdown(documents))
    return WrittenReport(target, beside)


def _write(path: Path, content: str) -> None:
    atomic_write(path, content.encode("utf-8", errors="replace"))


def _with_baselines(document: RunDocument, kinds: tuple[str, ...], progress: Progress) -> RunDocument:
    """The report with a comparison that is made now, also on disk."""
    request, recipe = _request(document)
    found = beside_baselines_later(kinds, request, recipe, document.path.parent, progress)
    content = {**document.content, "baselines": found.to_json()}
    atomic_write_json(document.path, content)
    return RunDocument(document.path, content)


def _request(document: RunDocument) -> tuple[Request, Recipe]:
    """What a run was given, where all of it is still what it was."""
    asked, recipe = document.at("asked"), document.at("asked", "recipe")
    if not isinstance(asked, Mapping) or not isinstance(recipe, Mapping) or document.at("command") is None:
        raise UsageError(
            f"{document.path}: does not tell the files of the run, so that baselines cannot be made; "
            "run compress on files, with --baselines"
        )
    teacher, student = (_unchanged(document, side) for side in ("teacher", "student"))
    request = Request(teacher, asked.get("data"), asked.get("eval"), student, document.path.parent)
    settings = {key: value for key, value in recipe.items() if value is not None}
    return request, make_recipe(settings, str(document.path))


def _unchanged(document: RunDocument, side: str) -> Path:
    """The file of the teacher or the student.

    Raises:
        UsageError: it is not there, or is another one than that of the run.
    """
    path, digest = document.at("files", side, "path"), document.at("files", side, "sha256")
    if not isinstance(path, str) or not Path(path).is_file():
        raise UsageError(
            f"{document.path}: the {side} {path or ''} is not there any more, and baselines stand beside it"
        )
    if sha256_of(Path(path)) != digest:
        raise UsageError(f"{path}: is not the {side} of {document.path} any more; its SHA-256 is another one")
    return Path(path)
