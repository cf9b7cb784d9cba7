"""The part of JSON Schema that docs/report.schema.json is written in, so that tests need no package for it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_KINDS: Mapping[str, Any] = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
    "null": type(None),
}  # fmt: skip
KNOWN = {
    "$schema", "$defs", "$ref", "title", "description", "type", "required", "properties", "additionalProperties",
    "items", "minItems", "maxItems", "anyOf", "enum", "const", "minimum", "pattern",
}  # fmt: skip


def faults(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], where: str = "report") -> Iterator[str]:
    """What is wrong with a value, a line each; a keyword of the schema that is not understood is wrong too."""
    yield from (f"{where}: the schema's '{key}' is not understood" for key in schema.keys() - KNOWN)
    if "$ref" in schema:
        yield from faults(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root, where)
        return
    kinds = schema.get("type", list(_KINDS))
    if not any(_is(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        yield f"{where}: expected {kinds}, found {value!r}"
        return
    if "anyOf" in schema and all(list(faults(value, each, root, where)) for each in schema["anyOf"]):
        yield f"{where}: fits none of several forms: {value!r}"
    if value not in schema.get("enum", [value]) or schema.get("const", value) != value:
        yield f"{where}: found {value!r}"
    if "minimum" in schema and value is not None and value < schema["minimum"]:
        yield f"{where}: found {value}"
    if "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{where}: found {value!r}"
    yield from _inside(value, schema, root, where)


def _inside(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], where: str) -> Iterator[str]:
    if isinstance(value, dict):
        known = schema.get("properties", {})
        yield from (f"{where}: '{key}' is missing" for key in schema.get("required", ()) if key not in value)
        for key, entry in value.items():
            inner = known.get(key, schema.get("additionalProperties", {}))
            yield from faults(entry, inner, root, f"{where}.{key}")
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            yield f"{where}: has {len(value)} entries"
        for number, entry in enumerate(value):
            yield from faults(entry, schema.get("items", {}), root, f"{where}[{number}]")


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _KINDS[kind]) and (not isinstance(value, bool) or kind == "boolean")
