"""Why a piece of the teacher is kept, in one line that names the operators to blame."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from ndonnx.graph.costs import parameters_of
from ndonnx.partition.channels.group import UNREAD, FrozenWidth
from ndonnx.partition.channels.groups import frozen_widths
from ndonnx.partition.slices import is_opaque

Why = Callable[[list[ir.Node]], str]
"""From nodes with weights to the reason why they are kept."""

_NAMED = 3
"""Operators that a reason names at the most."""
_QUANTISED = {
    "ConvInteger", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul",
    "QuantizeLinear",
}  # fmt: skip


def why_kept(nodes: list[ir.Node], why: Why) -> str:
    """The reason for nodes that are in no chosen region; `why` gives that of nodes with weights."""
    opaque = next((node for node in nodes if is_opaque(node)), None)
    if opaque is not None:
        name = f"{opaque.domain}::{opaque.op_type}" if opaque.domain else opaque.op_type
        trees = opaque.op_type.startswith("TreeEnsemble") and parameters_of(nodes) == 0
        return (
            f"nothing to distil: {name} holds trees, no weights" if trees else f"holds {name}, which cannot be trained"
        )
    if parameters_of(nodes) == 0:
        return "quantised: stays as it is" if any(map(_is_quantised, nodes)) else "holds no weights"
    return why(nodes)


def _is_quantised(node: ir.Node) -> bool:
    makers = (value.producer() for value in node.inputs if value is not None)
    return any(each is not None and each.op_type in _QUANTISED for each in (node, *makers))


def no_width(nodes: list[ir.Node]) -> str:
    """Why nodes with weights have no width to shrink inside."""
    frozen, free = frozen_widths(nodes)
    if stops := _operators(frozen):
        return f"no width to shrink inside: channels are not followed through {stops}"
    if free:
        return "no width to shrink inside: no region with one entry and one exit holds its channels"
    if frozen and all(width.operator == UNREAD for width in frozen):
        return "no width to shrink inside: no weight sums over its channels"
    return "no width to shrink inside: its channels reach its ends"


def partly_frozen(frozen: Sequence[FrozenWidth]) -> str | None:
    """What to say of a neighbourhood that can be distilled and in which operators hold on to other channels."""
    stops = _operators(frozen)
    return f"not all of it: channels are not followed through {stops}" if stops else None


def _operators(frozen: Sequence[FrozenWidth]) -> str:
    """The operators to blame, those that hold most channels first."""
    held: dict[str, int] = {}
    for width in frozen:
        if width.node:
            label = f"{width.operator} '{width.node}'"
            held[label] = held.get(label, 0) + width.width
    names = sorted(held, key=lambda name: -held[name])
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
