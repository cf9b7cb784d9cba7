"""Several outputs side by side as one, so that a model with many is trained as one with a single output is."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from ndonnx.graph.initializers import unique_name

PACKED = "packed outputs"
"""Name of the one output that is left, unless the model has a value of that name."""


def pack_outputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """Let a model give some of its outputs as one of shape (samples, numbers), in this order; in place.

    A single output stays as it is.

    Args:
        model: its outputs have their samples along the first axis.
        names: of float outputs; all others are left out.
    """
    graph = model.graph
    outputs = {value.name: value for value in graph.outputs}
    wanted = [outputs[name] for name in names]
    if len(wanted) > 1:
        flat = [ir.node("Flatten", [value], attributes={"axis": 1}) for value in wanted]
        packed = ir.node("Concat", [node.outputs[0] for node in flat], attributes={"axis": 1})
        for number, node in enumerate((*flat, packed)):
            node.name = node.outputs[0].name = unique_name(graph, PACKED if node is packed else f"{PACKED}/{number}")
            graph.append(node)
        packed.outputs[0].type = wanted[0].type
        packed.outputs[0].shape = ir.Shape([wanted[0].shape[0] if wanted[0].shape else None, None])
        wanted = [packed.outputs[0]]
    graph.outputs[:] = wanted
    return model
