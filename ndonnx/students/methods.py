"""From a recipe to a student method."""

from __future__ import annotations

from collections.abc import Callable

from ndonnx.config.recipe import Recipe
from ndonnx.errors import RecipeError
from ndonnx.students.activation import ActivationSwap
from ndonnx.students.base import StudentMethod
from ndonnx.students.custom import Custom
from ndonnx.students.lowrank import LowRank
from ndonnx.students.removal import Removal
from ndonnx.students.sparsity import Sparsity
from ndonnx.students.width import Width

_METHODS: dict[str, Callable[[Recipe], StudentMethod]] = {
    "width": lambda recipe: Width(recipe.keep, recipe.round_to, recipe.init),
    "sparsity": lambda recipe: Sparsity(recipe.sparsity, recipe.init),
    "lowrank": lambda recipe: LowRank(recipe.keep, recipe.init, recipe.round_to),
    "activation": lambda recipe: ActivationSwap(recipe.swap, recipe.init),
    "removal": lambda recipe: Removal(recipe.init),
    "custom": lambda recipe: Custom.of(recipe.student, recipe.init),
}
"""Student methods by their name in a recipe."""


def method_of(recipe: Recipe) -> StudentMethod:
    """The student method that a recipe asks for.

    Raises:
        RecipeError: the method, a swap or a custom student is not known.
    """
    check_method(recipe)
    return _METHODS[recipe.method](recipe)


def check_method(recipe: Recipe) -> None:
    """Refuse a recipe whose student method is not known, before anything is computed.

    Raises:
        RecipeError: the method is not known.
    """
    if recipe.method not in _METHODS:
        *others, last = (repr(name) for name in _METHODS)
        raise RecipeError(f"recipe: 'method' = {recipe.method!r}: Input should be {', '.join(others)} or {last}")
