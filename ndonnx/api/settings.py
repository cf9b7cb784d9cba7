"""The recipe as Python users write it: an object, a mapping, a TOML file, keywords, student methods as objects."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import BaseModel

from ndonnx.config.recipe import Recipe, make_recipe, method_in
from ndonnx.config.recipe import load_recipe as read_recipe
from ndonnx.errors import RecipeError

RecipeLike: TypeAlias = Recipe | Mapping[str, Any] | str | Path
"""What the verbs take as a recipe: the object, its keys in a mapping, or the path of a TOML file."""

_TABLES = ("data", "search", "model_inputs")


def load_recipe(path: str | Path | None = None, **overrides: Any) -> Recipe:
    """Read a TOML recipe and lay the given keys over it; `None` leaves a key alone, also inside a table.

    The student method is imported first, so that the settings that it declares are known.

    Raises:
        RecipeError: the file cannot be read, or a key is unknown or out of range.
    """
    named = [overrides.get("method"), None if path is None else method_in(path)]
    if names := [name for name in named if isinstance(name, str)]:
        from ndonnx.students.registry import load_methods  # noqa: PLC0415 - most recipes name none

        load_methods(names)
    return read_recipe(path, **overrides)


def recipe_of(recipe: RecipeLike | None, settings: Mapping[str, Any]) -> Recipe:
    """A recipe with settings laid over it.

    Args:
        recipe: where to start from. None: the defaults.
        settings: keys of the recipe; one that is None leaves the recipe's alone. `method` may be a student method, as
            `Width(0.5)`, `student` and `metric` functions, and `candidates` in the table `search` a list of student
            methods.

    Raises:
        RecipeError: a key is unknown or out of range, or said twice; or the file cannot be read.
    """
    over = _plain({key: value for key, value in settings.items() if value is not None})
    if isinstance(recipe, str | Path):
        recipe = load_recipe(recipe)
    if isinstance(recipe, Recipe):
        return make_recipe(_over(recipe.model_dump(exclude_unset=True), over), "settings") if over else recipe
    if not isinstance(recipe, Mapping | None):
        raise RecipeError(f"recipe: expected a Recipe, a mapping or the path of a file, found {type(recipe).__name__}")
    return make_recipe(_over(_plain(recipe or {}), over), "settings" if over else "recipe")


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the objects among them in the recipe's own words."""
    found = dict(settings)
    if isinstance(found.get("inputs"), Mapping):
        found["model_inputs"] = _over(found.pop("inputs"), found.get("model_inputs", {}))
    for name in _TABLES:
        if isinstance(table := found.get(name), BaseModel):
            found[name] = table.model_dump(exclude_unset=True)
    if isinstance(search := found.get("search"), Mapping) and "candidates" in search:
        found["search"] = dict(search) | {"candidates": _candidates(search["candidates"])}
    for key in ("student", "metric"):
        if callable(found.get(key)):
            found[key] = _by_name(key, found[key])
    if not isinstance(method := found.get("method", ""), str):
        from ndonnx.students.settings import settings_of  # noqa: PLC0415 - needs torch

        keys = settings_of(method)
        if twice := [key for key in keys if key != "method" and key in found]:
            raise RecipeError(
                f"settings: '{twice[0]}' is said twice, in the method and beside it; leave one of them out"
            )
        found |= keys
    return found


def _over(start: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping with another one laid over it, and tables inside it key by key."""
    merged = dict(start)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _over(merged[key], value) if both else value
    return merged


def _candidates(given: Any) -> Any:
    """Candidates as texts, as `width 0.5`."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        return given
    given = tuple(given)
    if all(isinstance(each, str) for each in given):
        return given
    from ndonnx.students.settings import candidate_of  # noqa: PLC0415 - needs torch

    return tuple(each if isinstance(each, str) else candidate_of(each) for each in given)


def _by_name(key: str, function: Callable[..., Any]) -> str:
    """A function as `module:function`, by which the processes of a run find it too.

    Args:
        key: of the recipe, for which it is given.
        function: any callable.

    Raises:
        RecipeError: nothing of that name and module is this function.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    found = None if module in (None, "__main__") else getattr(sys.modules.get(module), name, None)
    if found is not function:
        raise RecipeError(
            f"{key} {name or type(function).__name__}: cannot be imported by its name; define it as a function of a "
            "module of its own"
        )
    return f"{module}:{name}"
