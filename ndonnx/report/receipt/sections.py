"""The parts of a run's page, in the order in which a reviewer asks for them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ndonnx.config.recipe import Recipe
from ndonnx.report.receipt.chain import chain
from ndonnx.report.receipt.charts import charts
from ndonnx.report.receipt.document import RunDocument, at, number, text
from ndonnx.report.receipt.fidelity import lines, main_measure, tasks
from ndonnx.report.receipt.html import Column, Content, Markup, image, joined, section, table, tag
from ndonnx.report.receipt.words import (
    LEFT_OPEN,
    bytes_text,
    count_text,
    digits_text,
    part_text,
    seconds_text,
    share_text,
)


def sections(run: RunDocument, prefix: str) -> Iterator[Markup]:
    """All parts that a run has something to tell in.

    Args:
        run: the report.
        prefix: unique on the page, for the names of the charts' parts.
    """
    yield section("Teacher and student", _cards(run), _sizes(run), *_target(run))
    yield from _baselines(run)
    yield section("Fidelity", *_fidelity(run))
    yield from _stages(run)
    yield section("Neighbourhoods", chain(run.rows("neighbourhoods")))
    drawn = charts(run, prefix)
    yield section("Time, memory and training", _spent(run), tag("div", *drawn, cls="charts"))
    yield from _warnings(run)
    yield section("What was asked", *_asked(run))
    yield section("Provenance", *_provenance(run))


def _cards(run: RunDocument) -> Markup:
    """The figures that decide, large."""
    teacher, student = run.at("teacher"), run.at("student")
    told = [
        (share_text(at(student, key), at(teacher, key)), f"of the {name}")
        for key, name in (("parameters", "parameters"), ("macs", "MACs"), ("bytes", "bytes"))
    ]
    ours = next((row for row in run.rows("baselines", "rows") if row.get("name") == "student"), {})
    told.append((digits_text(at(ours, "speed", "ratio", "median"), 2), "of the latency"))
    told += [(value, f"{name}, n = {count}") for name, value, _, count in list(lines(run.at("metrics", "student")))[:2]]
    return tag("div", *(_card(value, words) for value, words in told if value), cls="cards")


def _card(value: str, words: str) -> Markup:
    return tag("div", tag("b", value), tag("span", words), cls="card")


def _sizes(run: RunDocument) -> Markup:
    teacher, student = run.at("teacher"), run.at("student")
    shapes = run.at("shapes")
    told = isinstance(shapes, Mapping) and ", ".join(f"{name} {json.dumps(shape)}" for name, shape in shapes.items())
    rows = [
        (name, write(at(teacher, key)), write(at(student, key)), share_text(at(student, key), at(teacher, key)))
        for name, key, write in (
            ("parameters", "parameters", count_text),
            (f"MACs per sample{f' ({told})' if told else ''}", "macs", count_text),
            ("file size", "bytes", bytes_text),
            ("file size, compressed", "compressed_bytes", bytes_text),
        )
        if at(student, key) is not None
    ]
    heads = [Column(""), Column("teacher", True), Column("student", True), Column("student / teacher", True)]
    return table(heads, rows)


def _target(run: RunDocument) -> Iterator[Markup]:
    target = run.at("target")
    if not isinstance(target, Mapping):
        return
    missed = text(target.get("missed"))
    reached = target.get("reached")
    parts = ", ".join(f"{k} {part_text(v)}" for k, v in reached.items()) if isinstance(reached, Mapping) else ""
    bound = part_text(target.get("bound"))
    lost = f"{text(target.get('quality'))} lost {part_text(target.get('drop'))}" + (
        f", at most {bound}" if bound else ""
    )
    words = f"target missed: {missed}" if missed else "target reached"
    yield tag("p", tag("b", words, cls="bad" if missed else "good"), f". Of the teacher's: {parts}; {lost}.")


def _baselines(run: RunDocument) -> Iterator[Markup]:
    rows = run.rows("baselines", "rows")
    if not rows:
        return
    columns = [
        Column("model"), Column("bytes", True), Column("of the teacher's", True), Column("p50", True),
        Column("p95", True), Column("of the teacher's time", True), Column("samples / s", True), Column("memory", True),
        Column("fidelity"), Column("how, or why not"),
    ]  # fmt: skip
    told = run.at("baselines")
    taken = (
        f"Timed by turns in {count_text(at(told, 'processes'))} new processes, {count_text(at(told, 'threads'))} "
        f"thread(s), batches of {count_text(at(told, 'batch_size'))}; in brackets the ratio's 95% interval."
    )
    listed = [_baseline(row, rows[0]) for row in rows]
    yield section("Beside what there is otherwise", table(columns, listed), tag("p", taken, cls="dim"))


def _baseline(row: Mapping[str, Any], teacher: Mapping[str, Any]) -> tuple[Content, ...]:
    latency, ratio = at(row, "speed", "latency"), at(row, "speed", "ratio")
    reason = text(row.get("reason"))
    return (
        text(row.get("name")),
        bytes_text(row.get("bytes")),
        share_text(row.get("bytes"), teacher.get("bytes")),
        _milliseconds(at(latency, "p50_ms")),
        _milliseconds(at(latency, "p95_ms")),
        _ratio(ratio),
        count_text(at(latency, "throughput")),
        bytes_text(at(row, "speed", "start", "peak_memory_bytes")),
        main_measure(row.get("fidelity")),
        tag("span", reason, cls="bad") if reason else text(row.get("how")),
    )


def _milliseconds(value: Any) -> str:
    found = digits_text(value)
    return f"{found} ms" if found else ""


def _ratio(ratio: Any) -> str:
    median, low, high = (digits_text(at(ratio, key), 2) for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})" if median else ""


def _fidelity(run: RunDocument) -> Iterator[Markup]:
    teachers = {name: value for name, value, _, _ in lines(run.at("metrics", "teacher"))}
    rows = [
        (name, teachers.get(name, ""), value, interval, count)
        for name, value, interval, count in lines(run.at("metrics", "student"))
    ]
    heads = [
        Column("measure"), Column("teacher", True), Column("student", True), Column("95% interval", True),
        Column("n", True),
    ]  # fmt: skip
    yield table(heads, rows)
    told = tasks(run.at("metrics", "student"))
    worst = number(run.at("metrics", "student", "worst_sample"))
    words = [f"Outputs are taken for: {told}." if told else ""]
    if worst is not None:
        nmse = digits_text(run.at("metrics", "student", "worst_nmse"))
        words.append(f"Worst sample: number {worst:.0f} of the data, from 0, with a squared error (NMSE) of {nmse}.")
    words.append("Measured on samples that no training and no choice has seen.")
    yield tag("p", " ".join(words).strip(), cls="dim")
    yield from _worst(run)


def _worst(run: RunDocument) -> Iterator[Markup]:
    """The samples on which the two differ most, drawn where they are pictures."""
    shown = []
    for row in run.rows("metrics", "student", "worst"):
        sample, teacher, student = (number(row.get(key)) for key in ("sample", "teacher", "student"))
        picture = run.picture(text(row.get("picture")))
        if sample is None or picture is None:
            continue
        said = (
            ""
            if teacher is None or student is None
            else f", {teacher:.0f} to the teacher, {student:.0f} to the student"
        )
        what = f"number {sample:.0f}{said}"
        shown.append(
            tag("figure", image(picture, what), tag("figcaption", f"{what}, NMSE {digits_text(row.get('nmse'))}"))
        )
    if shown:
        yield tag("h3", "Where the two differ most")
        yield tag("div", *shown, cls="gallery")


def _stages(run: RunDocument) -> Iterator[Markup]:
    stages = run.rows("stages")
    if not stages:
        return
    rows = [
        (
            text(row.get("stage")),
            main_measure({"outputs": row.get("outputs"), "metric": row.get("metric")}),
            digits_text(row.get("loss")),
            "written" if row.get("written") is True else "",
        )
        for row in stages
    ]
    heads = [Column("whole student, after it was"), Column("fidelity"), Column("loss", True), Column("kept")]
    words = "On the samples by which the best stage was chosen."
    yield section("Quality after each stage", table(heads, rows), tag("p", words, cls="dim"))


def _spent(run: RunDocument) -> Markup:
    total, memory = seconds_text(run.at("seconds", "total")), bytes_text(run.at("peak_rss_bytes"))
    return tag("p", f"{total} in all; peak memory {memory}.")


def _warnings(run: RunDocument) -> Iterator[Markup]:
    found = run.at("warnings")
    told = [text(line) for line in found if text(line)] if isinstance(found, list) else []
    if told:
        yield section("Warnings", tag("ul", *(tag("li", line) for line in told)))


def _asked(run: RunDocument) -> Iterator[Markup]:
    command = text(run.at("command"))
    if command:
        yield tag("p", "The command that repeats it:")
        yield tag("pre", command)
    recipe = run.at("asked", "recipe")
    if not isinstance(recipe, Mapping):
        return
    usual = Recipe().model_dump(mode="json")
    rows = [(key, _value(value), _value(usual.get(key))) for key, value in recipe.items() if value != usual.get(key)]
    rows.append(("seed", _value(recipe.get("seed")), _value(usual.get("seed"))))
    heads = [Column("setting"), Column("value"), Column("default")]
    yield table(heads, sorted(set(rows)))
    every = ", ".join(f"{key} = {_value(value)}" for key, value in recipe.items())
    yield tag("details", tag("summary", "every setting"), tag("p", every, cls="mono"))


def _value(value: Any) -> str:
    return LEFT_OPEN if value is None else json.dumps(value, ensure_ascii=False)


def _provenance(run: RunDocument) -> Iterator[Markup]:
    machine = run.at("machine")
    if isinstance(machine, Mapping):
        cores, memory = count_text(machine.get("cores")), bytes_text(machine.get("memory_bytes"))
        yield tag(
            "p", f"{text(machine.get('processor'))}, {cores} usable core(s), {memory}, {text(machine.get('system'))}"
        )
    versions = run.at("versions")
    if isinstance(versions, Mapping):
        yield tag("p", ", ".join(f"{name} {text(value)}" for name, value in versions.items()))
    files = run.at("files")
    if isinstance(files, Mapping):
        heads = [Column("file"), Column("path"), Column("SHA-256"), Column("fingerprint")]
        yield table(heads, [row for name, entry in files.items() for row in _digests(str(name), entry)])


def _digests(name: str, entry: Any) -> Iterator[tuple[Content, ...]]:
    if not isinstance(entry, Mapping):
        return
    path = text(entry.get("path")) or text(entry.get("source"))
    digests = [tag("span", text(entry.get(key)), cls="mono") if entry.get(key) else "" for key in _DIGESTS]
    yield (name, tag("span", path, cls="mono"), *digests)
    beside = entry.get("beside")
    for part, digest in beside.items() if isinstance(beside, Mapping) else ():
        yield f"{name}, weights", tag("span", str(part), cls="mono"), tag("span", text(digest), cls="mono"), ""


_DIGESTS = ("sha256", "fingerprint")


def signature() -> Markup:
    """Where a reviewer signs a printed page."""
    return tag("div", tag("div", "reviewed by"), tag("div", "date"), cls="sign")


def headline(run: RunDocument) -> Markup:
    """The run in one line."""
    model = text(run.at("teacher", "path")) or "a model in memory"
    return joined(["student of ", tag("span", model, cls="mono")])
