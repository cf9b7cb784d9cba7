"""The `[inputs.NAME]` tables of a recipe, and the flags `--input` and `--shape` that say the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field, model_validator

from ndonnx.config.setting import Section
from ndonnx.config.values import Sizes, Value
from ndonnx.errors import RecipeError


class InputRecipe(Section):
    """What one input of the model is, where neither the model nor the data tell: `[inputs.NAME]` in a recipe."""

    value: Value | None = None
    """Value that the input has for all samples, such as a sampling rate: a number, or a list of them. The students are
    made for it; the input stays an input of theirs. Default: the data hold the input's values."""
    axis: int | None = Field(None, ge=0)
    """Axis of the input along which the samples lie, counted from 0. Default: read off the shapes of all inputs,
    mostly the first."""
    shape: Sizes | None = None
    """Sizes of all axes of the input, the samples' among them, for synthetic inputs, costs and timings. Default: as
    the model says."""
    min: float | None = None
    """Smallest value of synthetic inputs."""
    max: float | None = None
    """Largest value of synthetic inputs."""

    @model_validator(mode="after")
    def _agrees(self) -> InputRecipe:
        if self.value is not None and self.axis is not None:
            raise ValueError("has one value for all samples and an axis along which they lie; give one of the two")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}")
        return self


def parse_inputs(settings: Sequence[str], shapes: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """What `--input NAME=VALUE`, `--input NAME:axis=1` and `--shape NAME=1,3,48,320` say, as `[inputs]` in a recipe.

    Raises:
        RecipeError: a text has no name or no `=`.
    """
    found: dict[str, dict[str, Any]] = {}
    for flag, texts in (("--input", settings), ("--shape", shapes)):
        for text in texts:
            name, equals, value = text.rpartition("=")
            key = "value" if flag == "--input" else "shape"
            stem, _, suffix = name.rpartition(":")
            if flag == "--input" and stem and suffix in ("axis", "min", "max"):
                name, key = stem, suffix
            if not equals or not name:
                example = "NAME=VALUE or NAME:axis=1" if flag == "--input" else "NAME=1,3,48,320"
                raise RecipeError(f"{flag} {text}: expected {example}")
            found.setdefault(name, {})[key] = value
    return found
