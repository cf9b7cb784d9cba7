"""Models whose samples do not come first."""

from __future__ import annotations

import onnx

from tests.helpers.models import Net


def windows() -> onnx.ModelProto:
    """Samples and their windows along one axis for a while."""
    net = Net(5)
    x = net.matmul(net.input("x", "N", 4, 8), 8, 8, out="before")
    apart = net.op("Reshape", x, net.ints(-1, 2, 8), out="windows")
    inner = net.matmul(net.relu(net.matmul(apart, 8, 16)), 16, 8, out="inner")
    together = net.op("Reshape", inner, net.ints(-1, 4, 8), out="together")
    return net.proto(net.op("Add", x, together, out="y"))
