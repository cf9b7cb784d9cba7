"""Floating types: a slice in float32 for training, whatever its own are, and its student back in them.

A slice with float16 or float64 weights is shrunk, fitted and trained as a float32 copy. Its student has the slice's
types again: by name where the slice has the value too, elsewhere the type of what the value is computed from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ndonnx.errors import TrainingError
from ndonnx.graph.shapes.inference import infer_shapes

OTHER_FLOATS = {ir.DataType.FLOAT16, ir.DataType.DOUBLE}
"""Floating types that are trained as float32."""
_NAMING_TYPES = ("to", "dtype", "output_dtype", "output_datatype")
"""Attributes that name an element type."""
_HALF_STEP = 2.0**-11
"""Largest relative error of rounding a number to float16."""
_MARGIN = 4.0
"""How often the rounding errors of the values in a row are allowed for: what follows may enlarge them."""


def in_float32(model: ir.Model) -> ir.Model:
    """A copy of a slice that computes in float32 all that it computes in float16 and float64.

    Names stay. The slice itself where it computes in nothing else.
    """
    if not any(_is_other(value) for value in _values(model.graph)):
        return model
    copy = model.clone()
    for value in copy.graph.initializers.values():
        if _is_other(value) and value.const_value is not None:
            _set_tensor(value, ir.DataType.FLOAT)
    for value in _values(copy.graph):
        if _is_other(value):
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in copy.graph:
        _name_types(node, {kind: ir.DataType.FLOAT for kind in OTHER_FLOATS})
    return copy


def in_own_types(student: ir.Model, slice_: ir.Model) -> ir.Model:
    """The float32 student of a slice in the types of the slice: float16 weights are float16 again.

    Args:
        student: with the slice's inputs and output, trained in float32; not changed.
        slice_: as it lies in the teacher.

    Raises:
        TrainingError: a trained weight does not fit into its type.
    """
    known = {value.name or "": value.dtype for value in _values(slice_.graph) if value.dtype is not None}
    if not OTHER_FLOATS.intersection(known.values()):
        return student
    return _Typing(student.clone(), known).model


def rounding_error(model: ir.Model) -> float:
    """How far answers of a slice may lie from those of its float32 copy, relative to their scale.

    Every value that a node makes in float16 is off by up to half a unit in its last place. 0 where there is none.
    """
    halves = sum(any(value.dtype is ir.DataType.FLOAT16 for value in node.outputs) for node in model.graph)
    return _MARGIN * _HALF_STEP * (halves + 1) if halves else 0.0


class _Typing:
    """Gives a float32 student the types of its slice, node by node."""

    def __init__(self, model: ir.Model, known: Mapping[str, ir.DataType]) -> None:
        self.model = model
        self._known = known
        self._types: dict[ir.Value, ir.DataType] = {}
        weights = [known[name] for name in model.graph.initializers if name in known and _is_floating(known[name])]
        every = weights or [kind for kind in known.values() if _is_floating(kind)]
        self._usual = Counter(every).most_common(1)[0][0]
        for value in model.graph.inputs:
            self._set(value, known.get(value.name or ""))
        for node in model.graph:
            self._type(node)
        for position, value in enumerate(model.graph.outputs):
            self._end_in_own_type(position, value)
        infer_shapes(model)

    def _type(self, node: ir.Node) -> None:
        given = [self._types[value] for value in node.inputs if value in self._types and not value.is_initializer()]
        kind = next(iter(given), None) or self._by_name((*node.outputs, *node.inputs)) or self._usual
        for value in node.inputs:
            if value is not None and value.is_initializer() and value not in self._types and _is_float32(value):
                self._set(value, self._known.get(value.name or "", kind))
        for value in node.outputs:
            if _is_float32(value):
                self._set(value, self._known.get(value.name or "", kind))
        made = self._types.get(node.outputs[0])
        if made is not None:
            _name_types(node, {ir.DataType.FLOAT: made})

    def _by_name(self, values: Iterable[ir.Value | None]) -> ir.DataType | None:
        kinds = (self._known.get(value.name or "") for value in values if value is not None)
        return next((kind for kind in kinds if kind is not None and _is_floating(kind)), None)

    def _set(self, value: ir.Value, kind: ir.DataType | None) -> None:
        if kind is None or not _is_floating(kind):
            return
        self._types[value] = kind
        if value.const_value is not None and value.is_initializer():
            _set_tensor(value, kind)
        value.type = ir.TensorType(kind)

    def _end_in_own_type(self, position: int, value: ir.Value) -> None:
        wanted, found = self._known.get(value.name or ""), self._types.get(value)
        made = value.producer()
        if wanted is None or found is None or wanted is found or made is None:
            return
        cast = ir.node("Cast", [value], {"to": wanted})
        end = cast.outputs[0]
        end.name, value.name = value.name, f"{value.name}/uncast"
        end.type, end.shape = ir.TensorType(wanted), value.shape
        self.model.graph.insert_after(made, cast)
        self.model.graph.outputs[position] = end


def of_type(array: npt.NDArray[Any], kind: ir.DataType, name: str) -> npt.NDArray[Any]:
    """A weight in an element type.

    Raises:
        TrainingError: a finite number of it is too large for the type.
    """
    with np.errstate(over="ignore"):
        found = array.astype(kind.numpy())
    if found.dtype.itemsize < array.dtype.itemsize and np.isfinite(array).sum() != np.isfinite(found).sum():
        raise TrainingError(f"the weight '{name}' has become too large for {kind}")
    return found


def _set_tensor(value: ir.Value, kind: ir.DataType) -> None:
    assert value.const_value is not None
    value.const_value = ir.tensor(of_type(value.const_value.numpy(), kind, value.name or ""), name=value.name)
    value.type = ir.TensorType(kind)


def _name_types(node: ir.Node, kinds: Mapping[ir.DataType, ir.DataType]) -> None:
    """Let attributes of a node that name one of these types name another, and tensors in them be of it."""
    for name, attribute in list(node.attributes.items()):
        if name in _NAMING_TYPES and attribute.type is ir.AttributeType.INT:
            wanted = kinds.get(ir.DataType(attribute.as_int()))
            if wanted is not None:
                node.attributes[name] = ir.AttrInt64(name, int(wanted))
        elif (
            attribute.type is ir.AttributeType.TENSOR and (wanted := kinds.get(attribute.as_tensor().dtype)) is not None
        ):
            tensor = ir.tensor(attribute.as_tensor().numpy().astype(wanted.numpy()))
            node.attributes[name] = ir.AttrTensor(name, tensor)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _is_other(value: ir.Value) -> bool:
    return value.dtype in OTHER_FLOATS


def _is_float32(value: ir.Value) -> bool:
    return value.dtype is ir.DataType.FLOAT


def _is_floating(kind: ir.DataType) -> bool:
    return kind.is_floating_point()
