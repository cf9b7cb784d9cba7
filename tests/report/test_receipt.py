"""The page of a run: it is whole, needs nothing, runs nothing, and survives whatever a report holds."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ndonnx
from ndonnx.config.recipe import Recipe
from ndonnx.config.toml import to_toml
from ndonnx.errors import UsageError
from ndonnx.report.receipt import RunDocument, markdown, page, read_run
from ndonnx_cli.main import main
from tests.helpers.json_schema import faults
from tests.helpers.models import residual_cnn
from tests.helpers.runs import SMALL, Bench

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text(encoding="utf-8"))
VOID = {"meta", "br", "hr", "img", "link", "input"}
HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\x1b[31m$x^2$`|\ud800"


class Page(HTMLParser):
    """Reads a page as a browser would, and keeps what could be dangerous or broken."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.wrong: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img" and re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/=]+", dict(attrs).get("src") or ""):
            return  # a picture inside the page
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            told = value or ""
            if name.startswith("on") or (name in ("src", "href", "xlink:href") and not told.startswith("#")):
                self.wrong.append(f"{tag} {name}={told}")
            if name == "id":
                self.ids.append(told)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def checked(text: str) -> str:
    """The words of a page, after what must hold for every page."""
    reader = Page()
    reader.feed(text)
    reader.close()
    assert reader.wrong == [] and reader.open == []
    assert not reader.tags & {"script", "iframe", "object", "embed", "link", "img", "form", "base"}
    assert len(reader.ids) == len(set(reader.ids))
    assert len(text.encode("utf-8", errors="replace")) < 2_000_000
    assert "@import" not in text and "url(http" not in text
    return " ".join(reader.words)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small real run."""
    bench = Bench(tmp_path_factory.mktemp("run")).put(residual_cnn())
    bench.compress("first", finetune_steps=4)
    return bench.folder / "first"


def content(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "report.json").read_text())
    return found


def with_baselines(report: dict[str, Any], name: str = "INT8 static") -> dict[str, Any]:
    latency = dict.fromkeys(("p50_ms", "p95_ms", "p99_ms", "mean_ms", "throughput"), 1.5) | {"runs": 4}
    speed = {"start": {"load_ms": 1.0, "peak_memory_bytes": None}, "latency": latency, "ratio": None}
    ratio = {"median": 0.7, "low": 0.6, "high": 0.8, "confidence": 0.95}
    teacher = {"name": "teacher", "bytes": 1000, "speed": speed, "fidelity": report["metrics"]["teacher"]}
    student = {"name": "student", "bytes": 600, "speed": speed | {"ratio": ratio}}
    student |= {"fidelity": report["metrics"]["student"], "how": None, "reason": None}
    broken = {"name": name, "bytes": None, "speed": None, "fidelity": None, "how": None, "reason": "no such operator"}
    rows = [teacher | {"how": None, "reason": None}, student, broken]
    return report | {"baselines": {"batch_size": 1, "threads": 1, "processes": 2, "rows": rows}}


# The report itself


def test_a_real_report_fits_the_published_schema(run: Path) -> None:
    assert list(faults(content(run), SCHEMA, SCHEMA)) == []
    assert list(faults(with_baselines(content(run)), SCHEMA, SCHEMA)) == []
    missing = content(run)
    del missing["files"]["teacher"]["sha256"]
    assert list(faults(missing, SCHEMA, SCHEMA)) == ["report.files.teacher: 'sha256' is missing"]


def test_digests_and_the_command_are_those_of_the_files(run: Path) -> None:
    report = content(run)
    from hashlib import sha256  # noqa: PLC0415

    for name, path in (("teacher", "teacher.onnx"), ("student", "student.onnx"), ("data", "data.npz")):
        assert report["files"][name]["sha256"] == sha256((run.parent / path).read_bytes()).hexdigest()
    assert report["files"]["recipe"]["sha256"] == sha256((run / "recipe.toml").read_bytes()).hexdigest()
    assert report["task"].keys() == report["metrics"]["student"]["outputs"].keys() != set()
    curves = [n["curve"] for n in report["neighbourhoods"] if n["status"] == "distilled"]
    assert curves and all(curve[0][0] == 0 and curve[-1][0] == SMALL["steps"] for curve in curves)
    assert all(curve[0][1] == n["nmse_start"] for n in report["neighbourhoods"] if (curve := n["curve"]))


def test_the_command_repeats_the_run(run: Path, tmp_path: Path) -> None:
    words = shlex.split(content(run)["command"])
    assert words[0] == "ndonnx"
    before = (run.parent / "student.onnx").read_bytes()
    words[words.index("--output") + 1] = str(tmp_path / "again.onnx")
    assert main([*words[1:], "--run-dir", str(tmp_path / "again.run"), "-q"]) == 0
    assert (tmp_path / "again.onnx").read_bytes() == before


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"target": ("params=0.5", "macs=0.6"), "max_drop": "1%", "augment": (), "baselines": "int8,fp16"},
        {"cut": ('a "quoted" \\ name', "tab\tname", "päge\x7f"), "data": {"scale": 0.25, "mean": [0.1, 0.2, 0.3]}},
        {"model_inputs": {"sr.rate": {"value": 16000}, "x": {"axis": 1}}, "search": {"candidates": ("width 0.5",)}},
    ],
)
def test_a_recipe_survives_its_file(recipe: dict[str, Any], tmp_path: Path) -> None:
    given = Recipe(**recipe)
    (tmp_path / "recipe.toml").write_text(to_toml(given), encoding="utf-8")
    assert ndonnx.load_recipe(tmp_path / "recipe.toml") == given


# The page


def test_the_page_of_a_run_tells_what_a_reviewer_asks(run: Path) -> None:
    written = ndonnx.write_report(run)
    assert written.html == run / "report.html" and written.markdown == run / "report.md"
    words = checked(written.html.read_text(encoding="utf-8"))
    report = content(run)
    for told in (
        report["command"], report["files"]["student"]["sha256"], report["versions"]["torch"], "95% interval",
        "Quality after each stage", "channels are seen from outside", "reviewed by", "Held-out error",
    ):  # fmt: skip
        assert told in words
    assert all(n["name"] in words for n in report["neighbourhoods"])
    assert report["command"] in written.markdown.read_text(encoding="utf-8")


def test_the_same_report_is_the_same_page(run: Path) -> None:
    assert page([read_run(run)]) == page([read_run(run / "report.json")])


def test_two_runs_stand_side_by_side(run: Path) -> None:
    other = content(run)
    other["asked"]["recipe"]["keep"] = 0.25
    words = checked(page([read_run(run), RunDocument(run / "other.json", other)]))
    assert "Side by side" in words and "What differs" in words
    differing = words[words.index("What differs") :][:80]
    assert "keep" in differing and "left open" in differing and "0.25" in differing


def test_baselines_are_told_and_one_that_failed_with_its_reason(run: Path) -> None:
    document = RunDocument(run / "report.json", with_baselines(content(run)))
    words, table = checked(page([document])), markdown([document])
    assert "0.7 (0.6 to 0.8)" in words and "no such operator" in words
    assert "| INT8 static |  |  |  | no such operator |" in table


def hostile(value: Any) -> Any:
    """A report in which every text, names included, is an attack."""
    if isinstance(value, dict):
        fixed = {"teacher", "student", "outputs", "logits"}
        return {
            key if key in fixed or key.isidentifier() else key + HOSTILE: hostile(each) for key, each in value.items()
        }
    if isinstance(value, list):
        return [hostile(each) for each in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_hostile_names_are_text(run: Path) -> None:
    report = hostile(with_baselines(content(run)))
    report["metrics"]["student"]["outputs"] = {HOSTILE: next(iter(report["metrics"]["student"]["outputs"].values()))}
    report["seconds"][HOSTILE] = 3.0
    report["warnings"] = [HOSTILE]
    document = RunDocument(Path("a<b>.json"), report)
    for text in (page([document]), page([document, document])):
        checked(text)
        assert "<script" not in text and "<img" not in text and "\x1b" not in text
    table, fence, code = markdown([document]).partition("```sh")
    assert "<script" not in table and "\x1b" not in table + code and code.count("```") == len([fence])
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert {len(row.replace("\\|", "").split("|")) for row in rows} == {7}


def paths(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield here
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from paths(inner, (*here, key))


@settings(max_examples=5, deadline=None)
@given(st.data())
def test_nothing_in_a_report_is_taken_for_granted(run: Path, data: st.DataObject) -> None:
    report = copy.deepcopy(with_baselines(content(run)))
    needed = {("teacher",), ("student",), ("metrics",), ("neighbourhoods",), ("seconds",)}
    places = [path for path in paths(report) if path and path not in needed]
    for path in data.draw(st.lists(st.sampled_from(places), min_size=4, max_size=12)):
        holder = report
        try:
            for key in path[:-1]:
                holder = holder[key]
            holder[path[-1]] = data.draw(st.sampled_from([None, [], {}, -1, 1e308, True, "x", [None], {"a": {}}]))
        except (KeyError, IndexError, TypeError):
            continue  # what stood there was replaced before
    document = RunDocument(Path("report.json"), report)
    checked(page([document]))
    markdown([document])


# Baselines afterwards


@pytest.mark.slow
def test_baselines_are_measured_afterwards_on_the_rows_of_the_run(run: Path) -> None:
    before, whole = content(run), content(run)
    ndonnx.write_report(run, baselines="dynamic")
    after = content(run)
    rows = {row["name"]: row for row in after.pop("baselines")["rows"]}
    assert after == before
    pictures = [each.pop("picture") for found in (before, after) for each in found["metrics"]["student"]["worst"]]
    assert all(pictures) and [each.pop("picture") for each in rows["student"]["fidelity"]["worst"]]
    assert rows["student"]["fidelity"] == before["metrics"]["student"]
    assert rows["INT8 dynamic"]["reason"] is None and (run / "baselines" / "dynamic.onnx").is_file()
    assert list(faults(content(run), SCHEMA, SCHEMA)) == []
    (run / "report.json").write_text(json.dumps(whole))


def test_baselines_stand_beside_the_files_of_the_run_only(run: Path, tmp_path: Path) -> None:
    report = content(run)
    report["files"]["student"]["sha256"] = "0" * 64
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(UsageError, match="is not the student of"):
        ndonnx.write_report(tmp_path, baselines="dynamic")
    (tmp_path / "report.json").write_text(json.dumps(report | {"command": None}))
    with pytest.raises(UsageError, match="run compress on files"):
        ndonnx.write_report(tmp_path, baselines="dynamic")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json"]


# What cannot be reported


@pytest.mark.parametrize(
    ("name", "held", "told"),
    [
        ("missing.json", None, "expected a run directory"),
        ("text.json", "milk, eggs", "not a JSON document"),
        ("list.json", "[1, 2]", "not the report of a compression"),
        ("search.json", '{"students": []}', "not the report of a compression"),
        ("deep.json", "[" * 100_000, "not a JSON document"),
    ],
)
def test_what_is_no_report_is_one_line(
    name: str, held: str | None, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if held is not None:
        (tmp_path / name).write_text(held)
    before = sorted(tmp_path.iterdir())
    assert main(["report", str(tmp_path / name), "-q"]) == 2
    error = capsys.readouterr().err
    assert told in error and name in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_where_it_goes(run: Path, tmp_path: Path) -> None:
    assert main(["report", str(run), "-o", str(tmp_path / "page.html"), "-q"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "page.md"]
    for target in ("page.pdf", "no/such/page.html"):
        with pytest.raises(UsageError, match="page"):
            ndonnx.write_report(run, output=tmp_path / target)
