"""What a run starts from: the teacher, the data, the partition, all checked before any work is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from ndonnx.data import DATA_FREE, DataSource, input_specs, open_source
from ndonnx.data.source import RowSource
from ndonnx.errors import DataError, ModelError
from ndonnx.graph import load
from ndonnx.graph.load import check_writable
from ndonnx.graph.working_copy import working_copy
from ndonnx.partition import Partition, partition
from ndonnx.pipeline.batches import count_samples
from ndonnx.recipe import Recipe
from ndonnx.teacher import make_session
from ndonnx.teacher.balance import POOL, balanced


@dataclass(frozen=True)
class Given:
    """What a run starts from."""

    path: Path
    teacher: ir.Model
    source: DataSource
    judge: DataSource
    """Data of the final comparison."""
    samples: int
    further: Callable[[int], DataSource] | None
    """Makes so many samples up that are not in `source`; None where the data are given."""


def open_all(model: Path, output: str | Path | None, data: str | None, eval_data: str | None, recipe: Recipe) -> Given:
    """Open everything that may be missing or damaged.

    Raises:
        UsageError: something is; or the output is the teacher itself.
    """
    if output is not None:
        check_writable(output)
        if Path(output).exists() and model.exists() and Path(output).samefile(model):
            raise ModelError(f"{output}: is the teacher itself, which is never modified; choose another output")
    teacher = load(model)
    specs = input_specs(make_session(model))

    def source_of(spec: str, seed: int = recipe.seed) -> DataSource:
        return open_source(spec, specs, recipe.data, seed=seed, graph=teacher.graph)

    def further(count: int) -> DataSource:
        return _made_up(lambda spec: source_of(spec, recipe.seed + _OTHER_SEED), teacher, count)

    if data is None and not recipe.data_free and recipe.inputs != "noise":
        raise DataError("no data: give a data source, or set data_free to make inputs up")
    source = source_of(data) if data is not None else _made_up(source_of, teacher, recipe.samples)
    judge = source_of(eval_data) if eval_data is not None else source
    samples = count_samples(source, recipe.samples)
    return Given(model, teacher, source, judge, samples, further if data is None else None)


_OTHER_SEED = 2**31
"""Beyond all seeds of recipes."""


def _made_up(source_of: Callable[[str], DataSource], teacher: ir.Model, samples: int) -> DataSource:
    """Samples that nobody collected, as many as are wanted, of all that the teacher can tell apart."""
    pool = source_of(f"{DATA_FREE}:{POOL * samples}")
    # One thread: another last bit could choose other samples, and nothing of an earlier run would be found again.
    return balanced(pool, teacher, samples, threads=1) if isinstance(pool, RowSource) else pool


def partition_model(teacher: ir.Model, recipe: Recipe) -> Partition:
    """Partition a loaded teacher as a recipe says; the teacher is not changed."""
    working = working_copy(teacher)
    return partition(working, granularity=recipe.granularity, cut=recipe.cut, freeze=recipe.freeze)
