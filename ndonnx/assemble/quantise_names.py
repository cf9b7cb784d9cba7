"""Short names for what quantisation adds: of a small model, names built of the teacher's take a tenth of the file."""

from __future__ import annotations

from collections.abc import Collection
from itertools import count

import onnx_ir as ir

_STEPS = frozenset({"QuantizeLinear", "DequantizeLinear"})


def names_in(model: ir.Model) -> frozenset[str | None]:
    """Names of all values and nodes of a model's main graph."""
    return frozenset(ir.convenience.create_value_mapping(model.graph)) | {node.name for node in model.graph}


def shorten_names(model: ir.Model, before: Collection[str | None]) -> None:
    """Rename what is new in a quantised model, in place; of new constants that are equal one is left.

    Args:
        model: just quantised.
        before: names that the float model has too, which stay.
    """
    _join_constants(model.graph, before)
    outputs = {value.name for value in model.graph.outputs}
    free = (name for number in count() if (name := f"q{number}") not in before and name not in outputs)
    values = [value for node in model.graph for value in node.outputs if value.name not in outputs]
    for named in (*values, *list(model.graph.initializers.values()), *model.graph):
        if named.name and named.name not in before:
            named.name = next(free)


def _join_constants(graph: ir.Graph, before: Collection[str | None]) -> None:
    """Let new scales and zero points that are equal be one initializer."""
    known: dict[tuple[object, ...], ir.Value] = {}
    for value in list(graph.initializers.values()):
        tensor, readers = value.const_value, [use.node.op_type for use in value.uses()]
        if tensor is None or value.name in before or not _STEPS.issuperset(readers):
            continue
        same = known.setdefault((tensor.dtype, tuple(tensor.shape), tensor.tobytes()), value)
        if same is not value:
            for use in list(value.uses()):
                use.node.replace_input_with(use.idx, same)
            del graph.initializers[value.name or ""]
