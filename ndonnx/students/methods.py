"""From a recipe to a student method."""

from __future__ import annotations

from ndonnx.config.recipe import Recipe
from ndonnx.students.activation import ActivationSwap
from ndonnx.students.base import StudentMethod
from ndonnx.students.custom import Custom
from ndonnx.students.lowrank import LowRank
from ndonnx.students.removal import Removal
from ndonnx.students.sparsity import Sparsity
from ndonnx.students.width import Width


def method_of(recipe: Recipe) -> StudentMethod:
    """The student method that a recipe asks for.

    Raises:
        RecipeError: a swap or a custom student is not known.
    """
    match recipe.method:
        case "width":
            return Width(recipe.keep, recipe.round_to, recipe.init)
        case "sparsity":
            return Sparsity(recipe.sparsity, recipe.init)
        case "lowrank":
            return LowRank(recipe.keep, recipe.init, recipe.round_to)
        case "activation":
            return ActivationSwap(recipe.swap, recipe.init)
        case "removal":
            return Removal(recipe.init)
        case "custom":
            return Custom.of(recipe.student, recipe.init)
        case _:
            raise NotImplementedError(recipe.method)
