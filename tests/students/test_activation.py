"""Activation swap: activations are known by what they compute, in whatever way they are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto

from ndonnx.assemble.splice import is_changed, splice
from ndonnx.config.recipe import Recipe
from ndonnx.errors import RecipeError, ShrinkError
from ndonnx.graph.save import serialise
from ndonnx.students import TeacherSlice
from ndonnx.students.methods.activation import DEFAULT, ActivationSwap, find_activations
from ndonnx.students.registry import method_of
from tests.helpers.models import Net, inputs_of, inverted_bottleneck, parted, run
from tests.helpers.slices import answer, build, error, operators, teacher_of, weights

Write = Callable[[Net, str], str]


def number(net: Net, value: float, *shape: int) -> str:
    return net.constant(f"number{len(net.weights)}", np.full(shape, value, np.float32))


def gelu(net: Net, x: str) -> str:
    """As PyTorch's tracing exporter writes it."""
    erf = net.op("Erf", net.op("Div", x, number(net, 2**0.5)))
    return net.op("Mul", net.op("Mul", x, net.op("Add", erf, number(net, 1))), number(net, 0.5))


def gelu_halved_first(net: Net, x: str) -> str:
    """As the exporter for `torch.export` writes it, with numbers of one element."""
    erf = net.op("Erf", net.op("Mul", x, number(net, 0.5**0.5, 1)))
    return net.op("Mul", net.op("Mul", x, number(net, 0.5, 1)), net.op("Add", erf, number(net, 1, 1)))


def gelu_by_tanh(net: Net, x: str) -> str:
    cube = net.op("Mul", net.op("Pow", x, number(net, 3)), number(net, 0.044715))
    inner = net.op("Mul", net.op("Add", x, cube), number(net, (2 / np.pi) ** 0.5))
    return net.op("Mul", net.op("Mul", x, number(net, 0.5)), net.op("Add", net.op("Tanh", inner), number(net, 1)))


def silu(net: Net, x: str) -> str:
    return net.op("Mul", x, net.op("Sigmoid", x))


def silu_by_division(net: Net, x: str) -> str:
    return net.op("Div", x, net.op("Add", net.op("Exp", net.op("Neg", x)), number(net, 1)))


def quick_gelu(net: Net, x: str) -> str:
    return net.op("Mul", x, net.op("Sigmoid", net.op("Mul", x, number(net, 1.702))))


def hard_swish(net: Net, x: str) -> str:
    clip = net.op("Clip", net.op("Add", x, number(net, 3)), number(net, 0), number(net, 6))
    return net.op("Div", net.op("Mul", x, clip), number(net, 6))


def mish(net: Net, x: str) -> str:
    return net.op("Mul", x, net.op("Tanh", net.op("Softplus", x)))


def relu6(net: Net, x: str) -> str:
    return net.op("Clip", x, number(net, 0), number(net, 6))


def single(operator: str, **attributes: Any) -> Write:
    return lambda net, x: net.op(operator, x, **attributes)


WRITTEN: dict[str, tuple[str, Write]] = {
    "gelu": ("Gelu", gelu),
    "gelu_halved_first": ("Gelu", gelu_halved_first),
    "gelu_by_tanh": ("Gelu", gelu_by_tanh),
    "silu": ("Silu", silu),
    "silu_by_division": ("Silu", silu_by_division),
    "quick_gelu": ("QuickGelu", quick_gelu),
    "hard_swish": ("HardSwish", hard_swish),
    "mish": ("Mish", mish),
    "relu6": ("Relu6", relu6),
    "HardSwish": ("HardSwish", single("HardSwish")),
    "Elu": ("Elu", single("Elu", alpha=0.3)),
    "Softplus": ("Softplus", single("Softplus")),
    "Mish": ("Mish", single("Mish")),
}


def between(write: Write, *, opset: int = 18, seed: int = 0) -> TeacherSlice:
    """The activation between two dense layers."""
    net = Net(seed)
    x = write(net, net.gemm(net.input("x", "N", 10), 10, 16, out="a"))
    return teacher_of(net, net.gemm(x, 16, 6, out="b"), 200, opset=opset)


