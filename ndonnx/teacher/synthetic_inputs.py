"""Sizes and values that a model takes where nobody tells them: found by running it on made-up inputs."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from ndonnx.config.recipe import InputRecipe, Recipe
from ndonnx.data import Data, InputSpec, input_specs, is_made_up
from ndonnx.data.inputs import interface_of, settle
from ndonnx.data.preprocess import IMAGE_CHANNELS, IMAGE_RANK, layout_of, resolve
from ndonnx.data.synthetic import made_up_samples, scalars_for
from ndonnx.errors import DataError, first_line
from ndonnx.graph.costs import constant_of
from ndonnx.teacher.sessions import OrtError

Sizes = Mapping[str, int]
"""Open sizes by their names; one without a name is called by its input and axis."""

_PLANES = (224, 32, 48, 64, 128, 256, 320, 512, 640, 96, 28, 299, 16, 1024)
"""Heights and widths that are tried, both alike."""
_STRIPS = ((48, 320), (32, 320), (32, 128), (32, 100), (64, 256), (48, 192))
"""Heights and widths of lines of text."""
_LENGTHS = (16, 128, 512, 64, 256, 32, 1, 8, 1024, 2, 4, 100, 576, 1536, 16000)
"""Other sizes that are tried, all alike."""
_FEW_LENGTHS = (16, 1, 2, 8, 64, 128)
"""Sizes that are tried in all combinations."""
_MOST_TRIES = 150
_MOST_VALUES = 2**26
"""Values in one made-up input; more is not tried."""
_NAME = re.compile(r"[A-Za-z_][\w.]*")


def settings_for(
    data: Data | None, session: ort.InferenceSession, graph: ir.Graph, recipe: Recipe
) -> dict[str, InputRecipe]:
    """What the model's inputs are, with the sizes and values of made-up ones where the data are made up.

    Args:
        data: a data source; None: made up.
        session: of the model as its file has it.
        graph: the same model's.
        recipe: `[inputs]`, `[data]` and the seed.

    Raises:
        DataError: no sizes or values were found on which the model runs.
    """
    made_up = data is None or (is_made_up(data) and (":" in str(data) or not Path(str(data)).exists()))
    return complete_settings(session, graph, recipe) if made_up else dict(recipe.model_inputs)


def complete_settings(session: ort.InferenceSession, graph: ir.Graph, recipe: Recipe) -> dict[str, InputRecipe]:
    """What the model's inputs are, for made-up ones: what the recipe says, and what is found by trying.

    Args:
        session: of the model as its file has it.
        graph: the same model's, which tells ranges and channels.
        recipe: `[inputs]`, `[data]` and the seed.

    Returns:
        `[inputs]` with a shape for every input that the model leaves open, and a value for each that has no samples.

    Raises:
        DataError: no sizes or values were found on which the model runs.
    """
    inputs, fixed = settle(input_specs(session), recipe.model_inputs)
    inputs = list(resolve(inputs, recipe.data))
    alone = _without_samples(inputs)
    sampled = [spec for spec in inputs if spec not in alone]
    if not sampled:
        raise DataError("every input has one value for all samples, so that no samples can be made up")
    trial = _Trial(session, graph, recipe, sampled, fixed)
    values = {value.name: value for value in graph.inputs}
    choices = [[(spec.name, array) for array in scalars_for(spec, values.get(spec.name))] for spec in alone]
    tries = itertools.product(itertools.product(*choices), trial.sizes())
    reason = ""
    for scalars, sizes in itertools.islice(tries, _MOST_TRIES):
        told = trial.run(dict(scalars), sizes)
        if told is None:
            return trial.settings(dict(scalars), sizes)
        reason = reason or told
    raise DataError(f"no inputs could be made up on which the model runs ({reason}); give data, or --shape and --input")


def _without_samples(inputs: Sequence[InputSpec]) -> list[InputSpec]:
    """Inputs without axes, and those of a fixed shape beside others whose batch is open."""
    open_ = any(spec.shape and not isinstance(spec.shape[0], int) for spec in inputs)
    fixed = (spec for spec in inputs if not spec.sampled and all(isinstance(size, int) for size in spec.shape))
    return [spec for spec in fixed if not spec.shape or open_]


@dataclass(frozen=True)
class _Trial:
    """Runs a model on one made-up sample."""

    session: ort.InferenceSession
    graph: ir.Graph
    recipe: Recipe
    inputs: Sequence[InputSpec]
    fixed: Mapping[str, NDArray[Any]]

    @property
    def open(self) -> dict[str, list[tuple[InputSpec, int]]]:
        """Where each open size stands: inputs and axes, samples first."""
        found: dict[str, list[tuple[InputSpec, int]]] = {}
        for spec in self.inputs:
            for axis, size in enumerate(spec.shape[1:], start=1):
                if not isinstance(size, int) and spec.sizes is None:
                    found.setdefault(_key(spec, axis), []).append((spec, axis))
        return found

    def sizes(self) -> Iterator[Sizes]:
        """Sizes to try, likely ones first."""
        open_ = self.open
        sums = [key for key in open_ if not _NAME.fullmatch(key.partition("/")[0]) or "total" in key.lower()]
        channels, planes = self._axes_of_images(open_)
        lengths = [key for key in open_ if key not in {*channels, *planes, *sums}]
        images, others = list(self._planes(planes)), list(self._lengths(lengths))
        for number in range(max(len(images), len(others), 1)):
            image = images[number] if number < len(images) else dict.fromkeys(planes, _PLANES[0])
            other = others[number] if number < len(others) else dict.fromkeys(lengths, _LENGTHS[0])
            found = channels | image | other
            yield found | {key: _sum(key, found) for key in sums}

    def _planes(self, keys: Sequence[str]) -> Iterator[dict[str, int]]:
        yield from (dict.fromkeys(keys, size) for size in _PLANES if keys)
        if len(keys) == 2:
            yield from (dict(zip(keys, strip, strict=True)) for strip in _STRIPS)

    def _lengths(self, keys: Sequence[str]) -> Iterator[dict[str, int]]:
        yield from (dict.fromkeys(keys, size) for size in _LENGTHS if keys)
        if 1 < len(keys) <= 3:
            yield from (
                dict(zip(keys, sizes, strict=True)) for sizes in itertools.product(_FEW_LENGTHS, repeat=len(keys))
            )

    def _axes_of_images(self, open_: Mapping[str, Sequence[tuple[InputSpec, int]]]) -> tuple[dict[str, int], list[str]]:
        """The channels of images by the name of their size, and the names of heights and widths."""
        channels: dict[str, int] = {}
        planes = []
        values = {value.name: value for value in self.graph.inputs}
        for key, places in open_.items():
            spec, axis = places[0]
            if not spec.is_float or len(spec.shape) != IMAGE_RANK:
                continue
            last = layout_of(spec, self.recipe.data) == "NHWC"
            if axis == (3 if last else 1):
                channels[key] = _channels(values.get(spec.name)) or IMAGE_CHANNELS[-1]
            else:
                planes.append(key)
        return channels, planes

    def run(self, scalars: Mapping[str, NDArray[Any]], sizes: Sizes) -> str | None:
        """Why the model does not run on such inputs; None where it does."""
        inputs = [self._bound(spec, sizes) for spec in self.inputs]
        large = next((spec for spec in inputs if _count(spec) > _MOST_VALUES), None)
        if large is not None:
            return f"'{large.name}' of {list(large.sizes or large.shape)} is too large to be made up"
        arrays = made_up_samples(inputs, self.graph, self.recipe.data, 1, seed=self.recipe.seed)
        try:
            self.session.run(None, interface_of(inputs, {**self.fixed, **scalars}).feeds(_whole(inputs, arrays)))
        except OrtError as error:
            return first_line(error)
        return None

    def settings(self, scalars: Mapping[str, NDArray[Any]], sizes: Sizes) -> dict[str, InputRecipe]:
        """`[inputs]` with what was found."""
        found = dict(self.recipe.model_inputs)
        for name, array in scalars.items():
            found[name] = found.get(name, InputRecipe()).model_copy(update={"value": array.tolist()})
        for spec in self.inputs:
            bound = self._bound(spec, sizes)
            if bound.sizes is not None and spec.sizes is None:
                first, *rest = bound.sizes
                native = (*rest[: spec.axis], first, *rest[spec.axis :])
                found[spec.name] = found.get(spec.name, InputRecipe()).model_copy(update={"shape": native})
        return found

    def _bound(self, spec: InputSpec, sizes: Sizes) -> InputSpec:
        if spec.sizes is not None or all(isinstance(size, int) for size in spec.shape[1:]):
            return spec
        rest = (
            size if isinstance(size, int) else sizes[_key(spec, axis + 1)] for axis, size in enumerate(spec.shape[1:])
        )
        first = spec.shape[0]
        return replace(spec, sizes=(first if isinstance(first, int) else 1, *rest))


def _count(spec: InputSpec) -> int:
    """Numbers that an input holds in one run, as far as its sizes are known."""
    rest = spec.shape[1:] if spec.sizes is None else spec.sizes[1:]
    return math.prod(size for size in (*spec.shape[:1], *rest) if isinstance(size, int))


def _whole(inputs: Sequence[InputSpec], arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """One sample as a batch of the size that the model fixes."""
    batch = next((size for spec in inputs if isinstance(size := spec.shape[0], int)), 1)
    return {name: np.repeat(array, batch, axis=0) for name, array in arrays.items()}


def _key(spec: InputSpec, axis: int) -> str:
    size = spec.shape[axis]
    named = isinstance(size, str) and any(letter.isalnum() for letter in size)
    return str(size) if named else f"{spec.name}/{axis}"


def _sum(key: str, sizes: Sizes) -> int:
    """What a size comes to that is written as a sum of others, or that its name says is their total."""
    names = _NAME.findall(key)
    if _NAME.fullmatch(key):  # `total_sequence_length`: what is past and what is new
        names = [name for name in sizes if "past" in name.lower() or "seq" in name.lower()]
    numbers = [int(number) for number in re.findall(r"(?<![\w.])\d+", key)]
    return sum(sizes.get(name, 0) for name in names) + sum(numbers) or _LENGTHS[0]


def _channels(value: ir.Value | None) -> int | None:
    """Channels that the first convolution reads; None where something else does."""
    for node, slot in value.uses() if value is not None else ():
        weight = constant_of(node.inputs[1]) if node.op_type == "Conv" and slot == 0 else None
        if weight is not None:
            group = node.attributes["group"].as_int() if "group" in node.attributes else 1
            return int(weight.shape.numpy()[1]) * group
    return None
