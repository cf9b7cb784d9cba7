"""Where the samples lie in a value, and how a model is fed: one value for all samples, samples along any axis.

Everything that reads captured values (training, ranking, measuring) has the samples along the first axis. A model that
has them elsewhere, a state of shape (2, N, 32) or a sequence (T, N, C), is turned at its ends before it is run:
`samples_first` puts a `Transpose` there, and `samples_back` takes it off again, without a trace where nothing
between was changed. Which axis it is stands with each value of a working copy (`sample_axis`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ndonnx.graph.load import add_initializer
from ndonnx.graph.passes.branches import fix_inputs

WHOLE = -1
"""In place of an axis: the model runs one sample at a time, and the whole value is of that sample."""
NOWHERE = -2
"""In place of an axis: the samples cannot be told apart in the value, several lie along one axis with other things."""

_AXIS = "ndonnx.sample_axis"
"""Key of a value's metadata."""
_FEEDING = "ndonnx.feeding"
"""Key of a working copy's metadata."""
_INSIDE = "/ndonnx:inside"
"""Ending of the name that a value has inside a slice whose end it was turned at."""
_AXES_AS_INPUT = 13
"""Opset from which `Squeeze` and `Unsqueeze` read their axes from an input."""


def sample_axis(value: ir.Value) -> int:
    """Axis along which the samples lie in a value of a working copy; `WHOLE` or `NOWHERE` where there is none."""
    axis: int = value.meta.get(_AXIS, 0)
    return axis


def set_sample_axis(value: ir.Value, axis: int) -> None:
    """Note where the samples lie in a value."""
    if axis == 0:
        value.meta.pop(_AXIS, None)
    else:
        value.meta[_AXIS] = axis


def is_inside(value: ir.Value) -> bool:
    """Whether a value of a slice is what one of its ends was turned from."""
    return (value.name or "").endswith(_INSIDE)


def name_inside(value: ir.Value) -> str:
    """The name that a value of a slice has in the model that the slice was cut from."""
    return (value.name or "").removesuffix(_INSIDE)


