"""A student method as the recipe writes it: the inverse of `method_of`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ndonnx.config.declared import declared
from ndonnx.config.recipe import Recipe
from ndonnx.errors import RecipeError
from ndonnx.students.base import REGISTERED, StudentMethod

_COMMON = ("init", "round_to")
"""Settings that the recipe says for all candidates of a search."""


def settings_of(method: object) -> dict[str, Any]:
    """The keys of a recipe that stand for a student method.

    Raises:
        RecipeError: it is no student method, or one of a class that no recipe names.
    """
    if not isinstance(method, StudentMethod) or type(method) not in REGISTERED.values():
        raise RecipeError(
            f"method {type(method).__name__}: expected the name of a method, or a student method as ndonnx.Width(0.5)"
        )
    return {"method": method.name} | _values(method)


def candidate_of(method: object) -> str:
    """A student method as a candidate of a search, in the recipe's words: `width 0.5`.

    Raises:
        RecipeError: it is no student method, or says something that the recipe says for all candidates.
    """
    keys = settings_of(method)
    common = (field for field in fields(method) if field.name in _COMMON)  # type: ignore[arg-type]
    if said := [field.name for field in common if field.name in keys and keys[field.name] != field.default]:
        raise RecipeError(
            f"candidate {method}: '{said[0]}' is the same for all candidates; set it in the recipe itself"
        )
    words = [value for key, value in keys.items() if key not in _COMMON]
    return " ".join(str(word) for value in words for word in (value if isinstance(value, tuple) else (value,)))


def _values(method: StudentMethod) -> dict[str, Any]:
    """The fields of a method that are keys of a recipe, in their order; None stands for the recipe's own default."""
    values = {field.name: getattr(method, field.name) for field in fields(method)}  # type: ignore[arg-type]
    known = {*Recipe.model_fields, *declared()}
    return {key: value for key, value in values.items() if key in known and value is not None}