# What is found


@pytest.mark.parametrize("name", WRITTEN)
def test_an_activation_is_known_however_it_is_written(name: str) -> None:
    expected, write = WRITTEN[name]
    teacher = between(write)
    (found,) = find_activations(teacher.model)
    assert found.name == expected
    assert found.input.name == "a"
    assert {node.op_type for node in teacher.model.graph} - {node.op_type for node in found.nodes} == {"Gemm"}


def almost_silu(net: Net, x: str) -> str:
    return net.op("Mul", x, net.op("Sigmoid", net.op("Mul", x, number(net, 1.05))))


def scaled_by_channel(net: Net, x: str) -> str:
    return net.op("Mul", x, net.op("HardSigmoid", net.op("Mul", x, net.weight("factors", 16))))


def gated_by_another(net: Net, x: str) -> str:
    return net.op("Mul", net.op("Add", x, number(net, 1)), net.op("Cos", x))


@pytest.mark.parametrize("write", [almost_silu, scaled_by_channel, gated_by_another])
def test_what_is_no_known_activation_is_left(write: Write) -> None:
    teacher = between(write)
    assert {activation.name for activation in find_activations(teacher.model)} <= {"Sigmoid", "HardSigmoid"}
    with pytest.raises(ShrinkError, match="n01: has none of the activations"):
        build(teacher, ActivationSwap())


def test_an_activation_whose_inside_is_read_elsewhere_is_left() -> None:
    net = Net()
    x = net.gemm(net.input("x", "N", 10), 10, 16, out="a")
    gate = net.op("Sigmoid", x)
    y = net.op("Add", net.op("Mul", x, gate), gate)
    assert [found.name for found in find_activations(teacher_of(net, y).model)] == ["Sigmoid"]


def test_numbers_that_are_no_floats_are_left() -> None:
    net = Net()
    x = net.op("Cast", net.gemm(net.input("x", "N", 10), 10, 16), to=TensorProto.INT32)
    y = net.op("Cast", net.op("Mul", x, net.constant("two", np.array(2, np.int32))), to=TensorProto.FLOAT)
    assert find_activations(teacher_of(net, y).model) == []


# What it becomes

NEW: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Elu": F.elu,
    "HardSigmoid": F.hardsigmoid,
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
    "LeakyRelu": F.leaky_relu,
    "Relu": F.relu,
    "Relu6": F.relu6,
    "Sigmoid": torch.sigmoid,
    "Silu": F.silu,
    "Softsign": F.softsign,
    "Tanh": torch.tanh,
}


@pytest.mark.parametrize("opset", [9, 13, 18, 21])
@pytest.mark.parametrize("new", NEW)
def test_the_new_activation_is_exact_in_every_opset(new: str, opset: int) -> None:
    teacher = between(single("Softplus"), opset=opset)
    student = build(teacher, ActivationSwap((f"Softplus={new}",), "teacher")).model
    before = torch.from_numpy(answer(teacher, teacher.model, "a"))
    (activation,) = find_activations(student) or [None]
    made = answer(teacher, student, teacher.model.graph[1].outputs[0].name)
    np.testing.assert_allclose(made, NEW[new](before).numpy(), atol=1e-5)
    assert activation is None or activation.name == new
    assert student.opset_imports == teacher.model.opset_imports


@pytest.mark.parametrize("name", [name for name, (kind, _) in WRITTEN.items() if f"{kind}=Relu" in DEFAULT])
def test_costly_activations_become_relu_and_nothing_of_them_stays(name: str) -> None:
    kind, write = WRITTEN[name]
    teacher = between(write)
    candidate = build(teacher, ActivationSwap())
    assert candidate.spec == f"activation {kind}=Relu"
    assert operators(candidate.model) == ["Gemm", "Relu", "Gemm"]
    assert set(weights(candidate.model)) == {"a.weight", "a.bias", "b.weight", "b.bias"}


