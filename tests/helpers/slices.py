"""Whole small nets as teacher slices, for the tests of the student methods."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from ndonnx.distill.gate import pass_gate
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.partition import find_groups
from ndonnx.students import Candidate, StudentMethod, TeacherSlice
from tests.helpers.models import Array, Net, inputs_of, run


def teacher_of(net: Net, output: str, samples: int = 48, seed: int = 0, *, opset: int = 18) -> TeacherSlice:
    """A whole net as a slice, with random samples."""
    proto = net.proto(output, opset=opset)
    model = infer_shapes(ir.from_proto(proto))
    groups = find_groups(list(model.graph), model.graph.outputs[0])
    return TeacherSlice("n01", model, groups, inputs_of(proto, samples, seed))


def build(teacher: TeacherSlice, method: StudentMethod, seed: int = 0) -> Candidate:
    """The candidate, valid and past the gate, as a job would have it."""
    candidate = method.build(teacher, np.random.default_rng(seed))
    onnx.checker.check_model(ir.to_proto(candidate.model), full_check=True)
    pass_gate(candidate.model, teacher.first(5).samples, 1e-4)
    return candidate


def weights(model: ir.Model) -> dict[str, Array]:
    """Initializers by name."""
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}  # type: ignore[union-attr]


def answer(teacher: TeacherSlice, model: ir.Model, value: str | None = None) -> Array:
    """The exit, or another value, on the samples."""
    return next(iter(run(model, teacher.samples, None if value is None else [value]).values()))


def error(teacher: TeacherSlice, model: ir.Model) -> float:
    """Squared error against the teacher on the samples, over the teacher's variance."""
    expected = answer(teacher, teacher.model)
    return float(np.square(answer(teacher, model) - expected).mean() / expected.var())


def operators(model: ir.Model) -> list[str]:
    """Operators in order."""
    return [node.op_type for node in model.graph]
