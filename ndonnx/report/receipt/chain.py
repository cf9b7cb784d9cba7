"""The chain of neighbourhoods from top to bottom: what each was and became, how far off it is, or why it stayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ndonnx.report.drawing import shorten
from ndonnx.report.receipt.document import number, text
from ndonnx.report.receipt.html import Content, Markup, joined, tag
from ndonnx.report.receipt.words import count_text, digits_text, plain_reason, share_text

_MOST = 400
"""Neighbourhoods that are drawn; the report's JSON tells all."""
_LONGEST = 46
"""Letters of the name of a value."""


def chain(neighbourhoods: Sequence[Mapping[str, Any]]) -> Markup:
    """A list with a bar for each neighbourhood, as wide as its share of the weights."""
    most = max((number(row.get("teacher_parameters")) or 0.0 for row in neighbourhoods), default=0.0)
    drawn = [_piece(row, most) for row in neighbourhoods[:_MOST]]
    left = len(neighbourhoods) - len(drawn)
    more = [tag("p", f"and {left} more, in report.json", cls="dim")] if left > 0 else []
    return joined([_key(), tag("ol", *drawn, cls="chain"), *more])


def _key() -> Markup:
    kinds = (
        ("teacher", "the teacher's weights"),
        ("student", "what the student has of them"),
        ("kept", "kept as it is"),
    )
    return tag("p", *(_mark(colour, words) for colour, words in kinds), cls="dim")


def _mark(colour: str, words: str) -> Markup:
    return joined([tag("span", cls="key", style=f"background:var(--{colour})"), words])


def _piece(row: Mapping[str, Any], most: float) -> Markup:
    kept = text(row.get("status")) == "kept"
    whole = number(row.get("teacher_parameters")) or number(row.get("parameters")) or 0.0
    width = 100 * whole / most if most else 0.0
    inside: list[Content] = []
    if not kept:
        part = 100 * min(1.0, (number(row.get("parameters")) or 0.0) / whole) if whole else 100.0
        inside = [tag("i", style=f"width:{part:.1f}%")]
    bar = tag("div", *inside, cls="bar", style=f"width:{width:.1f}%")
    sizes = tag("div", bar, tag("span", _sizes(row, kept), cls="dim"))
    told = tag("div", *(_why(row) if kept else _error(row)), cls="told")
    return tag("li", tag("b", text(row.get("name"))), sizes, told, cls="kept" if kept else "made")


def _sizes(row: Mapping[str, Any], kept: bool) -> str:
    before, after = row.get("teacher_parameters"), row.get("parameters")
    bits = f" in {count_text(row['bits'])} bits" if number(row.get("bits")) else ""
    value = shorten(text(row.get("output")) or "-", _LONGEST)
    if kept or number(before) is None:
        return f"{count_text(after)} weights{bits} → {value}"
    return f"{count_text(before)} → {count_text(after)} weights{bits} ({share_text(after, before)}) → {value}"


def _error(row: Mapping[str, Any]) -> list[Content]:
    before, after = digits_text(row.get("nmse_start")), digits_text(row.get("nmse"))
    budget = digits_text(row.get("tolerance"))
    told = f"{text(row.get('candidate'))}: error (NMSE) {before} → {after}" if after else text(row.get("candidate"))
    first = text(row.get("student_of"))
    lines: list[Content] = [tag("div", told)]
    lines += [tag("div", f"one student with {first}", cls="dim")] if first else []
    lines += [tag("div", f"error budget {budget}", cls="dim")] if budget else []
    lines += [tag("div", text(row.get("warning")), cls="bad")] if row.get("warning") else []
    return lines


def _why(row: Mapping[str, Any]) -> list[Content]:
    reason = text(row.get("reason"))
    plain = plain_reason(reason)
    return [tag("div", plain or reason), *([tag("div", reason, cls="dim mono")] if plain else [])]
