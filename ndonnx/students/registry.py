"""Student methods by name: those of `methods/`, those that installed packages bring, and those of the program itself.

A method is found without being imported, by the name of its file, of its entry point in the group `ndonnx.methods`, or
because its class was defined. So a help text costs nothing, and a new method is one new file.
"""

from __future__ import annotations

from collections.abc import Iterable

from ndonnx.config.recipe import Recipe
from ndonnx.errors import RecipeError
from ndonnx.runtime.plugins import Plugins
from ndonnx.students import methods
from ndonnx.students.base import REGISTERED, StudentMethod

DEFAULT_METHOD = str(Recipe.model_fields["method"].default)

ENTRY_POINTS = "ndonnx.methods"
"""Group of entry points under which an installed package names its methods: `blur = "my_package.blur"`."""

_PLUGINS = Plugins(methods, ENTRY_POINTS)


def load_methods(names: Iterable[str]) -> None:
    """Import methods, so that the settings that they declare are known.

    Args:
        names: of methods. Those that nobody brings are refused when they are used, not here; the default one declares
            nothing and is not imported for it, since torch takes seconds.
    """
    for name in names:
        if name in _PLUGINS.homes() and name != DEFAULT_METHOD:
            method_class(name)


def method_names() -> list[str]:
    """Names of all student methods, sorted."""
    return sorted({*_PLUGINS.homes(), *REGISTERED})


def check_method(name: str) -> None:
    """Refuse a student method that is not known, before anything is computed or imported.

    Raises:
        RecipeError: it is not known.
    """
    if name not in method_names():
        *others, last = map(repr, method_names())
        raise RecipeError(f"recipe: 'method' = {name!r}: Input should be {', '.join(others)} or {last}")


def method_class(name: str) -> type[StudentMethod]:
    """The student method of a name, imported where that has not happened.

    Raises:
        RecipeError: there is none.
    """
    check_method(name)
    if name not in REGISTERED:
        _PLUGINS.load(name)
    return REGISTERED[name]


def operators_around(names: Iterable[str]) -> frozenset[str]:
    """Operators around whose weights these methods want regions of their own.

    The default method wants none and is not imported for that: torch takes seconds, and `inspect` needs none of it.
    """
    found = (method_class(name).around for name in names if name != DEFAULT_METHOD)
    return frozenset[str]().union(*found)


def method_of(recipe: Recipe) -> StudentMethod:
    """The student method that a recipe asks for.

    Raises:
        RecipeError: there is no such method, or it refuses its settings.
    """
    return method_class(recipe.method).of(recipe)
