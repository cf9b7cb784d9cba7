"""Views of one weight are one, however they are spelled; what is united answers as before, bit for bit."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from ndonnx.graph.ties import unite_views
from tests.helpers.models import Net, inputs_of, run


def tied(*shapes: tuple[int, ...]) -> onnx.ModelProto:
    """A weight, its transpose, and that transpose again behind reshapes."""
    net = Net()
    hidden = net.relu(net.op("MatMul", net.input("x", "N", 6), net.weight("w", 6, 4)))
    turned = net.op("Transpose", "w", perm=[1, 0])
    again = turned
    for shape in shapes:
        again = net.op("Reshape", again, net.ints(*shape))
    one, other = net.op("MatMul", hidden, turned), net.op("MatMul", hidden, again)
    net.op("Add", one, other, out="y")
    return net.proto("y")


@pytest.mark.parametrize(
    "shapes", [((4, 6),), ((24,), (4, 6)), ((2, 12), (24,), (4, 6)), ((4, 6, 1), (4, 6)), ((24,), (4, -1))], ids=str
)
def test_a_shape_that_comes_back_is_no_other_weight(shapes: tuple[tuple[int, ...], ...]) -> None:
    model = tied(*shapes)
    copy = ir.from_proto(model)
    unite_views(copy.graph)
    assert not any(node.op_type == "Reshape" and node.outputs[0].uses() for node in copy.graph)
    feed = inputs_of(model, 5)
    assert np.array_equal(run(copy, feed)["y"], run(model, feed)["y"])


def test_another_order_is_another_weight() -> None:
    net = Net()
    hidden = net.op("MatMul", net.input("x", "N", 6), net.weight("w", 6, 4))
    turned = net.op("Transpose", "w", perm=[1, 0])
    mixed = net.op("Reshape", "w", net.ints(4, 6))
    net.op("Add", net.op("MatMul", hidden, turned), net.op("MatMul", hidden, mixed), out="y")
    model = net.proto("y")
    copy = ir.from_proto(model)
    unite_views(copy.graph)
    assert [node.op_type for node in copy.graph].count("Reshape") == 1
    feed = inputs_of(model, 5)
    assert np.array_equal(run(copy, feed)["y"], run(model, feed)["y"])
