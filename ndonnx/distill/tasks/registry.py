"""Kinds of tasks by name: those of `kinds/`, those that installed packages bring, and those of the program itself."""

from __future__ import annotations

from ndonnx.distill.tasks import kinds
from ndonnx.distill.tasks.base import REGISTERED, TaskKind
from ndonnx.errors import RecipeError
from ndonnx.runtime.plugins import Plugins

ENTRY_POINTS = "ndonnx.tasks"
"""Group of entry points under which an installed package names its kinds: `boxes = "my_package.boxes"`."""
AUTO = "auto"
"""What the user says of an output whose values are to speak for themselves."""

_PLUGINS = Plugins(kinds, ENTRY_POINTS)


def kind_names() -> list[str]:
    """Names of all kinds, sorted."""
    return sorted({*_PLUGINS.homes(), *REGISTERED})


def kind_named(name: str) -> type[TaskKind]:
    """The kind of this name, imported where that has not happened.

    Raises:
        RecipeError: there is none.
    """
    if name not in kind_names():
        raise RecipeError(f"--task {name}: expected {AUTO}, {', '.join(kind_names())} or module:function")
    if name not in REGISTERED:
        _PLUGINS.load(name)
    return REGISTERED[name]


def all_kinds() -> list[type[TaskKind]]:
    """All kinds, those of the program and of packages before those that ship, so that they may speak first."""
    found = {name: kind_named(name) for name in kind_names()}
    shipped = set(_PLUGINS.shipped())
    return [found[name] for name in sorted(found, key=lambda name: (name in shipped, name))]
