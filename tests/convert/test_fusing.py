"""Activations in several operators become one, and answer and learn as before; what only looks like them stays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from ndonnx.convert import to_torch
from ndonnx.convert.fusing import fuse_activations
from tests.helpers.models import Net, inputs_of, run

Spelling = Callable[[Net, str], str]


def number(net: Net, value: float, shape: tuple[int, ...] = ()) -> str:
    return net.constant(f"number{len(net.weights)}", np.full(shape, value, np.float32))


def clipped(net: Net, x: str, *, shift: float = 3.0, turned: bool = False) -> str:
    pair = (x, number(net, shift, (1,)))
    return net.op("Clip", net.op("Add", *(reversed(pair) if turned else pair)), number(net, 0.0), number(net, 6.0))


SPELLINGS: dict[str, tuple[Spelling, str]] = {
    "product, then division": (
        lambda net, x: net.op("Div", net.op("Mul", x, clipped(net, x)), number(net, 6.0, (1,))),
        "HardSwish",
    ),
    "turned round": (
        lambda net, x: net.op("Mul", number(net, 1 / 6), net.op("Mul", clipped(net, x, turned=True), x)),
        "HardSwish",
    ),
    "division, then product": (
        lambda net, x: net.op("Mul", x, net.op("Div", clipped(net, x), number(net, 6.0))),
        "HardSwish",
    ),
    "hard sigmoid and product": (
        lambda net, x: net.op("Mul", net.op("HardSigmoid", x, alpha=1 / 6, beta=0.5), x),
        "HardSwish",
    ),
    "sigmoid alone": (lambda net, x: net.op("Div", clipped(net, x), number(net, 6.0)), "HardSigmoid"),
}


def model_of(spelling: Spelling) -> onnx.ModelProto:
    net = Net()
    x = net.conv(net.input("x", "N", 3, 6, 6), 3, 8)
    return net.proto(net.conv(spelling(net, x), 8, 4, out="y"))


@pytest.mark.parametrize("name", SPELLINGS)
def test_one_operator_answers_as_the_several(name: str) -> None:
    spelling, kind = SPELLINGS[name]
    model = model_of(spelling)
    copy = ir.from_proto(model)
    fuse_activations(copy.graph)
    assert [node.op_type for node in copy.graph] == ["Conv", kind, "Conv"]
    feed = {"x": 4 * inputs_of(model, 16)["x"]}
    expected = run(model, feed)["y"]
    module = to_torch(ir.from_proto(model))
    answer = module(torch.from_numpy(feed["x"]))
    assert np.abs(answer.detach().numpy() - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_gradient_is_that_of_the_several(name: str) -> None:
    spelling, _ = SPELLINGS[name]
    x = torch.from_numpy(4 * np.random.default_rng(0).standard_normal((2, 8, 6, 6)).astype(np.float32))
    x.requires_grad_(True)
    plain = torch.clamp(x + 3, 0, 6) / 6 * (1 if name == "sigmoid alone" else x)
    (expected,) = torch.autograd.grad(plain.sum(), x)
    net = Net()
    module = to_torch(ir.from_proto(net.proto(spelling(net, net.input("x", "N", 8, 6, 6)))))
    (found,) = torch.autograd.grad(module(x).sum(), x)
    assert torch.allclose(found, expected, atol=1e-5)


OTHERS: dict[str, Spelling] = {
    "another shift": lambda net, x: net.op("Div", net.op("Mul", x, clipped(net, x, shift=2.0)), number(net, 6.0)),
    "another divisor": lambda net, x: net.op("Div", net.op("Mul", x, clipped(net, x)), number(net, 5.0)),
    "another factor": lambda net, x: net.op("Div", net.op("Mul", net.relu(x), clipped(net, x)), number(net, 6.0)),
    "a divisor for each channel": lambda net, x: net.op("Div", clipped(net, x), net.weight("each", 8, 1, 1)),
    "a clip that is read twice": lambda net, x: net.op(
        "Add", (c := clipped(net, x)), net.op("Div", net.op("Mul", x, c), number(net, 6.0))
    ),
    "six divided": lambda net, x: net.op("Div", number(net, 6.0), net.op("Add", clipped(net, x), number(net, 1.0))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_only_looks_like_one_stays(name: str) -> None:
    model = model_of(OTHERS[name])
    copy = ir.from_proto(model)
    fuse_activations(copy.graph)
    assert [node.op_type for node in copy.graph] == [node.op_type for node in model.graph.node]
    feed = {"x": 4 * inputs_of(model, 16)["x"]}
    answer = to_torch(ir.from_proto(model))(torch.from_numpy(feed["x"])).detach().numpy()
    expected = run(model, feed)["y"]
    assert np.abs(answer - expected).max() < 1e-5 * np.abs(expected).max()


def test_an_output_in_the_middle_stays() -> None:
    net = Net()
    x = net.conv(net.input("x", "N", 3, 6, 6), 3, 8)
    middle = clipped(net, x)
    end = net.op("Div", net.op("Mul", x, middle), number(net, 6.0), out="y")
    model = net.proto(end, middle)
    copy = ir.from_proto(model)
    fuse_activations(copy.graph)
    assert [node.op_type for node in copy.graph] == [node.op_type for node in model.graph.node]
