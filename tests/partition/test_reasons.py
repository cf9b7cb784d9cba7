"""Reasons name the operator that holds on to a width, in the partition and in the document of `inspect`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from ndonnx.partition import Partition
from ndonnx.report.inspection import Inspection
from tests.helpers.models import Net, floats, parted


def between(middle: Callable[[Net, str], str], *, residual: bool = False) -> onnx.ModelProto:
    """Two convolutions with something between them, from an image to an image."""
    net = Net()
    x = net.input("x", "N", 8, 6, 6)
    y = net.conv(middle(net, net.conv(x, 8, 12, out="a")), 12, 8, out="b")
    return net.proto(net.op("Add", x, y) if residual else y, types={})


def cumulated(net: Net, y: str) -> str:
    return net.op("CumSum", y, net.constant("axis", np.array(1)))


def largest_of_all(net: Net, y: str) -> str:
    return net.relu(net.op("Hardmax", y, axis=1))


def convolved_over_channels(net: Net, y: str) -> str:
    turned = net.op("Transpose", y, perm=[0, 2, 1, 3])
    return net.op("Transpose", net.conv(turned, 6, 6, out="across"), perm=[0, 2, 1, 3])


def added_to_what_was_lost(net: Net, y: str) -> str:
    return net.op("Add", net.relu(cumulated(net, net.conv(y, 12, 12, out="c"))), y)


BLAMED = {
    "CumSum": cumulated,
    "Hardmax": largest_of_all,
    "Conv": convolved_over_channels,
}


def reasons(parts: Partition) -> list[str]:
    return [n.reason for n in parts.neighbourhoods if n.reason]


@pytest.mark.parametrize("operator", BLAMED)
def test_the_operator_that_holds_on_to_a_width_is_named(operator: str) -> None:
    model = between(BLAMED[operator])
    _, parts = parted(model)
    names = [node.name for node in parts.model.graph if node.op_type == operator]
    (width,) = [width for n in parts.neighbourhoods for width in n.frozen if width.value == "a"]
    assert (width.width, width.operator) == (12, operator) and width.node in names
    assert reasons(parts) == [f"no width to shrink inside: channels are not followed through {operator} '{width.node}'"]


def test_channels_that_meet_what_was_lost_are_held_by_what_lost_it() -> None:
    _, parts = parted(between(added_to_what_was_lost))
    held = {width.value: width.operator for n in parts.neighbourhoods for width in n.frozen}
    assert held["a"] == held["c"] == "CumSum"


def test_ends_are_told_from_operators() -> None:
    net = Net()
    x = net.input("x", "N", 8, 6, 6)
    _, parts = parted(net.proto(net.op("Add", net.conv(x, 8, 8), x)))
    assert reasons(parts) == ["no width to shrink inside: its channels reach its ends"]
    assert {(width.operator, width.node) for width in parts.neighbourhoods[0].frozen} == {("end", "")}


def test_channels_that_no_weight_sums_over_are_told() -> None:
    net = Net()
    y = net.op("ReduceMax", net.conv(net.input("x", "N", 8, 6, 6), 8, 12), net.ints(1))
    _, parts = parted(net.proto(y))
    assert reasons(parts) == ["no width to shrink inside: no weight sums over its channels"]


def test_inspect_tells_what_holds_on_to_a_width_beside_what_can_go() -> None:
    net = Net()
    x = net.input("x", "N", 8, 6, 6)
    held = net.conv(net.relu(net.conv(x, 8, 10, out="free")), 10, 12, out="held")
    y = net.conv(cumulated(net, held), 12, 8)
    _, parts = parted(net.proto(net.op("Add", x, y, out="y"), types={"y": floats("y", "N", 8, 6, 6)}))
    (piece,) = Inspection.of("model.onnx", parts).to_json()["neighbourhoods"]
    assert piece["widths"] == [10]
    frozen = [width for width in piece["frozen"] if width["value"] == "held"]
    assert [(width["operator"], width["width"]) for width in frozen] == [("CumSum", 12)]
    assert "CumSum" in piece["note"] and piece["reason"] is None
