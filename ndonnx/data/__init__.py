"""Data sources: from what the user wrote (`calib.npz`, `images/`, `leaves`) to batches of named arrays."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from ndonnx.config.recipe import DataRecipe, InputRecipe
from ndonnx.data.inputs import refuse_scalars, settle
from ndonnx.data.preprocess import resolve
from ndonnx.data.source import DataSource
from ndonnx.data.sources.arrays import ArraySource
from ndonnx.data.sources.folder import FolderSource
from ndonnx.data.sources.function import FunctionSource
from ndonnx.data.sources.noise import NOISES, NoiseSource
from ndonnx.data.sources.parquet import ParquetSource
from ndonnx.data.specs import Batch, InputSpec, input_specs
from ndonnx.errors import DataError

__all__ = ["DATA_FREE", "Batch", "DataSource", "InputSpec", "input_specs", "is_made_up", "open_source"]

DATA_FREE = "leaves"
"""The source that `data_free` stands for."""

_FILES = {".npz": ArraySource, ".npy": ArraySource, ".parquet": ParquetSource}
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_KINDS = (
    "a .npz, .npy or .parquet file, a directory of images, module:function, "
    f"or made-up samples: {', '.join(NOISES)} (or {DATA_FREE}:N for N of them)"
)


def is_made_up(spec: str) -> bool:
    """Whether a source is made-up samples, as `gaussian` or `leaves:500`."""
    return spec.partition(":")[0] in NOISES


def open_source(
    spec: str,
    inputs: Sequence[InputSpec],
    recipe: DataRecipe,
    *,
    seed: int = 0,
    graph: ir.Graph | None = None,
    settings: Mapping[str, InputRecipe] | None = None,
    fixed: Mapping[str, NDArray[Any]] | None = None,
) -> DataSource:
    """Open a source for a model with these inputs; what can be checked without reading it all is.

    Inputs that have one value for all samples are `fixed` in the source: those that `settings`, the recipe's
    `[inputs]`, give one, and those of which the source holds one value.

    `module:function` runs the user's own code: pass it on only where the user asked for it.
    `fixed` are inputs whose one value is known already; the source need not hold it. `seed` and `graph`, the
    model's, are for made-up samples: the graph tells which whole numbers an input can take.

    Raises:
        DataError: the source is missing, corrupt, of an unknown kind, or does not fit the model.
    """
    if not spec:
        raise DataError(f"the data source is empty; expected {_KINDS}")
    settled, given = settle(inputs, settings or {})
    settled = [entry for entry in settled if entry.name not in (fixed or {})]
    if not settled:
        raise DataError(f"{spec}: every input of the model has one value for all samples, so that there are none")
    source = _opened(spec, resolve(settled, recipe), recipe, seed, graph)
    source.fixed |= given | dict(fixed or {})
    return source


def _opened(
    spec: str, inputs: Sequence[InputSpec], recipe: DataRecipe, seed: int, graph: ir.Graph | None
) -> DataSource:
    name = spec.partition(":")[0]
    path = Path(spec)
    if name in NOISES:
        if spec == name and path.exists():
            raise DataError(f"{spec!r}: made-up samples or the path here? write {spec}:20000 or .{os.sep}{spec}")
        refuse_scalars(inputs)
        return NoiseSource(spec, inputs, recipe, seed, graph)
    try:
        is_directory, size = path.is_dir(), path.stat().st_size if path.is_file() else None
    except (OSError, ValueError) as error:
        raise DataError(f"{spec!r}: cannot be read: {error}") from error
    if is_directory:
        refuse_scalars(inputs)
        return FolderSource(spec, inputs, recipe)
    if size is None and _FUNCTION.fullmatch(spec):
        return FunctionSource(spec, inputs, recipe)
    if path.suffix.lower() not in _FILES:
        raise DataError(f"{spec!r}: unknown kind of data source; expected {_KINDS}")
    if size is None:
        raise DataError(f"{spec}: no such file")
    if size == 0:
        raise DataError(f"{spec}: the file is empty (0 bytes)")
    if path.suffix.lower() == ".parquet":
        refuse_scalars(inputs)
    return _FILES[path.suffix.lower()](spec, inputs, recipe)
