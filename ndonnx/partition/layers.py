"""Layers: every operator with a weight of its own as a neighbourhood, whether or not it has a width inside.

For methods that need no width. A bias that is added afterwards belongs to it; activations and norms behind join as they
do for any neighbourhood. All of a model falls into layers with `--granularity layer`; otherwise those methods get them
where no width is inside.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import onnx_ir as ir

from ndonnx.graph.costs import constant_of, dims, is_weight, parameters_of
from ndonnx.graph.dataflow import STANDARD_DOMAINS, Dataflow
from ndonnx.partition.boundaries import can_be_boundary
from ndonnx.partition.channels.groups import find_groups
from ndonnx.partition.runs import Run
from ndonnx.partition.slices import region_nodes

_WEIGHT_INPUTS = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (1, 0), "MatMul": (1, 0)}
"""Inputs of the linear operators at which a constant is their weight."""

LINEAR_OPERATORS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_NEGLIGIBLE = 0.01
"""Part of the model's weights below which all that is left over together is not worth regions of its own."""


def leftover_runs(
    flow: Dataflow, runs: Sequence[Run], operators: frozenset[str], cuts: Collection[ir.Value] = ()
) -> list[Run]:
    """Layers of these operators that lie in none of the runs, the largest, until what is left is negligible."""
    taken = {node for run in runs for node in region_nodes(flow, run.entry, run.exit)[0]}
    free = [run for run in layer_runs(flow, cuts, operators) if not taken & _made_by(flow, run)]
    free.sort(key=lambda run: -run.weights)
    left = sum(run.weights for run in free)
    least = _NEGLIGIBLE * parameters_of(flow.graph)
    found = []
    for run in free:
        if left < least:
            break
        found.append(run)
        left -= run.weights
    return found


def _made_by(flow: Dataflow, run: Run) -> set[ir.Node]:
    nodes, _ = region_nodes(flow, run.entry, run.exit)
    return {node for node in nodes if flow.is_stream(node.outputs[0])}


def layer_runs(
    flow: Dataflow, cuts: Collection[ir.Value] = (), operators: frozenset[str] = LINEAR_OPERATORS
) -> list[Run]:
    """Regions of one operator each, in the graph's order.

    Left out are those whose weight one operator reads twice, those that read no value of the stream besides constants,
    or several, and those whose ends cannot be captured.

    Args:
        flow: of the model.
        cuts: values that no region may have inside.
        operators: that are meant.
    """
    runs = []
    for node in flow.graph:
        weight = _weight(node) if node.op_type in operators else None
        if weight is None or weight.is_graph_output():
            continue
        data = flow.stream_reads(node)
        output = node.outputs[0]
        if len(data) != 1 or output not in flow.flow or sum(value is weight for value in node.inputs) != 1:
            continue
        exit_ = output if output in cuts else _behind_bias(output)
        if not all(can_be_boundary(value) for value in (data[0], exit_)):
            continue
        nodes, _ = region_nodes(flow, data[0], exit_)
        groups = find_groups(nodes, exit_)
        size = weight.const_value.size if weight.const_value is not None else 0
        touched = size if weight.name in groups.weights() else 0
        runs.append(Run(data[0], exit_, groups, size, touched, len(nodes), len(weight.uses()) > 1))
    return runs


def why_left_out(nodes: Iterable[ir.Node]) -> str:
    """Why nodes with weights are no layers."""
    del nodes
    return "no linear operator with a constant weight and one input that varies"


def why_left_over(nodes: Iterable[ir.Node]) -> str:
    """Why nodes with weights are in no region, where those without a width inside may be some too."""
    weights = [weight for node in nodes if (weight := _weight(node)) is not None]
    if weights and all(len(weight.uses()) == 1 for weight in weights):
        return "no width to shrink inside, and too few weights to be worth a region, or more than one input that varies"
    return f"no width to shrink inside, and {why_left_out(nodes)}"


def weight_slot(node: ir.Node) -> int | None:
    """Which input of a linear operator is its constant weight of two axes or more; None for other nodes."""
    slots = _WEIGHT_INPUTS.get(node.op_type, ()) if node.domain in STANDARD_DOMAINS else ()
    return next((slot for slot in slots if _is_matrix(node.inputs[slot])), None)


def _is_table(node: ir.Node) -> bool:
    """Whether rows of a float matrix are looked up."""
    if node.op_type != "Gather" or node.domain not in STANDARD_DOMAINS or not _is_matrix(node.inputs[0]):
        return False
    axis, shape = node.attributes.get("axis"), dims(node.inputs[0])
    return shape is not None and len(shape) == 2 and (axis is None or axis.as_int() == 0)


def _is_matrix(value: ir.Value | None) -> bool:
    if value is None or not value.is_initializer() or value.const_value is None:
        return False
    return is_weight(value) and len(value.const_value.shape) > 1


def _weight(node: ir.Node) -> ir.Value | None:
    slot = 0 if _is_table(node) else weight_slot(node)
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
