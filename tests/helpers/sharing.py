"""Small models in which several places read the same weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from tests.helpers.models import Net


def albert(
    layers: int = 3, width: int = 6, inner: int = 16, *, stem: bool = True, tail: bool = False
) -> onnx.ModelProto:
    """Layers that all have one set of weights: MatMul, Gelu, MatMul, residual sum, LayerNormalization.

    Args:
        layers: how often the weights are used.
        width: of the stream.
        inner: of the feed-forward part.
        stem: put a projection of another width before them.
        tail: let an activation follow the last layer.
    """
    net = Net(1)
    x = net.input("x", "N", 2 * width if stem else width)
    if stem:
        x = net.op("Add", net.matmul(x, 2 * width, width, out="stem"), net.weight("stem.bias", width), out="layer0")
    up, down = net.weight("up", width, inner), net.weight("down", inner, width)
    biases = net.weight("up.bias", inner), net.weight("down.bias", width)
    norm = [net.constant(f"norm.{part}", net.rng.uniform(0.5, 1.5, width).astype(np.float32)) for part in "sb"]
    for i in range(1, layers + 1):
        y = net.op("Gelu", net.op("Add", net.op("MatMul", x, up), biases[0]))
        y = net.op("Add", net.op("MatMul", y, down), biases[1])
        x = net.op("LayerNormalization", net.op("Add", x, y), *norm, out=f"layer{i}", axis=-1)
    x = net.op("Tanh", x) if tail else x
    return net.proto(net.gemm(x, width, 3, out="y"), opset=20)


def towers(names: Sequence[str] = ("a", "b"), width: int = 8, inner: int = 16) -> onnx.ModelProto:
    """A siamese network (or a triplet): one tower for every input, and the first one's distances to the others."""
    net = Net(2)
    for name, shape in (("w1", (inner, width)), ("w2", (width, inner)), ("w3", (inner, width)), ("w4", (6, inner))):
        net.weight(name, *shape)
        net.weight(f"{name}.bias", shape[0])
    ends = []
    for name in names:
        x = net.input(name, "N", width)
        for number in range(1, 5):
            x = net.op("Gemm", x, f"w{number}", f"w{number}.bias", transB=1, out=f"{name}{number}")
            x = net.relu(x) if number < 4 else x
        ends.append(x)
    outputs = []
    for name, end in zip(names[1:], ends[1:], strict=True):
        apart = net.op("Sub", ends[0], end)
        outputs.append(net.op("ReduceSum", net.op("Mul", apart, apart), net.ints(1), keepdims=1, out=f"to_{name}"))
    return net.proto(*outputs)


def tied(by: str = "Transpose", width: int = 8, inner: int = 12, code: int = 4, rank: int = 2) -> onnx.ModelProto:
    """An autoencoder whose decoder reads the encoder's weights.

    Args:
        by: `Transpose`; or `Identity`, where the decoder is a second encoder of its output with the same weights.
        width: of what is encoded.
        inner: of the layer between.
        code: of the code.
        rank: axes of the input.
    """
    net = Net(3)
    x = net.input("x", "N", *range(5, 5 + rank - 2), width)
    w1, w2 = net.weight("w1", width, inner), net.weight("w2", inner, code)

    def layer(x: str, weight: str, bias: int, *, last: bool = False) -> str:
        y = net.op("Add", net.op("MatMul", x, weight), net.weight(f"b{len(net.weights)}", bias))
        return y if last else net.relu(y)

    def again(weight: str) -> str:
        return net.op("Transpose", weight, perm=[1, 0]) if by == "Transpose" else net.op("Identity", weight)

    x = layer(layer(x, w1, inner), w2, code, last=True)
    if by == "Transpose":
        x = layer(layer(x, again(w2), inner), again(w1), width, last=True)
    else:
        x = layer(x, net.weight("back", code, width), width)
        x = layer(layer(x, again(w1), inner), again(w2), code, last=True)
    return net.proto(net.op("Identity", x, out="y"))


def language_model(layers: int = 2, tokens: int = 40, width: int = 6) -> onnx.ModelProto:
    """An embedding, feed-forward layers of their own, and an output that reads the embedding transposed."""
    net = Net(4)
    ids = net.op("Cast", net.input("x", "N", 5), to=7)
    ids = net.op("Mod", net.op("Abs", ids), net.ints(tokens))
    x = net.op("Gather", net.weight("wte", tokens, width), ids, out="embedded")
    for i in range(1, layers + 1):
        y = net.relu(net.matmul(x, width, 4 * width, out=f"up{i}"))
        x = net.op("Add", x, net.matmul(y, 4 * width, width, out=f"down{i}"), out=f"layer{i}")
    return net.proto(net.op("MatMul", x, net.op("Transpose", "wte", perm=[1, 0]), out="y"))


