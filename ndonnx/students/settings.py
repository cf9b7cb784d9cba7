"""A student method as the recipe writes it: the inverse of `method_of`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ndonnx.config.recipe import Recipe
from ndonnx.errors import RecipeError
from ndonnx.students.activation import ActivationSwap
from ndonnx.students.base import StudentMethod
from ndonnx.students.custom import Custom
from ndonnx.students.lowrank import LowRank
from ndonnx.students.removal import Removal
from ndonnx.students.sparsity import Sparsity
from ndonnx.students.width import Width

_NAMES: Mapping[type[StudentMethod], str] = {
    Width: "width",
    Sparsity: "sparsity",
    LowRank: "lowrank",
    ActivationSwap: "activation",
    Removal: "removal",
    Custom: "custom",
}


def settings_of(method: object) -> dict[str, Any]:
    """The keys of a recipe that stand for a student method.

    Raises:
        RecipeError: it is no student method, or one of a class that no recipe names.
    """
    name = _NAMES.get(type(method))  # type: ignore[arg-type]
    if name is None:
        known = ", ".join(kind.__name__ for kind in _NAMES)
        raise RecipeError(f"method {type(method).__name__}: expected the name of a method, or one of {known}")
    values = {field.name: getattr(method, field.name) for field in fields(method)}  # type: ignore[arg-type]
    kept = {key: value for key, value in values.items() if key in Recipe.model_fields and value is not None}
    return {"method": name} | kept


def candidate_of(method: object) -> str:
    """A student method as a candidate of a search, in the recipe's words: `width 0.5`.

    Raises:
        RecipeError: it is no student method, or says something that the recipe says for all candidates.
    """
    keys = settings_of(method)
    common = (field for field in fields(method) if field.name in ("init", "round_to"))  # type: ignore[arg-type]
    if said := [field.name for field in common if field.name in keys and keys[field.name] != field.default]:
        raise RecipeError(
            f"candidate {method}: '{said[0]}' is the same for all candidates; set it in the recipe itself"
        )
    words = [keys[key] for key in ("keep", "sparsity", "student") if key in keys]
    return " ".join(map(str, (keys["method"], *words, *keys.get("swap", ()))))
