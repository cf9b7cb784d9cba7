"""HTML from values that are not trusted: everything that comes from outside goes through `escaped`."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class Markup(str):
    """Text that is HTML already, made by this package."""

    __slots__ = ()


Content = str | Markup


def escaped(content: Content) -> Markup:
    """Markup as it is; text with its special characters escaped, and without control characters."""
    if isinstance(content, Markup):
        return content
    return Markup(html.escape("".join(c if c.isprintable() else "\ufffd" for c in content)))


def joined(parts: Iterable[Content], between: str = "") -> Markup:
    """Parts one behind another, each escaped where it is text."""
    return Markup(between.join(escaped(part) for part in parts))


def tag(name: str, *content: Content, **attributes: str) -> Markup:
    """An element; `cls` is its class, and `_` in the name of an attribute a dash."""
    told = {"class" if key == "cls" else key.replace("_", "-"): value for key, value in attributes.items()}
    inside = "".join(f' {key}="{escaped(value)}"' for key, value in told.items())
    return Markup(f"<{name}{inside}>{joined(content)}</{name}>")


def image(png: bytes, alternative: str) -> Markup:
    """A picture inside the page.

    Args:
        png: its file.
        alternative: what stands for it where it is not shown.
    """
    data = base64.b64encode(png).decode("ascii")
    return Markup(f'<img src="data:image/png;base64,{data}" alt="{escaped(alternative)}">')


@dataclass(frozen=True)
class Column:
    """A column of a table: its head, and whether it holds numbers."""

    head: str
    numbers: bool = False


def table(columns: Sequence[Column], rows: Sequence[Sequence[Content]]) -> Markup:
    """A table that scrolls by itself where the page is narrow; columns without any content are left out."""
    used = [i for i, column in enumerate(columns) if not column.head or any(row[i] for row in rows)]
    head = [_cell("th", columns[i], columns[i].head) for i in used]
    lines = [tag("tr", *(_cell("td", columns[i], row[i]) for i in used)) for row in rows]
    whole = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *lines))
    return tag("div", whole, cls="scroll")


def _cell(name: str, column: Column, content: Content) -> Markup:
    return tag(name, content, cls="n") if column.numbers else tag(name, content)


def section(title: str, *content: Content) -> Markup:
    """A part of the page under its heading."""
    return tag("section", tag("h2", title), *content)
