"""The docstrings that stand below the fields of a class, where editors read them too."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from importlib.abc import InspectLoader
from itertools import pairwise


def field_docstrings(owner: type) -> dict[str, str]:
    """The docstrings below the annotated fields of a class and its bases, by field, each on one line.

    They are read from the source of their modules; what stands in a module without source is left out.
    """
    found: dict[str, str] = {}
    for base in reversed(owner.__mro__):
        found |= _in_module(base.__module__).get(base.__name__, {})
    return found


@cache
def _in_module(name: str) -> dict[str, dict[str, str]]:
    """By class at the module's top level."""
    if not name.startswith("ndonnx."):
        return {}
    loader = sys.modules[name].__loader__
    source = loader.get_source(name) if isinstance(loader, InspectLoader) else None
    classes = (node for node in ast.parse(source or "").body if isinstance(node, ast.ClassDef))
    return {node.name: dict(_below_fields(node)) for node in classes}


def _below_fields(owner: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, below in pairwise(owner.body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, " ".join(text.split())
