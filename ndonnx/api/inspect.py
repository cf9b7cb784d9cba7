"""`inspect`: how a model partitions, and what of it can go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from ndonnx.config.recipe import Recipe
from ndonnx.data.inputs import interface_of, settle
from ndonnx.data.specs import declared_specs
from ndonnx.graph import load
from ndonnx.graph.bound import one_sample
from ndonnx.graph.interface import Interface
from ndonnx.graph.passes.branches import open_branches
from ndonnx.graph.working_copy import working_copy
from ndonnx.partition import Partition, partition
from ndonnx.report.inspection import Inspection
from ndonnx.runtime.progress import Progress
from ndonnx.students.registry import operators_around


def partition_model(model: str | Path, recipe: Recipe | None = None) -> Partition:
    """The neighbourhoods of a model, in order, with what each holds and why it would be kept.

    Raises:
        UsageError: the model cannot be read, or the recipe names values that it does not have.
    """
    recipe = recipe or Recipe()
    teacher = load(model)
    inputs, fixed = settle(declared_specs(teacher.graph), recipe.model_inputs)
    bound = {spec.name: spec.sizes for spec in inputs if spec.sizes is not None}
    return _partitioned(teacher, recipe, interface_of(inputs, fixed), bound)


def _partitioned(
    teacher: ir.Model, recipe: Recipe, interface: Interface, shapes: Mapping[str, Sequence[int]]
) -> Partition:
    """The neighbourhoods of a loaded model, with MACs told for these shapes of its inputs, samples first."""
    working = working_copy(open_branches(teacher, interface.fixed), interface)
    parts = partition(
        working,
        granularity=recipe.granularity,
        cut=recipe.cut,
        freeze=recipe.freeze,
        around=operators_around([recipe.method]),
    )
    return replace(parts, stated=one_sample(working, shapes, interface)) if shapes else parts


def inspect(
    model: str | Path,
    recipe: Recipe | None = None,
    *,
    check: bool = False,
    data: str | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """The partition of a model as plain data: numbers and names, a JSON document, a drawing.

    Args:
        model: path of the model.
        recipe: how it is partitioned, and what `check` shrinks by.
        check: also take every neighbourhood through the gates that a distillation has before it trains;
            one that does not pass is kept, and its reason names the operator.
        data: source of the few samples that `check` runs on. None: made up.
        progress: told what `check` does.

    Raises:
        UsageError: as `partition_model`; with `check`, the data do not fit the model.
    """
    if not check:
        return Inspection.of(str(model), partition_model(model, recipe), recipe=recipe)

    from ndonnx.metrics.check import check as pass_gates  # noqa: PLC0415 - needs torch
    from ndonnx.metrics.check import few_samples  # noqa: PLC0415

    recipe, teacher = recipe or Recipe(), load(model)
    given = few_samples(Path(model), teacher.graph, recipe, data)
    parts = _partitioned(teacher, recipe, given.interface, {name: a.shape for name, a in given.arrays.items()})
    checked = pass_gates(Path(model), parts, recipe, data=data, progress=progress, given=given)
    return Inspection.of(str(model), checked.parts, checked.parity, recipe)