_PLAIN = (("one", 1), ("nought", 0))
"""Constants of a norm that neither scales nor shifts."""


def head(sizes: Sequence[int] = (8, 4, 2), width: int = 4, inner: int = 8, *, norm: bool = False) -> onnx.ModelProto:
    """A head of two convolutions over levels of several sizes, whose answers are joined.

    With a norm between them it is one of groups, as exporters write it: by the instance, with constants of its own at
    each level, and with the shape that the level has.
    """
    net = Net(5)
    x = net.relu(net.conv(net.input("x", "N", 3, sizes[0], sizes[0]), 3, width, out="stem"), out="level0")
    for name, shape in (("h1", (inner, width, 3, 3)), ("h2", (5, inner, 1, 1))):
        net.weight(name, *shape)
        net.weight(f"{name}.bias", shape[0])
    ends = []
    for number, size in enumerate(sizes):
        if number:
            x = net.relu(net.conv(x, width, width, 3, stride=2, out=f"down{number}"), out=f"level{number}")
        y = net.op("Conv", x, "h1", "h1.bias", pads=[1] * 4)
        if norm:
            one, nought = (net.constant(f"{name}{number}", np.full(4, value, np.float32)) for name, value in _PLAIN)
            apart = net.op("InstanceNormalization", net.op("Reshape", y, net.ints(0, 4, -1)), one, nought)
            y = net.op("Reshape", apart, net.op("Shape", y))
        y = net.op("Conv", net.relu(y), "h2", "h2.bias", out=f"head{number}")
        ends.append(net.op("Reshape", y, net.ints(0, 5, size * size)))
    return net.proto(net.op("Concat", *ends, axis=2, out="y"))


def unrolled(steps: int = 4, width: int = 8) -> onnx.ModelProto:
    """A recurrent cell of one Gemm, written out step by step."""
    net = Net(6)
    x = net.input("x", "N", width)
    net.weight("cell", width, width)
    net.weight("cell.bias", width)
    for i in range(1, steps + 1):
        x = net.op("Tanh", net.op("Gemm", x, "cell", "cell.bias", transB=1), out=f"step{i}")
    return net.proto(net.gemm(x, width, 3, out="y"))


def branches(channels: int = 6) -> onnx.ModelProto:
    """A residual unit with two branches, in which the same convolution stands, each behind one of its own."""
    net = Net(7)
    x = net.relu(net.conv(net.input("x", "N", 3, 6, 6), 3, channels), out="before")
    net.weight("same", 8, 8, 3, 3)
    ends = []
    for name in "ab":
        y = net.relu(net.conv(x, channels, 8, out=f"own_{name}"))
        y = net.relu(net.op("Conv", y, "same", pads=[1] * 4))
        ends.append(net.conv(y, 8, channels, 1, out=f"end_{name}"))
    x = net.op("Add", x, net.op("Add", *ends), out="after")
    return net.proto(net.pooled_classifier(x, channels))


def alike_but_one(units: int = 2, channels: int = 6, inner: int = 8) -> onnx.ModelProto:
    """Residual units that share their first convolution only, one of them with another kernel behind it."""
    net = Net(8)
    x = net.relu(net.conv(net.input("x", "N", 3, 6, 6), 3, channels), out="unit0")
    net.weight("same", inner, channels, 3, 3)
    for i in range(1, units + 1):
        y = net.relu(net.op("Conv", x, "same", pads=[1] * 4))
        y = net.relu(net.conv(y, inner, inner, 1 if i == 1 else 3, out=f"middle{i}"))
        x = net.op("Add", net.conv(y, inner, channels, out=f"last{i}"), x, out=f"unit{i}")
    return net.proto(net.pooled_classifier(x, channels))


def same_vectors(units: int = 3, channels: int = 8) -> onnx.ModelProto:
    """Residual units with weights of their own, but one bias of zeros, and one scale, for all of them."""
    net = Net(9)
    zeros = net.constant("zeros", np.zeros(channels, np.float32))
    net.constant("ones", np.linspace(0.5, 1.5, channels, dtype=np.float32).reshape(1, channels, 1, 1))
    x = net.relu(net.conv(net.input("x", "N", 3, 6, 6), 3, channels), out="unit0")
    for i in range(1, units + 1):
        y = net.op("Conv", x, net.weight(f"first{i}", channels, channels, 3, 3), zeros, pads=[1] * 4)
        y = net.op("Conv", net.relu(y), net.weight(f"second{i}", channels, channels, 3, 3), zeros, pads=[1] * 4)
        x = net.op("Add", net.op("Mul", y, "ones"), x, out=f"unit{i}")
    return net.proto(net.pooled_classifier(x, channels))