@dataclass(frozen=True)
class Interface:
    """How a model is fed and what it answers, where that is more than arrays with the samples first."""

    fixed: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Inputs that have one value for all samples, by name."""
    axes: Mapping[str, int] = field(default_factory=dict)
    """Inputs and outputs whose samples do not lie along the first axis, see `sample_axis`."""
    batch: int | None = None
    """Samples that the model takes at a time, where its inputs or the graph's numbers fix them; None: any number."""

    @classmethod
    def of(cls, model: ir.Model) -> Interface:
        """What a working copy notes of its inputs and outputs."""
        ends = (*model.graph.inputs, *model.graph.outputs)
        axes = {value.name or "": axis for value in ends if (axis := sample_axis(value)) not in (0, NOWHERE)}
        noted: Interface = model.meta.get(_FEEDING, cls())
        return cls(noted.fixed, axes, noted.batch)

    @property
    def is_plain(self) -> bool:
        """Whether the model takes and gives nothing but arrays with the samples first."""
        return not self.fixed and not self.axes

    def feeds(self, batch: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """What the model itself is fed for a batch with the samples first: turned arrays, and the fixed values."""
        turned = {name: np.ascontiguousarray(_to_axis(array, self.axes.get(name, 0))) for name, array in batch.items()}
        return turned | dict(self.fixed)

    def applied(self, model: ir.Model) -> ir.Model:
        """A copy of a model with these inputs and outputs that takes and gives arrays with the samples first.

        Inputs with one value for all samples are no inputs of it. The model itself where there is nothing to change.
        """
        if self.is_plain:
            return model
        copy = fix_inputs(model.clone(), self.fixed)
        for value in (*copy.graph.inputs, *copy.graph.outputs):
            if (axis := self.axes.get(value.name or "")) is not None:
                set_sample_axis(value, axis)
        return samples_first(copy)


def note_feeding(model: ir.Model, interface: Interface) -> None:
    """Note in a working copy how the model that it was made of is fed."""
    model.meta[_FEEDING] = interface


def samples_first(model: ir.Model) -> ir.Model:
    """Turn inputs and outputs of a model so that the samples are along the first axis; in place, names stay.

    A value that is wholly of one sample gets a first axis of length 1. Returns the model.
    """
    graph = model.graph
    for position, value in enumerate(list(graph.inputs)):
        axis = sample_axis(value)
        if axis in (0, NOWHERE):
            continue
        name, old = value.name or "", value
        new = ir.Value(name=name, type=old.type, shape=_first(old.shape, axis))
        old.name = _free(graph, name + _INSIDE)
        node = _from_first(model, new, old.shape, axis)
        turned = node.outputs[0]
        old.replace_all_uses_with(turned, replace_graph_outputs=True)
        graph.inputs[position] = new
        turned.name, old.name = old.name, None
        turned.type, turned.shape = old.type, old.shape
        first = next(iter(graph), None)
        graph.append(node) if first is None else graph.insert_before(first, node)
        set_sample_axis(turned, axis)
    for position, value in enumerate(list(graph.outputs)):
        axis = sample_axis(value)
        if axis in (0, NOWHERE):
            continue
        name = value.name or ""
        value.name = _free(graph, name + _INSIDE)
        node = _to_first(model, value, value.shape, axis)
        graph.append(node)
        turned = node.outputs[0]
        turned.name, turned.type, turned.shape = name, value.type, _first(value.shape, axis)
        graph.outputs[position] = turned
    return model


def samples_back(model: ir.Model, axes: Mapping[str, int], shapes: Mapping[str, ir.Shape | None]) -> ir.Model:
    """Turn the ends of a slice back to where the samples lie in the model that it was cut from; in place.

    Nodes that undo each other go, so that a slice that nobody changed is what it was. Returns the model.

    Args:
        model: a slice with the samples first.
        axes: of its inputs and outputs, by name, where that is not the first.
        shapes: of the same values in the model, which tell the number of their axes.
    """
    graph = model.graph
    for position, value in enumerate(list(graph.inputs)):
        name = value.name or ""
        if name not in axes:
            continue
        axis, shape = axes[name], shapes[name]
        value.name = _free(graph, f"{name}/samples-first")
        native = ir.Value(name=name, type=value.type, shape=shape)
        node = _to_first(model, native, shape, axis)
        turned = node.outputs[0]
        value.replace_all_uses_with(turned, replace_graph_outputs=True)
        graph.inputs[position] = native
        turned.name, turned.type, turned.shape = value.name, value.type, _first(shape, axis)
        value.name = None
        first = next(iter(graph), None)
        graph.append(node) if first is None else graph.insert_before(first, node)
        _cancel(graph, node)
    for position, value in enumerate(list(graph.outputs)):
        name = value.name or ""
        if name not in axes:
            continue
        axis, shape = axes[name], shapes[name]
        value.name = _free(graph, f"{name}/samples-first")
        node = _from_first(model, value, shape, axis)
        graph.append(node)
        native = node.outputs[0]
        native.type, native.shape = value.type, shape
        graph.outputs[position] = native
        before = value.producer()
        if before is not None:
            _cancel(graph, before)
        graph.outputs[position].name = name
    return model


def _cancel(graph: ir.Graph, node: ir.Node) -> None:
    """Let what undoes a node at once read what the node reads; drop what is then read by nobody."""
    given = node.inputs[0]
    for user in list(node.outputs[0].consumers()):
        if given is not None and _undoes(user, node):
            user.outputs[0].replace_all_uses_with(given, replace_graph_outputs=True)
            graph.remove(user, safe=True)
    if not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
        graph.remove(node, safe=True)


def _undoes(user: ir.Node, node: ir.Node) -> bool:
    if {user.op_type, node.op_type} == {"Squeeze", "Unsqueeze"}:
        return _axes(user) == _axes(node) is not None
    if user.op_type != "Transpose" or node.op_type != "Transpose":
        return False
    if "perm" not in user.attributes or "perm" not in node.attributes:
        return False
    first, then = node.attributes["perm"].as_ints(), user.attributes["perm"].as_ints()
    return [first[axis] for axis in then] == list(range(len(first)))


def _axes(node: ir.Node) -> list[int] | None:
    if "axes" in node.attributes:
        return list(node.attributes["axes"].as_ints())
    value = node.inputs[1] if len(node.inputs) > 1 else None
    tensor = value.const_value if value is not None else None
    return None if tensor is None else tensor.numpy().reshape(-1).tolist()


def _to_first(model: ir.Model, value: ir.Value, shape: ir.Shape | None, axis: int) -> ir.Node:
    """A node that brings the samples of a value to the front."""
    if axis == WHOLE:
        return _with_axes(model, "Unsqueeze", value)
    return ir.node("Transpose", [value], {"perm": _front(_rank(value, shape), axis)})


def _from_first(model: ir.Model, value: ir.Value, shape: ir.Shape | None, axis: int) -> ir.Node:
    """A node that puts the samples of a value back along their own axis."""
    if axis == WHOLE:
        return _with_axes(model, "Squeeze", value)
    perm = _front(_rank(value, shape), axis)
    return ir.node("Transpose", [value], {"perm": [perm.index(place) for place in range(len(perm))]})


def _with_axes(model: ir.Model, op: str, value: ir.Value) -> ir.Node:
    if model.opset_imports.get("", 1) < _AXES_AS_INPUT:
        return ir.node(op, [value], {"axes": [0]})
    name = _free(model.graph, f"{value.name}/axes")
    tensor = ir.tensor(np.zeros(1, np.int64), name=name)
    axes = ir.Value(name=name, const_value=tensor, shape=ir.Shape([1]), type=ir.TensorType(tensor.dtype))
    add_initializer(model, axes)
    return ir.node(op, [value, axes])


def _rank(value: ir.Value, shape: ir.Shape | None) -> int:
    if shape is None:
        raise ValueError(f"'{value.name}': the number of its axes is not known")
    return len(shape)


def _front(rank: int, axis: int) -> list[int]:
    return [axis, *(other for other in range(rank) if other != axis)]


def _first(shape: ir.Shape | None, axis: int) -> ir.Shape | None:
    """A shape with the axis of the samples in front."""
    if shape is None:
        return None
    return ir.Shape([1, *shape] if axis == WHOLE else [shape[place] for place in _front(len(shape), axis)])


def first_sizes(sizes: Iterable[Any], axis: int) -> tuple[Any, ...]:
    """Sizes of a value with the axis of the samples in front, one of length 1 where the whole is of one sample."""
    found = tuple(sizes)
    if axis == WHOLE:
        return (1, *found)
    return tuple(found[place] for place in _front(len(found), axis)) if 0 < axis < len(found) else found


def _to_axis(array: NDArray[Any], axis: int) -> NDArray[Any]:
    return array[0] if axis == WHOLE else np.moveaxis(array, 0, axis)


def _free(graph: ir.Graph, name: str) -> str:
    taken = {value.name for value in _values(graph)}
    while name in taken:
        name += "'"
    return name


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs
