"""The recipe as Python users write it: an object, a mapping, a TOML file, keywords, student methods as objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import BaseModel

from ndonnx.config.recipe import Recipe, load_recipe, make_recipe
from ndonnx.errors import RecipeError
from ndonnx.students import ActivationSwap, Custom, LowRank, Removal, Sparsity, StudentMethod, Width

RecipeLike: TypeAlias = Recipe | Mapping[str, Any] | str | Path
"""What the verbs take as a recipe: the object, its keys in a mapping, or the path of a TOML file."""

_NAMES: Mapping[type[StudentMethod], str] = {
    Width: "width",
    Sparsity: "sparsity",
    LowRank: "lowrank",
    ActivationSwap: "activation",
    Removal: "removal",
    Custom: "custom",
}
_TABLES = ("data", "search", "model_inputs")


def recipe_of(recipe: RecipeLike | None, settings: Mapping[str, Any]) -> Recipe:
    """A recipe with settings laid over it.

    Args:
        recipe: where to start from. None: the defaults.
        settings: keys of the recipe; one that is None leaves the recipe's alone. `method` may be a student method, as
            `Width(0.5)`, `student` a function, and `candidates` in the table `search` a list of student methods.

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


def settings_of(method: StudentMethod) -> dict[str, Any]:
    """The keys of a recipe that stand for a student method.

    Raises:
        RecipeError: the method is of a class that no recipe names.
    """
    name = _NAMES.get(type(method))
    if name is None:
        raise RecipeError(f"method {type(method).__name__}: no recipe names it; known are {', '.join(_NAMES.values())}")
    values = {field.name: getattr(method, field.name) for field in fields(method)}  # type: ignore[arg-type]
    kept = {key: value for key, value in values.items() if key in Recipe.model_fields and value is not None}
    return {"method": name} | kept


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
    if callable(found.get("student")):
        found["student"] = _by_name(found["student"])
    if isinstance(method := found.get("method"), StudentMethod):
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
    return tuple(_text(each) if isinstance(each, StudentMethod) else each for each in given)


def _text(method: StudentMethod) -> str:
    keys = settings_of(method)
    further = (field for field in fields(method) if field.name in ("init", "round_to"))  # type: ignore[arg-type]
    if said := [field.name for field in further if field.name in keys and keys[field.name] != field.default]:
        raise RecipeError(
            f"candidate {method}: '{said[0]}' is the same for all candidates; set it in the recipe itself"
        )
    words = [keys[key] for key in ("keep", "sparsity", "student") if key in keys]
    return " ".join(map(str, (keys["method"], *words, *keys.get("swap", ()))))


def _by_name(function: Callable[..., Any]) -> str:
    """A function as `module:function`, by which the processes of a run find it."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if module in (None, "__main__") or not name.isidentifier():
        raise RecipeError(
            f"student {name or type(function).__name__}: the processes of a run cannot import it; define it as a "
            "function of a module of its own"
        )
    return f"{module}:{name}"
