"""Target shapes as constants: `Reshape`, `Expand` and `Slice` take them from the graph's own shapes without need.

A number that a graph computes from one of its shapes is a riddle when channels go: it follows some widths
and not others. Where the sizes are known, a constant says the same, and a rule can see what it stands for.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ndonnx.graph.costs import constant_of
from ndonnx.graph.dataflow import STANDARD_DOMAINS, sub_graphs
from ndonnx.graph.initializers import add_constant
from ndonnx.graph.shapes.lengths import Axes, lengths_read
from ndonnx.graph.shapes.symbolic import known_numbers

_READERS = "ndonnx.shape_readers"
"""Key of a value's metadata."""
_LONGEST = 256
"""Nodes between a shape and a target up to which one is followed to the other."""
_NEAR = 3
"""Operators between two reshapes of which the second undoes the first."""


def shape_readers(value: ir.Value) -> Mapping[str, Axes]:
    """Nodes (their first outputs) that read lengths of this value in the model as it was, but no longer do.

    With each node the axes whose lengths it read: its target shape is a constant now.
    """
    readers: Mapping[str, Axes] = value.meta.get(_READERS, {})
    return readers


def _remember(node: ir.Node, measured: Mapping[ir.Value, Axes]) -> None:
    reader = node.outputs[0].name or ""
    for value, axes in measured.items():
        readers = shape_readers(value)
        value.meta[_READERS] = {**readers, reader: _both(readers.get(reader, frozenset()), axes)}


def _both(one: Axes, other: Axes) -> Axes:
    return None if one is None or other is None else one | other


def write_targets(model: ir.Model) -> bool:
    """Put constants for computed target shapes wherever they mean the same; whether there were any. In place.

    Who read whose shape is remembered, see `shape_readers`: students go into the model as it was.
    """
    changed = False
    for node in model.graph:
        rule = _RULES.get(node.op_type) if node.domain in STANDARD_DOMAINS and len(node.inputs) == 2 else None
        if rule is None or constant_of(node.inputs[1]) is not None:
            continue
        if _gives_back(node):
            continue
        before, after = (_sizes(value) for value in (node.inputs[0], node.outputs[0]))
        target = rule(before, after) if before is not None and after is not None else None
        means_zero = "allowzero" in node.attributes and node.attributes["allowzero"].as_int() != 0
        measured = _measured(node.inputs[1])
        if target is None or measured is None or (means_zero and 0 in target):
            continue
        _remember(node, measured)
        _write(model.graph, node, 1, np.array(target, dtype=np.int64))
        changed = True
    return changed | _write_bounds(model)


def _gives_back(node: ir.Node) -> bool:
    """Whether a `Reshape` takes its target from the very value that it gives its shape back to (a group norm).

    That follows every width by itself, and is the same at all levels that a head is shared over.
    """
    shape, value = node.inputs[1], node.inputs[0]
    reader = shape.producer() if shape is not None else None
    if node.op_type != "Reshape" or reader is None or reader.op_type != "Shape":
        return False
    if "end" in reader.attributes or ("start" in reader.attributes and reader.attributes["start"].as_int()):
        return False
    for _ in range(_NEAR):
        before = value.producer() if value is not None else None
        if before is None or not before.inputs:
            return False
        value = before.inputs[0]
        if value is reader.inputs[0]:
            return True
    return False


def _write_bounds(model: ir.Model) -> bool:
    """Put constants for bounds of `Slice` that are computed from known lengths (halves of the channels)."""
    cut = [node for node in model.graph if node.op_type == "Slice" and node.domain in STANDARD_DOMAINS]
    bounds = [(node, slot) for node in cut for slot in range(1, len(node.inputs)) if _is_computed(node, slot)]
    numbers = known_numbers(model) if bounds else {}
    changed = False
    for node, slot in bounds:
        value = node.inputs[slot]
        found, measured = (numbers.get(value), _measured(value)) if value is not None else (None, None)
        if value is None or found is None or measured is None or not all(type(n) is int for n in found.reshape(-1)):
            continue
        _remember(node, measured)
        _write(model.graph, node, slot, found.astype(np.int32 if value.dtype == ir.DataType.INT32 else np.int64))
        changed = True
    return changed


def _is_computed(node: ir.Node, slot: int) -> bool:
    """Whether a bound of a cut through activations is no constant; lists of sizes are cut as the graph says."""
    value, data = node.inputs[slot], node.inputs[0]
    is_list = data is None or data.dtype is None or not data.dtype.is_floating_point()
    return value is not None and constant_of(value) is None and not is_list


def note_reader(node: ir.Node, read: ir.Value) -> bool:
    """Remember that a node reads the shapes that a value is computed from: it will do without that value.

    Returns False, and remembers nothing, where the value is computed from more than shapes.
    """
    measured = _measured(read)
    _remember(node, measured or {})
    return measured is not None


def _measured(target: ir.Value | None) -> dict[ir.Value, Axes] | None:
    """The values, and their axes, whose lengths a target is computed from; None where it is computed from more."""
    found: dict[ir.Value, Axes] = {}
    seen: set[ir.Node] = set()
    stack = [target]
    while stack:
        value = stack.pop()
        node = value.producer() if value is not None else None
        if value is None or value.is_initializer() or node in seen:
            continue
        if node is None or len(seen) == _LONGEST or any(True for _ in sub_graphs(node)):
            return None
        seen.add(node)
        if (read := lengths_read(node)) is not None:
            measured, axes = read
            found[measured] = _both(found.get(measured, frozenset()), axes)
        else:
            stack.extend(node.inputs)
    return found


def _sizes(value: ir.Value | None) -> list[int | str] | None:
    if value is None or value.shape is None:
        return None
    sizes = [size if isinstance(size, int) else size.value for size in value.shape]
    return None if 0 in sizes else [size for size in sizes if size is not None] if None not in sizes else None


def _reshaped(before: list[int | str], after: list[int | str]) -> list[int] | None:
    """Numbers as they are, 0 for a size that stays at its place, -1 for what the others leave."""
    stays = [axis < len(before) and before[axis] == size for axis, size in enumerate(after)]
    target = [size if isinstance(size, int) else 0 if same else -1 for size, same in zip(after, stays, strict=True)]
    return target if target.count(-1) <= 1 else None


def _expanded(before: list[int | str], after: list[int | str]) -> list[int] | None:
    """Numbers as they are, 1 for a size that is not widened."""
    given = [1] * (len(after) - len(before)) + before
    target = [
        size if isinstance(size, int) else 1 if size == old else None for size, old in zip(after, given, strict=True)
    ]
    known = [size for size in target if size is not None]
    return known if len(known) == len(target) else None


_RULES = {"Expand": _expanded, "Reshape": _reshaped}


def _write(graph: ir.Graph, node: ir.Node, slot: int, array: npt.NDArray[np.integer]) -> None:
    name = f"{node.outputs[0].name}/{'target' if slot == 1 else f'target{slot}'}"
    node.replace_input_with(slot, add_constant(graph, name, array))
