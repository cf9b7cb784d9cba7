"""Sparsity: a part of the weights of every linear operator of a slice becomes zero, the rest is trained."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from ndonnx.config.recipe import parse_sparsity
from ndonnx.errors import ShrinkError
from ndonnx.graph.costs import constant_of
from ndonnx.partition.layers import LINEAR_OPERATORS
from ndonnx.students.base import Candidate, Spelled, StudentMethod, TeacherSlice
from ndonnx.students.features import summed
from ndonnx.students.forward import Forward, side_by_side
from ndonnx.students.least_squares import Regression
from ndonnx.students.masks import GrowingZeros, LinearWeight, Pattern, linear_weights
from ndonnx.students.sparse_fit import can_fit, fit, from_groups, to_groups
from ndonnx.students.starting import Init, randomise

_SETTLED = 0.6
"""Part of the training over which zeros grow; the rest trains what stays."""
_CLOSED_FORM_KEEPS = 0.8
"""Part of the zeros of the closed form that are held from the first step; the others may come back and have to be
earned again. On two units of ResNet-20 at sparsity 0.8 that left 0.90 and 0.93 of the error of zeros that stay the
same; 0.8 was the best of 0, 0.8, 0.9, 0.95 and 1."""


@dataclass(frozen=True)
class Sparsity(StudentMethod):
    """Zeros in the weights of `Conv`, `ConvTranspose`, `Gemm` and `MatMul`; see `Recipe` for the fields.

    Every weight of its own gets `round(sparsity * size)` zeros, or N in every M consecutive ones along the axis
    that is summed over (input channels). Biases, norms and embeddings stay whole, and so do the weights that are
    left over where M does not divide the axis.
    """

    name = "sparsity"
    usage = "sparsity S (S from 0 to below 1, or N:M as 2:4)"
    around = LINEAR_OPERATORS

    sparsity: str = "0.5"
    init: Init = "least-squares"

    @classmethod
    def spelled(cls, words: Sequence[str]) -> Spelled | None:
        """Words that are one part of zeros, or one pattern."""
        (text,) = words
        sparsity = parse_sparsity(text)
        zeros, colon, group = sparsity.partition(":")
        part = int(zeros) / int(group) if colon else float(sparsity)
        # 0.70 and 0.7 must have one name, and one key in the block library.
        written = sparsity if colon else str(part)
        return None if part == 0 else Spelled(f"sparsity {written}", {"sparsity": written}, 1 - part)

    def _build(self, teacher: TeacherSlice, rng: np.random.Generator) -> Candidate:
        pattern = Pattern.parse(self.sparsity)
        spec = f"sparsity {pattern}"
        found = (weight for weight in linear_weights(teacher.model.graph) if weight.name not in teacher.held)
        weights = tuple(weight for weight in found if pattern.count(weight))
        if not weights and (pattern.group or pattern.part):
            raise ShrinkError(f"{teacher.name}: no weight of a linear operator is large enough for {spec}")
        if not weights:
            return Candidate(spec, teacher.model.clone())
        if self.init == "least-squares":
            model = fit_zeros(teacher, pattern, weights)
            return Candidate(spec, model, GrowingZeros(pattern, weights, _SETTLED, _CLOSED_FORM_KEEPS))
        model = randomise(teacher.model, rng, teacher.held) if self.init == "random" else teacher.model.clone()
        return Candidate(spec, model, GrowingZeros(pattern, weights, _SETTLED))


def fit_zeros(teacher: TeacherSlice, pattern: Pattern, weights: tuple[LinearWeight, ...]) -> ir.Model:
    """A copy of the slice with zeros, in closed form: operator after operator, each on what those before now give.

    The smallest weights go where there is no closed form (`can_fit`) and where operators share a weight.
    """
    copy = teacher.model.clone()
    theirs, ours = Forward(teacher, teacher.model), Forward(teacher, copy)
    layouts = {weight.name: weight for weight in weights}
    fitted = {node.inputs[1].name: node for node in copy.graph if _is_own(node)}  # type: ignore[union-attr]
    fitted = {name: node for name, node in fitted.items() if name in layouts}
    for name, layout in layouts.items():
        if name in fitted:
            _fit(ours, theirs, fitted[name], pattern, layout)
        else:
            value = copy.graph.initializers[name]
            array = _array(value)
            _set(value, array * pattern.mask(torch.from_numpy(np.abs(array)), layout).numpy())
    return copy


def _is_own(node: ir.Node) -> bool:
    """Whether an operator has a closed form and its weight to itself."""
    return can_fit(node) and node.inputs[1] is not None and len(node.inputs[1].uses()) == 1


def _fit(ours: Forward, theirs: Forward, node: ir.Node, pattern: Pattern, layout: LinearWeight) -> None:
    teacher = theirs.teacher
    value, data, bias = node.inputs[1], node.inputs[0], _own_bias(node, layout, teacher.held)
    output = node.outputs[0].name
    assert value is not None and data is not None and data.name and output
    problem = Regression(node, teacher.count)
    for samples, given, expected in side_by_side((ours, data.name), (theirs, output)):
        problem.add(samples, given, summed(node, expected, offset=bias is not None))
    moments = problem.moments() if bias is not None else problem.moments().about_zero()

    def choose(counts: torch.Tensor, part: float) -> torch.Tensor:
        whole = from_groups(node, counts, layout.shape)
        return to_groups(node, pattern.mask(whole, layout, round(part * pattern.count(layout))))

    before = to_groups(node, torch.tensor(_array(value), dtype=torch.float64))
    solution, _ = fit(moments, before, choose)
    _set(value, from_groups(node, solution, layout.shape).numpy())
    if bias is not None:
        _set(bias, moments.offset(solution).reshape(_array(bias).shape).numpy())


def _own_bias(node: ir.Node, layout: LinearWeight, held: Collection[str]) -> ir.Value | None:
    """A bias that nothing else reads, with one number for each output."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None or not bias.is_initializer() or len(bias.uses()) != 1 or bias.name in held:
        return None
    outputs = layout.shape[1 - layout.axis]
    return bias if _array(bias).size == outputs else None


def _array(value: ir.Value) -> np.ndarray:
    tensor = constant_of(value)
    assert tensor is not None
    return tensor.numpy()


def _set(value: ir.Value, array: np.ndarray) -> None:
    assert value.const_value is not None
    value.const_value = ir.tensor(array.astype(value.const_value.dtype.numpy()), name=value.name)
