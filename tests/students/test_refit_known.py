"""A reader whose inputs are known from the ranking: fitted by those moments, as if it were run once more."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.partition import find_groups
from ndonnx.students import TeacherSlice, reconstruction
from ndonnx.students.cutting import choose_units, shrink
from ndonnx.students.forward import Forward
from ndonnx.students.importance import ReaderStatistics, measure_readers
from ndonnx.students.reconstruction import refit_consumers
from tests.helpers.models import Array, Net, inputs_of


def residual(net: Net) -> str:
    x = net.input("x", "N", 6, 5, 5)
    return net.op("Add", net.conv(net.relu(net.conv(x, 6, 8, out="a")), 8, 6, out="b"), x)


def without_offset(net: Net) -> str:
    return net.matmul(net.op("Tanh", net.matmul(net.input("x", "N", 5, 6), 6, 8, out="a")), 8, 4, out="b")


def bias_of_all(net: Net) -> str:
    """The reader's bias is read elsewhere too, so that it stays as it is."""
    bias = net.weight("bias", 6)
    y = net.relu(net.gemm(net.input("x", "N", 6), 6, 8, out="a"))
    y = net.op("Gemm", y, net.weight("b.weight", 6, 8), bias, transB=1)
    return net.op("Add", y, net.op("Mul", y, bias))


def chain(net: Net) -> str:
    """The first reader loses outputs too; what the second one gets was changed before it."""
    y = net.relu(net.gemm(net.input("x", "N", 6), 6, 10, out="a"))
    y = net.relu(net.gemm(y, 10, 12, out="b"))
    return net.gemm(y, 12, 5, out="c")


def attention(net: Net) -> str:
    """The rows of a softmax are others once queries and keys are narrower."""
    x = net.input("x", "N", 5, 8)
    q, k, v = (net.matmul(x, 8, 8, out=name) for name in "qkv")
    scores = net.op("Softmax", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 1])), axis=-1)
    return net.matmul(net.op("MatMul", scores, v), 8, 8, out="o")


MAKES: tuple[Callable[[Net], str], ...] = (residual, without_offset, bias_of_all, chain, attention)


def slice_of(make: Callable[[Net], str], samples: int) -> TeacherSlice:
    net = Net(3)
    proto = net.proto(make(net))
    model = infer_shapes(ir.from_proto(proto))
    return TeacherSlice("n01", model, find_groups(list(model.graph), model.graph.outputs[0]), inputs_of(proto, samples))


def fitted(teacher: TeacherSlice, kept: npt.NDArray[np.bool_], known: ReaderStatistics | None) -> dict[str, Array]:
    student = refit_consumers(teacher, shrink(teacher.model, teacher.groups, kept), kept, known)
    return {name: value.const_value.numpy() for name, value in student.graph.initializers.items()}  # type: ignore[union-attr]


@pytest.mark.parametrize("samples", [40, 400])
@pytest.mark.parametrize("make", MAKES)
def test_what_is_known_gives_the_same_weights(make: Callable[[Net], str], samples: int) -> None:
    teacher = slice_of(make, samples)
    kept = choose_units(teacher, 0.5, None)
    assert not kept.all()
    expected, found = fitted(teacher, kept, None), fitted(teacher, kept, measure_readers(teacher))
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(("make", "runs"), [(residual, 0), (chain, 1)])
def test_only_what_is_not_known_is_run_again(
    make: Callable[[Net], str], runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = slice_of(make, 400)
    kept = choose_units(teacher, 0.5, None)
    seen = []

    class Counted(Forward):
        def next(self, name: str):  # type: ignore[no-untyped-def]
            seen.append(name)
            return super().next(name)

    monkeypatch.setattr(reconstruction, "Forward", Counted)
    fitted(teacher, kept, measure_readers(teacher))
    assert len(seen) == 2 * runs
