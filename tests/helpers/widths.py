"""Slices of a teacher for students of a smaller width."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.partition import find_groups
from ndonnx.students import Candidate, StudentMethod, TeacherSlice
from tests.helpers.models import Array, Net, inputs_of, run


def teacher_of(net: Net, output: str, samples: int = 48, seed: int = 0) -> TeacherSlice:
    """A whole net as a slice, with random samples."""
    proto = net.proto(output)
    model = infer_shapes(ir.from_proto(proto))
    groups = find_groups(list(model.graph), model.graph.outputs[0])
    return TeacherSlice("n01", model, groups, inputs_of(proto, samples, seed))


def mlp(seed: int = 0) -> TeacherSlice:
    net = Net(seed)
    y = net.relu(net.gemm(net.input("x", "N", 10), 10, 16, out="a"))
    return teacher_of(net, net.gemm(y, 16, 6, out="b"))


def bottleneck(seed: int = 0) -> TeacherSlice:
    net = Net(seed)
    x = net.input("x", "N", 12, 5, 5)
    y = net.relu(net.norm(net.conv(x, 12, 8, 1, bias=False, out="a"), 8))
    y = net.relu(net.norm(net.conv(y, 8, 8, 3, bias=False, out="b"), 8))
    y = net.norm(net.conv(y, 8, 12, 1, bias=False, out="c"), 12)
    return teacher_of(net, net.relu(net.op("Add", y, x)))


def build(teacher: TeacherSlice, method: StudentMethod, seed: int = 0) -> Candidate:
    return method.build(teacher, np.random.default_rng(seed))


def weights(model: ir.Model) -> dict[str, Array]:
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}  # type: ignore[union-attr]


def answer(teacher: TeacherSlice, model: ir.Model) -> Array:
    return next(iter(run(model, teacher.samples).values()))


def error(teacher: TeacherSlice, model: ir.Model) -> float:
    """Squared error against the teacher on the samples, over the teacher's variance."""
    expected = answer(teacher, teacher.model)
    return float(np.square(answer(teacher, model) - expected).mean() / expected.var())


def repeated(kernel: int, activation: str) -> TeacherSlice:
    """Eight inner channels of which the last four are copies of the first, in another order."""
    net = Net(5)
    order = [0, 1, 2, 3, 2, 0, 3, 1]
    inner, offset = net.rng.standard_normal((4, 6, *[kernel] * 2)), net.rng.standard_normal(4)
    net.constant("a.weight", inner[order].astype(np.float32))
    net.constant("a.bias", offset[order].astype(np.float32))
    pads = [kernel // 2] * 4
    y = net.op("Conv", net.input("x", "N", 6, 5, 5), "a.weight", "a.bias", pads=pads, out="a")
    return teacher_of(net, net.conv(net.op(activation, y), 8, 6, kernel, out="b"))
