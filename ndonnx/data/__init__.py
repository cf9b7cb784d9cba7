"""Data sources: from what the user gives (`calib.npz`, `images/`, an array, a loader) to batches of named arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from ndonnx.config.recipe import DataRecipe, InputRecipe
from ndonnx.data.inputs import settle
from ndonnx.data.preprocess import resolve
from ndonnx.data.registry import Data, Opening, as_given, open_kind, register_source
from ndonnx.data.source import DataSource
from ndonnx.data.sources.noise import is_name
from ndonnx.data.specs import Batch, InputSpec, input_specs
from ndonnx.errors import DataError

__all__ = [
    "DATA_FREE",
    "Batch",
    "Data",
    "DataSource",
    "InputSpec",
    "Opening",
    "input_specs",
    "is_made_up",
    "open_source",
    "register_source",
]

DATA_FREE = "leaves"
"""The source that `data_free` stands for."""


def is_made_up(data: object) -> bool:
    """Whether a source is made-up samples, as `gaussian` or `leaves:500`."""
    return is_name(as_given(data))


def open_source(
    data: Data,
    inputs: Sequence[InputSpec],
    recipe: DataRecipe,
    *,
    seed: int = 0,
    graph: ir.Graph | None = None,
    settings: Mapping[str, InputRecipe] | None = None,
    fixed: Mapping[str, NDArray[Any]] | None = None,
) -> DataSource:
    """Open a data source for a model; what can be checked without reading it all is.

    Inputs that have one value for all samples are `fixed` in the source: those that `settings` give one, and those of
    which the source holds one value. An iterable is read once, from its start to its end.

    Args:
        data: name or path of a source, arrays, or an iterable of samples or batches. `module:function` runs the
            user's own code: pass it on only where the user asked for it.
        inputs: inputs of the model, as it declares them.
        recipe: how a raw sample becomes a model input.
        seed: seed of made-up samples.
        graph: graph of the model, which tells what whole numbers a made-up input can take.
        settings: the recipe's `[inputs]`, by name of the input.
        fixed: inputs whose one value for all samples is known already, by name; the source need not hold them.

    Raises:
        DataError: the source is missing, corrupt, of an unknown kind, or does not fit the model.
    """
    settled, given = settle(inputs, settings or {})
    settled = [entry for entry in settled if entry.name not in (fixed or {})]
    opening = Opening(as_given(data), resolve(settled, recipe), recipe, seed, graph)
    if not settled:
        raise DataError(f"{opening.spec}: every input of the model has one value for all samples, so there are none")
    source = open_kind(opening)
    source.fixed |= given | dict(fixed or {})
    return source
