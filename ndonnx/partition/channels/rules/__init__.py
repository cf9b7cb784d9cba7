"""What each operator does to the channels of its inputs: one rule per operator, one file per family.

A rule labels the weights it understands and the node's output. An operator without a rule,
or a case that its rule does not know, freezes what it reads: never guessed.
"""

from __future__ import annotations

import importlib
import pkgutil

import onnx_ir as ir

from ndonnx.partition.channels.rules.shapes import freeze_widths_calculated_with
from ndonnx.partition.channels.rules.tracker import Edit, Role, Rule, Tracker

__all__ = ["RULES", "Edit", "Role", "Tracker", "apply_rule", "has_rule"]

RULES: dict[str, Rule] = {}
"""The rule of each operator: all tables `RULES` of the files beside this one."""
for _found in pkgutil.iter_modules(__path__):
    RULES |= getattr(importlib.import_module(f"{__name__}.{_found.name}"), "RULES", {})

_READ_SHAPE_ONLY = {"Shape", "Size"}
"""What they compute follows a changed width by itself (see `shapes.py` for where it must not)."""
_KNOW_FOLDED = {"InstanceNormalization", "Reshape", "Transpose"}
"""Operators whose rules follow joined axes; for all others their channels stay."""


def apply_rule(tracker: Tracker, node: ir.Node) -> None:
    """Label the outputs and weights of one node, or freeze what it reads."""
    if node.op_type in _READ_SHAPE_ONLY:
        return
    tracker.sets.cause = node
    if not _holds(tracker, node):
        tracker.sets.cause = _to_blame(tracker, node)
        tracker.freeze_reads(node)
        tracker.freeze_weights(node)
        for value in node.outputs:
            tracker.forget(value)
    else:
        tracker.hand_on_lost(node)
    tracker.sets.cause = None


def _to_blame(tracker: Tracker, node: ir.Node) -> ir.Node | None:
    """By which node channels that meet here have to stay; None where they meet an end of the slice.

    It is the node itself, unless it would follow them if it knew all that it reads.
    """
    if not has_rule(node):
        return node
    for value in tracker.not_followed(node):
        return tracker.lost.get(value)
    return node


def has_rule(node: ir.Node) -> bool:
    """Whether channels are followed through operators of this kind at all."""
    return node.domain in ("", "ai.onnx") and (node.op_type in RULES or node.op_type in _READ_SHAPE_ONLY)


def _holds(tracker: Tracker, node: ir.Node) -> bool:
    """Apply the node's rule; False where there is none, or it does not know the case, or does not fit the shapes."""
    rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if rule is None:
        return False
    try:
        freeze_widths_calculated_with(tracker, node)
        if node.op_type not in _KNOW_FOLDED:
            for value in node.inputs:
                tracker.freeze_folded(value)
        return rule(tracker, node) and all(tracker.fits(value) for value in node.outputs)
    except _MISFITS:
        return False


_MISFITS = (ArithmeticError, AttributeError, IndexError, KeyError, MemoryError, TypeError, ValueError)
"""What a node provokes that does not fit its operator's definition: ranks, attributes or inputs that cannot be."""
