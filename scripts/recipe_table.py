"""README's tables of settings, made from the recipe: `python -m scripts.recipe_table` writes them anew.

They stand between `<!-- settings -->` and `<!-- /settings -->`, and between `<!-- search -->` and `<!-- /search -->`;
a test compares.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from ndonnx.config.panel import Panel
from ndonnx.config.recipe import Recipe, SearchRecipe
from ndonnx.config.setting import Setting, settings_of

README = Path(__file__).resolve().parent.parent / "README.md"
BAR = "\\|"
"""A bar inside a cell of a Markdown table."""


def with_tables(text: str) -> str:
    """README's text with its tables of settings as the recipe has them now."""
    return _replaced(_replaced(text, "settings", flag_table()), "search", search_table())


def flag_table() -> str:
    """The flags of `ndonnx compress` that are keys of a recipe, under the headings of `--help`."""
    rows = ["| option | means | default |", "| --- | --- | --- |"]
    ordered = sorted(settings_of(Recipe), key=lambda setting: list(Panel).index(setting.panel))
    for panel, group in groupby(ordered, key=lambda setting: setting.panel):
        rows.append(f"| **{panel}** | | |")
        rows += [_row(_flag(each), *_told(each)) for each in group]
    return "\n".join(rows)


def search_table() -> str:
    """The keys of the table `[search]` of a recipe, with their flags of `ndonnx search`."""
    rows = ["| key | option of `search` | means | default |", "| --- | --- | --- | --- |"]
    for setting in settings_of(SearchRecipe, unflagged=True):
        flag = f"`{setting.flag_name} {setting.metavar}`" if setting.metavar else ""
        rows.append(_row(f"`{setting.name}`", flag, *_told(setting)))
    return "\n".join(rows)


def _flag(setting: Setting) -> str:
    """A flag as it is given, a switch that is on both ways."""
    shown = f"`{f'{setting.flag_name} {setting.metavar}'.strip()}`"
    return f"{shown}, `--no-{setting.flag_name.removeprefix('--')}`" if setting.default is True else shown


def _told(setting: Setting) -> tuple[str, str]:
    """What a setting means, and its default."""
    text = f"{setting.help} Repeatable." if setting.repeatable else setting.help
    return text, setting.default_text or f"`{setting.told_default}`"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |"


def _replaced(text: str, name: str, table: str) -> str:
    """The text with this table between the two markers of a name.

    Raises:
        ValueError: a marker is missing.
    """
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, _, rest = text.partition(first)
    _, found, tail = rest.partition(last)
    if not found:
        raise ValueError(f"README.md should hold {first} and {last}, in this order")
    return f"{head}{first}\n\n{table}\n\n{last}{tail}"


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
