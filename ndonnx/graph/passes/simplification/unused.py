"""What does nothing: nodes that nobody reads, copies, and constants that are computed anew in every run."""

from __future__ import annotations

import math

import onnx_ir as ir

from ndonnx.graph.costs import constant_of
from ndonnx.graph.dataflow import Kind, kinds_of
from ndonnx.graph.passes.fused_writer import input_of
from ndonnx.graph.passes.normalise import evaluate_constants
from ndonnx.graph.passes.simplification.editor import FLOATS, Editor

_SMALL = 4096
"""Bytes that a constant may take which is not the only one made of what it is made of."""


def drop_unused(editor: Editor) -> bool:
    """Drop dead nodes, copies and unread initializers, and hold small computed constants; whether there were any."""
    dead = _drop_dead(editor)
    copies = [_drop_copy(editor, node) for node in editor.nodes("Identity", "Dropout", "Cast")]
    return hold_constants(editor) or dead or any(copies)


def _drop_dead(editor: Editor) -> bool:
    graph, found = editor.graph, False
    for node in editor.nodes_backwards():
        if not any(value.uses() or not editor.is_free(value) for value in node.outputs if value.name):
            editor.remove(node)
            found = True
    for value in list(graph.initializers.values()):
        if not value.uses() and editor.is_free(value):
            found |= value not in graph.inputs
            editor.drop_unread([value])
    return found


def _drop_copy(editor: Editor, node: ir.Node) -> bool:
    """A node that hands on what it reads, where its output's name is not asked for."""
    data, output = input_of(node, 0), node.outputs[0]
    if data is None or not editor.is_free(output) or not _is_copy(editor, node):
        return False
    output.replace_all_uses_with(data)
    editor.remove(node)
    return True


def _is_copy(editor: Editor, node: ir.Node) -> bool:
    if node.op_type == "Identity":
        return True
    if node.op_type == "Cast":
        data = node.inputs[0]
        return data is not None and data.dtype is not None and int(data.dtype) == node.attributes["to"].as_int()
    training = input_of(node, 2)
    mode = constant_of(training)
    trains = training is not None and (mode is None or bool(mode.numpy().any()))
    return not trains and not any(value.uses() or value.is_graph_output() for value in node.outputs[1:])


def hold_constants(editor: Editor) -> bool:
    """Floats that nodes make of constants alone as initializers of the same name, where that takes no more room."""
    graph, kinds = editor.graph, kinds_of(editor.graph)
    wanted = [
        value
        for node in graph
        for value in node.outputs
        if kinds[value] is Kind.CONSTANT
        and value.dtype in FLOATS
        and editor.is_free(value)
        and any(kinds.get(user.outputs[0]) is not Kind.CONSTANT for user in value.consumers())
        and (constant_of(value) is not None or _takes_no_more(editor, value))
    ]
    for value, array in zip(wanted, evaluate_constants(editor.model, wanted), strict=True):
        name, before = value.name or "", value.producer()
        value.name = None
        value.replace_all_uses_with(editor.initializer(name, array))
        if before is not None and not any(other.uses() or other.is_graph_output() for other in before.outputs):
            editor.remove(before)
    return bool(wanted)


def _takes_no_more(editor: Editor, value: ir.Value) -> bool:
    """Whether a computed constant is small, or no larger than what it alone is made of; callers cannot change it."""
    sources, alone = _sources(value)
    if value.shape is None or not value.shape.is_static() or value.dtype is None:
        return False
    if any(source.is_graph_input() for source in sources):
        return False
    size = math.prod(value.shape.numpy()) * value.dtype.itemsize
    held = (constant_of(source) for source in sources)
    return size <= _SMALL or (alone and size <= sum(tensor.nbytes for tensor in held if tensor is not None))


def _sources(value: ir.Value) -> tuple[list[ir.Value], bool]:
    """The constants that a value is made of, and whether nothing but it is made of them."""
    found, stack, alone = [], [value], True
    while stack:
        current = stack.pop()
        node = current.producer()
        alone = alone and (current is value or len(current.uses()) == 1)
        if node is None or constant_of(current) is not None:
            found.append(current)
        else:
            stack += [read for read in node.inputs if read is not None]
    return found, alone