def test_only_what_is_named_is_swapped() -> None:
    net = Net()
    x = net.op("HardSwish", net.gemm(net.input("x", "N", 10), 10, 16))
    x = net.op("HardSwish", net.gemm(silu(net, net.gemm(x, 16, 12)), 12, 9))
    candidate = build(teacher_of(net, net.op("Tanh", x)), ActivationSwap(("swish = hardswish", "Tanh=Softsign")))
    assert operators(candidate.model) == ["Gemm", "HardSwish", "Gemm", "HardSwish", "Gemm", "HardSwish", "Softsign"]
    assert set(candidate.spec.split()[1:]) == {"Silu=HardSwish", "Tanh=Softsign"}


# Refitting


def test_the_operator_behind_is_fitted_by_least_squares() -> None:
    teacher = between(single("HardSwish"))
    student = build(teacher, ActivationSwap()).model
    hidden = np.maximum(answer(teacher, teacher.model, "a"), 0).astype(np.float64)
    features: npt.NDArray[Any] = np.hstack([hidden, np.ones((200, 1))])
    solution, *_ = np.linalg.lstsq(features, answer(teacher, teacher.model).astype(np.float64), rcond=None)
    np.testing.assert_allclose(weights(student)["b.weight"].T, solution[:-1], atol=2e-3)
    np.testing.assert_allclose(weights(student)["b.bias"], solution[-1], atol=2e-3)
    for name in ("a.weight", "a.bias"):
        assert np.array_equal(weights(student)[name], weights(teacher.model)[name])
    assert error(teacher, student) < 0.5 * error(teacher, build(teacher, ActivationSwap((), "teacher")).model)


def test_an_activation_at_the_exit_is_swapped_too() -> None:
    net = Net()
    teacher = teacher_of(net, net.op("HardSwish", net.gemm(net.input("x", "N", 10), 10, 16), out="y"))
    candidate = build(teacher, ActivationSwap())
    assert operators(candidate.model) == ["Gemm", "Relu"]
    assert is_changed(candidate.model, teacher.model)  # no weight is another


def test_the_teacher_is_never_changed() -> None:
    teacher = between(gelu)
    before = serialise(teacher.model)
    for init in ("teacher", "least-squares", "random"):
        build(teacher, ActivationSwap((), init))  # type: ignore[arg-type]
    assert serialise(teacher.model) == before


# What the user writes


@pytest.mark.parametrize(
    ("swap", "message"),
    [
        ("Relu", "expected OLD=NEW"),
        ("Foo=Relu", "unknown activation 'Foo'; expected one of Celu, Elu"),
        ("Relu=Erf", "unknown activation 'Erf'; expected one of Elu"),
        ("Swish=Silu", "changes nothing"),
    ],
)
def test_a_wrong_pair_is_one_line(swap: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        method_of(Recipe(method="activation", swap=(swap,)))
    assert "\n" not in str(caught.value)


def test_a_recipe_names_the_method() -> None:
    assert method_of(Recipe(method="activation", init="teacher")) == ActivationSwap((), "teacher")


def test_students_take_their_places_in_the_teacher() -> None:
    proto = inverted_bottleneck()
    teacher, parts = parted(proto)
    students = {}
    for part in parts.distillable:
        assert part.entry is not None
        assert part.groups is not None
        samples = run(proto, inputs_of(proto, 64), [part.entry.name or ""])
        slice_ = TeacherSlice(part.name, parts.slice_of(part), part.groups, samples)
        students[part.name] = build(slice_, ActivationSwap(("HardSwish=Relu", "HardSigmoid=Sigmoid"))).model
    whole = splice(teacher, students)
    assert not {"HardSwish", "HardSigmoid"} & set(operators(whole))
    expected, found = (next(iter(run(model, inputs_of(proto, 64)).values())) for model in (teacher, whole))
    assert 0 < np.square(found - expected).mean() < expected.var()


def test_samples_few_enough_to_interpolate_do_no_harm() -> None:
    teacher = between(single("HardSwish"))
    few = replace(teacher, samples={"x": teacher.samples["x"][:4]})
    assert np.isfinite(answer(few, build(few, ActivationSwap()).model)).all()
