"""What several models are timed on where there are data: samples of theirs, at the batch that the models prescribe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ndonnx.config.recipe import InputRecipe
from ndonnx.data import DataSource, input_specs
from ndonnx.data.inputs import interface_of, settle
from ndonnx.errors import DataError
from ndonnx.metrics.latency.feeds import Feeds, common_batch_size
from ndonnx.metrics.latency.measure import Plan
from ndonnx.teacher.sessions import make_session


def plan_for(
    models: Mapping[str, Path], source: DataSource, settings: Mapping[str, InputRecipe], plan: Plan
) -> tuple[Plan, Feeds]:
    """The plan with the way in which these models are fed, and one batch to run them on.

    Args:
        models: files by name; all have the same inputs.
        source: where the samples come from.
        settings: `[inputs]` of the recipe, by name of the input.
        plan: where a model fixes its batch, its sizes give way to that one.

    Raises:
        ModelError: the models prescribe different batch sizes, or one cannot be opened.
        DataError: there is no sample.
    """
    plan = replace(plan, interface=interface_of(source.inputs, source.fixed))
    specs = {name: settle(input_specs(make_session(path)), settings)[0] for name, path in models.items()}
    sampled = {name: [spec for spec in entry if spec.name not in source.fixed] for name, entry in specs.items()}
    size = common_batch_size(sampled) or plan.interface.batch
    if size is not None:
        plan = replace(plan, batch_sizes=(size,))
    most = max(plan.batch_sizes)
    batch = next(iter(source.batches(most, samples=most)), None)
    if batch is None or not len(batch):
        raise DataError(f"{source.spec}: expected samples to run on, found none")
    return plan, batch.inputs
