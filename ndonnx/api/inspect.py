"""`inspect`: how a model partitions, and what of it can go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from ndonnx.api.models import Model, Placed, placed
from ndonnx.api.settings import RecipeLike, recipe_of
from ndonnx.config.recipe import Recipe
from ndonnx.data import Data
from ndonnx.data.inputs import interface_of, settle
from ndonnx.data.specs import declared_specs
from ndonnx.graph import load
from ndonnx.graph.bound import one_sample
from ndonnx.graph.dataflow import draws_random
from ndonnx.graph.interface import Interface
from ndonnx.graph.passes.branches import open_branches
from ndonnx.graph.passes.simplification.simplify import simplify
from ndonnx.graph.working_copy import working_copy
from ndonnx.metrics.looks import DataLook
from ndonnx.partition import Partition, partition
from ndonnx.report.inspection import Inspection
from ndonnx.runtime.progress import Listener, Progress, listening
from ndonnx.students.registry import operators_around


def partition_model(model: Model, recipe: RecipeLike | None = None, **settings: Any) -> Partition:
    """Find the neighbourhoods of a model, in order, with what each holds and why it would be kept.

    Args:
        model: path, `onnx.ModelProto` or `onnx_ir.Model`.
        recipe: how it is partitioned, as a `Recipe`, its keys in a mapping, or the path of a TOML file.
        settings: keys of the recipe, laid over it, as `keep=0.5`.

    Raises:
        UsageError: the model cannot be read, or the recipe names values that it does not have.
    """
    chosen = recipe_of(recipe, settings)
    with placed(model) as place:
        teacher = load(place.path)
        inputs, fixed = settle(declared_specs(teacher.graph), chosen.model_inputs)
        bound = {spec.name: spec.sizes for spec in inputs if spec.sizes is not None}
        return _partitioned(teacher, chosen, interface_of(inputs, fixed), bound)


def _partitioned(
    teacher: ir.Model, recipe: Recipe, interface: Interface, shapes: Mapping[str, Sequence[int]]
) -> Partition:
    """The neighbourhoods of a loaded model, with MACs told for these shapes of its inputs, samples first."""
    opened = open_branches(teacher, interface.fixed)
    if recipe.simplifies and not draws_random(opened.graph):
        opened = simplify(opened, [*recipe.cut, *recipe.freeze])
    working = working_copy(opened, interface)
    parts = partition(
        working,
        granularity=recipe.granularity,
        cut=recipe.cut,
        freeze=recipe.freeze,
        around=operators_around([recipe.method]),
    )
    return replace(parts, stated=one_sample(working, shapes, interface)) if shapes else parts


def inspect(
    model: Model,
    recipe: RecipeLike | None = None,
    *,
    check: bool = False,
    data: Data | None = None,
    progress: Listener | None = None,
    **settings: Any,
) -> Inspection:
    """Tell the partition of a model as plain data: numbers and names, a JSON document, a drawing.

    Args:
        model: path, `onnx.ModelProto` or `onnx_ir.Model`.
        recipe: how it is partitioned, and what `check` shrinks by, as a `Recipe`, its keys in a mapping, or the path of
            a TOML file.
        check: also take every neighbourhood through the gates that a distillation has before it trains;
            one that does not pass is kept, and its reason names the operator.
        data: data whose first samples are looked at, with the model's answers to them, and which `check` runs on, as
            `compress` takes them; how long that would take is told too, by timing a few gradients. None: nothing is
            looked at, and `check` makes samples up.
        progress: who is told what goes on, as a `Progress` or a callable that takes an `Event`. None: the logger
            `ndonnx`.
        settings: keys of the recipe, laid over it, as `keep=0.5`.

    Raises:
        UsageError: the model cannot be read, or the recipe names values that it does not have; with `check`, the data
            do not fit the model.
    """
    chosen = recipe_of(recipe, settings)
    with placed(model) as place:
        found = (
            _checked(place, chosen, data, listening(progress))
            if check
            else Inspection.of(place.name, partition_model(place.path, chosen), recipe=chosen)
        )
        return found if data is None else replace(found, data=_looked_at(place, chosen, data))


def _looked_at(place: Placed, recipe: Recipe, data: Data) -> DataLook:
    from ndonnx.metrics.first_look import look  # noqa: PLC0415 - needs torch

    return look(place.path, load(place.path), recipe, data, partition_model(place.path, recipe))


def _checked(place: Placed, recipe: Recipe, data: Data | None, progress: Progress) -> Inspection:
    from ndonnx.metrics.check import check as pass_gates  # noqa: PLC0415 - needs torch
    from ndonnx.metrics.check import few_samples  # noqa: PLC0415

    teacher = load(place.path)
    given = few_samples(place.path, teacher.graph, recipe, data)
    parts = _partitioned(teacher, recipe, given.interface, {name: a.shape for name, a in given.arrays.items()})
    checked = pass_gates(place.path, parts, recipe, data=data, progress=progress, given=given)
    return Inspection.of(place.name, checked.parts, checked.parity, recipe)
