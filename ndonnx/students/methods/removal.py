"""Removal: what a slice does to its input is dropped, but for a scale and a shift of each channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ndonnx.errors import ShrinkError
from ndonnx.graph import slice_cost
from ndonnx.graph.costs import constant_of
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.students.base import Candidate, Spelled, StudentMethod, TeacherSlice
from ndonnx.students.linear import add_weight, unique_name
from ndonnx.students.starting import Init

_ACTIVATIONS = {
    "Celu", "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu", "Relu", "Selu",
    "Sigmoid", "Softplus", "Softsign", "Swish", "Tanh",
}  # fmt: skip
"""Operators that stay where they end a slice, if the answer is closer with them."""

Array = npt.NDArray[np.float32]
Sums = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Affine:
    """The best scale and shift of each channel between two values of one shape."""

    axis: int
    scale: Sums
    shift: Sums

    def apply(self, data: Array) -> Array:
        """`scale * data + shift`."""
        return data * self.along(self.scale, data.ndim) + self.along(self.shift, data.ndim)

    def along(self, numbers: Sums, rank: int) -> Array:
        """Numbers for each channel in a shape that broadcasts to the data's, without the sample axis where it can."""
        return numbers.reshape([-1] + [1] * (rank - 1 - self.axis)).astype(np.float32)


@dataclass(frozen=True)
class Removal(StudentMethod):
    """The slice becomes its input, scaled and shifted by channel: least squares on the samples, then trained.

    In a residual unit that drops the main branch. An activation at the slice's end stays where
    that brings the answer closer. With another `init` than `least-squares` the scale begins as 1
    and the shift as 0.
    """

    name = "removal"
    usage = "removal"

    init: Init = "least-squares"

    @classmethod
    def spelled(cls, words: Sequence[str]) -> Spelled:
        """No words at all."""
        if words:
            raise ValueError("takes no words")
        return Spelled(cls.name, {}, 0.0)

    def _build(self, teacher: TeacherSlice, rng: np.random.Generator) -> Candidate:
        model = teacher.model
        entry, exit_ = model.graph.inputs[0].name or "", model.graph.outputs[0].name or ""
        last = model.graph.outputs[0].producer()
        before = _stream_input(last) if last is not None and last.op_type in _ACTIVATIONS else None
        values = teacher.run(model, list(dict.fromkeys(name for name in (exit_, before) if name)))
        data, target = teacher.samples[entry], values[exit_]
        if data.shape != target.shape or entry in teacher.constants:
            raise ShrinkError(
                f"{teacher.name}: cannot be removed: '{entry}' has the shape {data.shape} on the samples "
                f"and '{exit_}' {target.shape}; only a slice whose ends agree can"
            )
        if data.ndim < 2 or data.dtype.kind != "f" or target.dtype != data.dtype:
            raise ShrinkError(f"{teacher.name}: cannot be removed: '{entry}' has no channels of numbers")
        whole = _candidate(model, self._affine(data, target), data.ndim, None)
        found = whole
        if before is not None and values[before].shape == data.shape:
            partial = _candidate(model, self._affine(data, values[before]), data.ndim, before)
            found = min(partial, whole, key=lambda candidate: _error(teacher, candidate, target))
        if slice_cost(found).parameters >= slice_cost(model).parameters:
            raise ShrinkError(f"{teacher.name}: has no more weights than a scale and a shift of its channels")
        return Candidate("removal", found)

    def _affine(self, data: Array, target: Array) -> Affine:
        if self.init == "least-squares":
            return fit_affine(data, target)
        return Affine(1, np.ones(data.shape[1]), np.zeros(data.shape[1]))


def fit_affine(data: Array, target: Array) -> Affine:
    """Scale and shift of each channel by least squares; channels lie on the second axis or on the last.

    Args:
        data: float32 (samples, ...).
        target: float32 of the same shape.
    """
    fits = [_fit(data, target, axis) for axis in dict.fromkeys((1, data.ndim - 1))]
    return min(fits, key=lambda fit: float(np.square(fit.apply(data) - target, dtype=np.float64).mean()))


def _fit(data: Array, target: Array, axis: int) -> Affine:
    others = tuple(other for other in range(data.ndim) if other != axis)
    mean_x, mean_y = (array.mean(axis=others, dtype=np.float64, keepdims=True) for array in (data, target))
    x, y = data - mean_x, target - mean_y
    variance, together = (x * x).mean(axis=others), (x * y).mean(axis=others)
    # A channel that never changes says nothing: the shift alone answers for it.
    scale = np.divide(together, variance, out=np.zeros_like(together), where=variance > 0)
    return Affine(axis, scale, mean_y.reshape(-1) - scale * mean_x.reshape(-1))


def _stream_input(node: ir.Node) -> str | None:
    """What a node reads, if everything else it reads is constant."""
    data, *further = node.inputs
    if data is None or constant_of(data) is not None:
        return None
    plain = all(value is None or constant_of(value) is not None for value in further)
    return data.name if plain and data.producer() is not None else None


def _candidate(model: ir.Model, affine: Affine, rank: int, before: str | None) -> ir.Model:
    """A copy of the slice in which its exit, or the value `before` its last activation, is made from its entry."""
    copy = model.clone()
    graph = copy.graph
    entry, exit_ = graph.inputs[0], graph.outputs[0]
    replaced = ir.convenience.create_value_mapping(graph)[before] if before is not None else exit_
    producer = replaced.producer()
    assert producer is not None and replaced.name
    scale, shift = (
        add_weight(graph, f"{exit_.name}/{part}", affine.along(numbers, rank))
        for part, numbers in (("scale", affine.scale), ("shift", affine.shift))
    )
    scaled = ir.node("Mul", [entry, scale], name=unique_name(graph, f"{exit_.name}/scaled"))
    scaled.outputs[0].name, scaled.outputs[0].type = scaled.name, entry.type
    shifted = ir.node("Add", [scaled.outputs[0], shift], name=unique_name(graph, f"{exit_.name}/shifted"))
    new, name = shifted.outputs[0], replaced.name
    replaced.name = unique_name(graph, f"{name}/old")
    new.name, new.type, new.shape = name, replaced.type, replaced.shape
    graph.insert_before(producer, [scaled, shifted])
    replaced.replace_all_uses_with(new, replace_graph_outputs=True)
    return infer_shapes(RemoveUnusedNodesPass()(copy).model)


def _error(teacher: TeacherSlice, model: ir.Model, target: Array) -> float:
    exit_ = model.graph.outputs[0].name or ""
    return float(np.square(teacher.run(model, [exit_])[exit_] - target, dtype=np.float64).mean())
