"""A recipe as the TOML file that gives it again, every setting written out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ndonnx.config.recipe import Recipe


def to_toml(recipe: Recipe) -> str:
    """All settings of a recipe that have a value, as `load_recipe` reads them; settings without one stay unset."""
    values = recipe.model_dump(mode="json", exclude_none=True)
    flat = values | values.pop("extra", {})
    return "\n".join(_table((), flat)) + "\n"


def _table(path: tuple[str, ...], values: Mapping[str, Any]) -> Iterator[str]:
    """Plain keys first, then the tables inside, each under its whole name."""
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    if path and len(tables) < len(values):
        yield f"\n[{'.'.join(map(_text, path))}]"
    yield from (f"{_key(key)} = {_value(value)}" for key, value in values.items() if key not in tables)
    for key, table in tables.items():
        yield from _table((*path, key), table)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return _text(value) if isinstance(value, str) else json.dumps(value)


def _key(name: str) -> str:
    return name if name.isascii() and name.replace("_", "").isalnum() else _text(name)


def _text(text: str) -> str:
    """A basic string: JSON escapes what TOML escapes, but for the delete character."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
