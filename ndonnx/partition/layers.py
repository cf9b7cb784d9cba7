"""Layers: every linear operator with a weight of its own as a neighbourhood, whether or not it has a width inside.

For methods that change weights and not shapes. A bias that is added afterwards belongs to it;
activations and norms behind join as they do for any neighbourhood.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import onnx_ir as ir

from ndonnx.graph.costs import constant_of, is_weight
from ndonnx.graph.dataflow import STANDARD_DOMAINS, Dataflow
from ndonnx.partition.boundaries import can_be_boundary
from ndonnx.partition.groups import find_groups
from ndonnx.partition.runs import Run
from ndonnx.partition.slices import region_nodes

_WEIGHT_INPUTS = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (1, 0), "MatMul": (1, 0)}
"""Inputs of the linear operators at which a constant is their weight."""


def layer_runs(flow: Dataflow, cuts: Collection[ir.Value] = ()) -> list[Run]:
    """Regions of one linear operator each, in the graph's order.

    Left out are those whose weight another operator reads too (a layer of its own would need a second
    one), those that read no value of the stream besides constants, or several, and those whose ends cannot be
    captured.
    """
    runs = []
    for node in flow.graph:
        weight = _weight(node)
        if weight is None or len(weight.uses()) != 1 or weight.is_graph_output():
            continue
        data = flow.stream_reads(node)
        output = node.outputs[0]
        if len(data) != 1 or output not in flow.flow:
            continue
        exit_ = output if output in cuts else _behind_bias(output)
        if not all(can_be_boundary(value) for value in (data[0], exit_)):
            continue
        nodes, _ = region_nodes(flow, data[0], exit_)
        groups = find_groups(nodes, exit_)
        size = weight.const_value.size if weight.const_value is not None else 0
        runs.append(Run(data[0], exit_, groups, size, size if weight.name in groups.weights() else 0, len(nodes)))
    return runs


def why_left_out(nodes: Iterable[ir.Node]) -> str:
    """Why nodes with weights are no layers."""
    weights = (weight for node in nodes if (weight := _weight(node)) is not None)
    shared = next((weight.name for weight in weights if len(weight.uses()) > 1), None)
    if shared is not None:
        return f"shares the weight '{shared}' with another operator"
    return "no linear operator with a constant weight and one input that varies"


def weight_slot(node: ir.Node) -> int | None:
    """Which input of a linear operator is its constant weight of two axes or more; None for other nodes."""
    slots = _WEIGHT_INPUTS.get(node.op_type, ()) if node.domain in STANDARD_DOMAINS else ()
    return next((slot for slot in slots if _is_matrix(node.inputs[slot])), None)


def _is_matrix(value: ir.Value | None) -> bool:
    if value is None or not value.is_initializer() or value.const_value is None:
        return False
    return is_weight(value) and len(value.const_value.shape) > 1


def _weight(node: ir.Node) -> ir.Value | None:
    slot = weight_slot(node)
    return node.inputs[slot] if slot is not None else None


def _behind_bias(value: ir.Value) -> ir.Value:
    """The value behind the constant that is added to a `MatMul`, where nothing else reads the product."""
    producer, users = value.producer(), value.consumers()
    if producer is None or producer.op_type != "MatMul" or len(users) != 1 or value.is_graph_output():
        return value
    (user,) = users
    if user.op_type != "Add" or user.domain not in STANDARD_DOMAINS:
        return value
    others = [other for other in user.inputs if other is not value]
    return user.outputs[0] if all(constant_of(other) is not None for other in others) else value
