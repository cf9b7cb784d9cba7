"""Control flow that decides nothing: the branch that an `If` always takes, in the place of the `If`.

What it decides by may be a constant, an input that has one value for all samples (a sampling rate), or the number of
axes of a value, which TorchScript exports ask for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from ndonnx.graph.dataflow import STANDARD_DOMAINS, Kind, kinds_of, sub_graphs
from ndonnx.graph.load import add_initializer
from ndonnx.graph.passes.normalise import evaluate_constants
from ndonnx.graph.shapes.declared import copy_of
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.graph.shapes.symbolic import known_numbers


def fix_inputs(model: ir.Model, fixed: Mapping[str, NDArray[Any]]) -> ir.Model:
    """Give inputs one value for good: they become initializers of the same name. In place; returns the model."""
    graph = model.graph
    for value in [value for value in graph.inputs if value.name in fixed and value.name not in graph.initializers]:
        tensor = ir.tensor(fixed[value.name or ""], name=value.name)
        graph.inputs.remove(value)
        value.const_value, value.shape, value.type = tensor, ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
        graph.register_initializer(value)
    return model


def open_branches(model: ir.Model, fixed: Mapping[str, NDArray[Any]] | None = None) -> ir.Model:
    """The model with the branches that are always taken in the place of their `If`; itself where there are none.

    Args:
        model: as loaded; not changed. Inputs and outputs, names and other nodes survive in the copy.
        fixed: inputs that have one value for all samples.
    """
    opened = model
    while taken := _taken(opened, fixed or {}):
        if opened is model:
            opened = copy_of(model)
            taken = _taken(opened, fixed or {})
        for node, branch in taken.items():
            _put_in_place(opened, node, branch)
        _drop_unread(opened.graph, before=model.graph)
        infer_shapes(opened)
    return opened


def _taken(model: ir.Model, fixed: Mapping[str, NDArray[Any]]) -> dict[ir.Node, str]:
    """For every `If` of which the answer is known, the attribute that holds the branch."""
    ifs = [node for node in model.graph if node.op_type == "If" and node.domain in STANDARD_DOMAINS]
    if not ifs:
        return {}
    names = {node.inputs[0].name: node for node in ifs if node.inputs[0] is not None}
    settled = fix_inputs(model.clone(), fixed)
    asked = {
        value.name: value
        for value in (node.inputs[0] for node in settled.graph if node.op_type == "If")
        if value is not None and value.name in names
    }
    kinds = kinds_of(settled.graph)
    constant = [value for value in asked.values() if kinds.get(value, Kind.CONSTANT) is Kind.CONSTANT]
    answers = dict(zip((value.name for value in constant), evaluate_constants(settled, constant), strict=True))
    found: dict[str | None, bool] = {name: bool(array.reshape(-1)[0]) for name, array in answers.items()}
    for value, numbers in known_numbers(settled).items():
        answer = numbers.reshape(-1)[0] if value in asked.values() and numbers.size == 1 else None
        if isinstance(answer, bool | int):
            found.setdefault(value.name, bool(answer))
    return {
        node: "then_branch" if found[name] else "else_branch"
        for node in ifs
        if node.inputs[0] is not None and (name := node.inputs[0].name) in found
    }


def _put_in_place(model: ir.Model, node: ir.Node, attribute: str) -> None:
    """Put the nodes of a branch in front of the node that holds it, which goes; its outputs keep their names."""
    graph, branch = model.graph, node.attributes[attribute].as_graph()
    _rename(branch, set(_names_beside(graph, node)))
    for value in list(branch.initializers.values()):
        del branch.initializers[value.name or ""]
        add_initializer(model, value)
    nodes = list(branch)
    ends = list(branch.outputs)
    branch.outputs.clear()
    branch.remove(nodes)
    graph.insert_before(node, nodes)
    for old, inner in zip(node.outputs, ends, strict=True):
        same = ir.node("Identity", [inner], name=f"{old.name}/taken")
        new, name = same.outputs[0], old.name
        new.type, new.shape = old.type or inner.type, old.shape or inner.shape
        graph.insert_before(node, same)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = f"{name}/if", name
    graph.remove(node, safe=True)


def _drop_unread(graph: ir.Graph, before: ir.Graph) -> None:
    """Drop what only the other branches read."""
    dead = {value.name for node in before for value in node.outputs if not _is_read(value)}
    for node in reversed(list(graph)):
        if not any(_is_read(value) or value.name in dead for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        was_read = name not in before.initializers or _is_read(before.initializers[name])
        if was_read and not _is_read(value):
            del graph.initializers[name]
            if value in graph.inputs:
                graph.inputs.remove(value)


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _rename(branch: ir.Graph, taken: Collection[str]) -> None:
    """Give a branch's values names that nothing outside it has."""
    used = set(taken) | set(_names(branch))
    for value in _own_values(branch):
        if value.name in taken:
            name = value.name or ""
            while name in used:
                name += "'"
            used.add(name)
            if value.is_initializer():
                del branch.initializers[value.name or ""]
                value.name = name
                branch.register_initializer(value)
            else:
                value.name = name


def _names_beside(graph: ir.Graph, node: ir.Node) -> Iterator[str]:
    """Names of the values of a graph and of those inside it, but for those inside one node."""
    yield from (value.name or "" for value in _own_values(graph))
    for inner in (inner for other in graph if other is not node for inner in sub_graphs(other)):
        yield from _names(inner)


def _names(graph: ir.Graph) -> Iterator[str]:
    """Names of the values of a graph and of those inside it."""
    yield from (value.name or "" for value in _own_values(graph))
    for node in graph:
        for inner in sub_graphs(node):
            yield from _names(inner)


def _own_values(graph: ir.Graph) -> list[ir.Value]:
    made = (value for node in graph for value in node.outputs)
    return [value for value in (*graph.inputs, *graph.initializers.values(), *made) if value.name]
