"""Shapes in numbers: those of a model's values when each of its inputs has one stated shape.

Sizes that a file leaves open are bound by the inputs: a name stands for the same size everywhere. Where a graph
computes a size (what a stride leaves of an open height), ONNX's inference is run again on the bound inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import onnx_ir as ir

from ndonnx.graph.costs import constant_of
from ndonnx.graph.dataflow import real_inputs
from ndonnx.graph.interface import WHOLE, Interface, sample_axis
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.graph.shapes.sizes import factors
from ndonnx.graph.shapes.symbolic import resolve_shapes
from ndonnx.runtime.gc_pause import gc_paused

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class BoundShapes:
    """The shapes of a model's values in numbers, as far as the stated shapes of its inputs tell them."""

    model: ir.Model
    inputs: Mapping[str, Shape] | None
    """Shape of each input that all others follow from; None where an input has a size that nothing states."""
    open: tuple[str, ...] = ()
    """Sizes that nothing states, as `x[2] (height)`."""
    _names: Mapping[str, int] = field(default_factory=dict)
    """What named sizes are."""

    @property
    def samples(self) -> int:
        """Samples in one run: the size of the samples' axis where all inputs have the same, else 1."""
        places = {value.name: sample_axis(value) for value in real_inputs(self.model.graph)}
        shapes = ((shape, places.get(name, 0)) for name, shape in (self.inputs or {}).items())
        counts = {shape[axis] for shape, axis in shapes if 0 <= axis < len(shape)}
        return max(1, counts.pop()) if len(counts) == 1 else 1

    def of(self, value: ir.Value | None) -> Shape | None:
        """The shape of a value of this model; None where it does not follow."""
        if value is None:
            return None
        plain = self._as_written(value)
        if plain is not None or self.inputs is None:
            return plain
        return self._inferred.get(value.name or "")

    def _as_written(self, value: ir.Value) -> Shape | None:
        if value.shape is None:
            tensor = constant_of(value)
            return None if tensor is None else tuple(int(size) for size in tensor.shape.numpy())
        sizes = [self.size(size) for size in value.shape]
        return None if None in sizes else tuple(size for size in sizes if size is not None)

    def size(self, size: int | ir.SymbolicDim) -> int | None:
        """A size in numbers; None where it does not follow from the names that are bound."""
        if isinstance(size, int):
            return size if size >= 0 else None  # some exporters write -1 for a size that is open
        if not is_named(size):
            return None
        number, names = factors(size.value or "")
        for name, power in names.items():
            if name not in self._names:
                return None
            number *= self._names[name] ** power
        return number

    @cached_property
    def _inferred(self) -> dict[str, Shape]:
        """What inference finds from the bound inputs alone: sizes that the file states may be names of anything."""
        assert self.inputs is not None
        with gc_paused():
            copy = self.model.clone()
            for graph in copy.graphs():
                for node in graph:
                    for value in node.outputs:
                        if value.shape is not None and not value.shape.is_static():
                            value.shape = None
            for value in real_inputs(copy.graph):
                value.shape = ir.Shape(self.inputs[value.name or ""])
            resolve_shapes(infer_shapes(copy))
            values = (value for graph in copy.graphs() for node in graph for value in node.outputs)
            shapes = ((value.name or "", value.shape) for value in values if value.shape is not None)
            return {name: shape.numpy() for name, shape in shapes if shape.is_static()}


def bind(model: ir.Model, inputs: Mapping[str, Sequence[int]] | None = None) -> BoundShapes:
    """Shapes of a model's values for stated shapes of its inputs.

    Args:
        model: with shapes inferred; not changed, and not to be changed while the result is used.
        inputs: shape of each input, the samples included. An input that is not named has the sizes that the file
            states, and one sample where their number is open; nothing else is guessed.
    """
    graph_inputs = real_inputs(model.graph)
    names = _one_sample(graph_inputs) | _read_off(graph_inputs, inputs or {})
    known = BoundShapes(model, None, (), names)
    shapes, left = {}, []
    for value in graph_inputs:
        shape = (inputs or {}).get(value.name or "")
        found = tuple(map(int, shape)) if shape is not None else known.of(value) or _one_where_open(value, known)
        if found is None:
            left += _open_sizes(value, known)
        else:
            shapes[value.name or ""] = found
    return BoundShapes(model, None if left else shapes, tuple(left), names)


def one_sample(
    model: ir.Model, arrays: Mapping[str, Sequence[int]], interface: Interface | None = None
) -> dict[str, Shape]:
    """The shape of each input for one sample of data: sizes that the model fixes are its own, the rest the data's.

    Args:
        model: whose inputs they are.
        arrays: shapes of the inputs' arrays in the data, samples along the first axis.
        interface: how the model is fed. None: with arrays as they are.
    """
    interface = interface or Interface()
    found = {}
    for value in real_inputs(model.graph):
        name = value.name or ""
        if name in interface.fixed:
            found[name] = interface.fixed[name].shape
        elif name in arrays and value.shape is not None:
            once = _with_samples_at(interface.axes.get(name, 0), arrays[name][1:])
            if len(once) == len(value.shape):
                sizes = zip(value.shape, once, strict=True)
                found[name] = tuple(own if isinstance(own, int) and own > 0 else now for own, now in sizes)
    return found


def _with_samples_at(axis: int, rest: Sequence[int]) -> list[int]:
    """The shape of one sample in the model's own layout."""
    return list(rest) if axis == WHOLE else [*rest[:axis], 1, *rest[axis:]]


def _one_sample(inputs: Sequence[ir.Value]) -> dict[str, int]:
    """The names of the axes along which the samples lie."""
    places = ((value.shape, sample_axis(value)) for value in inputs if value.shape is not None)
    return {str(shape[axis]): 1 for shape, axis in places if 0 <= axis < len(shape) and is_named(shape[axis])}


def is_named(size: int | ir.SymbolicDim) -> bool:
    """Whether a size has a name that stands for the same size everywhere; `?` stands for any."""
    return isinstance(size, ir.SymbolicDim) and any(letter.isalnum() for letter in size.value or "")


def _read_off(inputs: Sequence[ir.Value], stated: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """What names stand for by the stated shapes; a name that would be two sizes at once stands for none."""
    found: dict[str, set[int]] = {}
    for value in inputs:
        shape = stated.get(value.name or "")
        if shape is not None and value.shape is not None and len(shape) == len(value.shape):
            for size, number in zip(value.shape, shape, strict=True):
                if is_named(size):
                    found.setdefault(str(size), set()).add(int(number))
    return {name: next(iter(sizes)) for name, sizes in found.items() if len(sizes) == 1}


def _one_where_open(value: ir.Value, known: BoundShapes) -> Shape | None:
    """The shape of an input of which the samples' axis alone is open, and has no name."""
    if value.shape is None:
        return None
    sizes = [
        1 if axis == sample_axis(value) and not is_named(size) and known.size(size) is None else known.size(size)
        for axis, size in enumerate(value.shape)
    ]
    return None if None in sizes else tuple(size for size in sizes if size is not None)


def _open_sizes(value: ir.Value, known: BoundShapes) -> list[str]:
    if value.shape is None:
        return [f"{value.name} (all of it)"]
    return [
        f"{value.name}[{axis}]" + (f" ({size})" if is_named(size) else "")
        for axis, size in enumerate(value.shape)
        if known.size(size) is None and (axis != sample_axis(value) or is_named(size))
    ]
