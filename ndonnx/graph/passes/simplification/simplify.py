"""The rules of the simplification, and the loop that applies them until none finds anything."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping

import numpy as np
import onnx_ir as ir

from ndonnx.graph.passes.simplification.activations import write_activations
from ndonnx.graph.passes.simplification.ahead import fold_ahead
from ndonnx.graph.passes.simplification.behind import fold_behind
from ndonnx.graph.passes.simplification.chains import combine_chains
from ndonnx.graph.passes.simplification.editor import Editor
from ndonnx.graph.passes.simplification.unused import drop_unused
from ndonnx.graph.shapes.declared import copy_of
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.runtime.fingerprints import fingerprint
from ndonnx.runtime.gc_pause import gc_paused

RULES: Mapping[str, Callable[[Editor], bool]] = {
    "unused": drop_unused,
    "behind": fold_behind,
    "chains": combine_chains,
    "activations": write_activations,
    "ahead": fold_ahead,
}
"""By name: each works in place and says whether it changed anything."""
_OPSET = 7
"""From which operators broadcast as numpy does."""
_MOST_ROUNDS = 50


@gc_paused()
def simplify(model: ir.Model, keep: Collection[str] = (), rules: Collection[str] = tuple(RULES)) -> ir.Model:
    """The same function in fewer nodes, exact but for rounding; the model itself where there is nothing to do.

    Numbers are folded in float64 and rounded once. Weights that several nodes read, other types than float32 and
    float64, operators of other domains and what lies inside control flow stay as they are.

    Args:
        model: as loaded; not changed. Inputs, outputs, opset and metadata survive, and a value of the copy that has the
            name of one of the model holds the same.
        keep: further values that stay under their names.
        rules: names of `RULES`.
    """
    copy = copy_of(model)
    editor = Editor(copy, frozenset(keep))
    if editor.opset < _OPSET:
        return model
    changed = False
    with np.errstate(all="ignore"):  # what is not finite is refused where it would be used
        for _ in range(_MOST_ROUNDS):
            found = [rule(editor) for name, rule in RULES.items() if name in rules]
            if not any(found):
                break
            changed = True
    return infer_shapes(copy) if changed else model


def nodes_in(model: ir.Model) -> int:
    """Nodes of the main graph that compute something."""
    return sum(node.op_type != "Constant" for node in model.graph)


def change_key(model: ir.Model, simplified: ir.Model) -> str:
    """Fingerprint of what is other in a simplified model; empty where nothing is."""
    if simplified is model:
        return ""
    held = {id(value.const_value) for value in model.graph.initializers.values()}
    weights = {
        name: hashlib.blake2b(tensor.tobytes(), digest_size=16).hexdigest()
        for name, value in simplified.graph.initializers.items()
        if (tensor := value.const_value) is not None and id(tensor) not in held
    }
    return fingerprint([_described(node) for node in simplified.graph], weights)


def _described(node: ir.Node) -> list[str | list[str]]:
    names = [[value.name or "" if value is not None else "" for value in side] for side in (node.inputs, node.outputs)]
    return [
        node.op_type,
        *names,
        [str(attribute) for attribute in node.attributes.values() if attribute.type in _PLAIN],
    ]


_PLAIN = {ir.AttributeType.FLOAT, ir.AttributeType.INT, ir.AttributeType.INTS}
