"""Students into the teacher: each takes its neighbourhood's place, everything else stays untouched."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

import numpy as np
import onnx_ir as ir

from ndonnx.graph.dataflow import reads
from ndonnx.graph.load import infer_shapes


def is_changed(student: ir.Model, slice_: ir.Model) -> bool:
    """Whether a student differs from the slice that it would replace: only then is it spliced in.

    A student that is the teacher's slice (multiplier 1, no steps) leaves the teacher's own nodes
    in place, so that the answer stays the same to the last bit.
    """
    old, new = slice_.graph.initializers, student.graph.initializers
    if set(old) != set(new) or _operators(slice_) != _operators(student):
        return True
    return any(not np.array_equal(_array(old[name]), _array(new[name])) for name in old)


def _operators(model: ir.Model) -> list[str]:
    return sorted(node.op_type for node in model.graph)


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()


def splice(teacher: ir.Model, students: Mapping[str, ir.Model]) -> ir.Model:
    """A copy of the teacher with students in it.

    Args:
        teacher: as loaded; not changed. Its names, opset, metadata and outer nodes survive.
        students: by the name of the neighbourhood, for unique names; each is a model whose
            inputs are values of the teacher and whose one output is the value it replaces.

    Raises:
        KeyError: a student reads or makes a value that the teacher does not have.
    """
    model = teacher.clone()
    for name, student in students.items():
        _replace(model, name, student.clone())
    return infer_shapes(model)


def _replace(model: ir.Model, name: str, student: ir.Model) -> None:
    graph = model.graph
    values = ir.convenience.create_value_mapping(graph, include_subgraphs=False)
    exit_ = values[student.graph.outputs[0].name or ""]
    producer = exit_.producer()
    if producer is None:
        raise KeyError(f"{name}: '{exit_.name}' is made by no node")
    inputs = {value: values[value.name or ""] for value in student.graph.inputs}
    slot = _detach(graph, exit_, producer, set(inputs.values()))
    for value, outer in inputs.items():
        value.replace_all_uses_with(outer)
    _rename_clashes(graph, student.graph, name)
    _adopt_initializers(model, student.graph)
    nodes = list(student.graph)
    output = student.graph.outputs[0]
    _forget_shapes(nodes, output)
    student.graph.outputs.clear()
    student.graph.remove(nodes)
    graph.insert_before(slot, nodes)
    old = slot.outputs[0]
    output.type, output.shape = old.type, old.shape
    old.replace_all_uses_with(output, replace_graph_outputs=True)
    output.name = exit_.name
    graph.remove(slot, safe=True)
    for domain, version in student.opset_imports.items():
        model.opset_imports.setdefault(domain, version)


def _forget_shapes(nodes: Iterable[ir.Node], output: ir.Value) -> None:
    """Drop inferred shapes: their made-up symbols (`unk__1`) mean other sizes than the same ones in the teacher."""
    for node in nodes:
        for value in node.outputs:
            if value is not output:
                value.shape = None


def _detach(graph: ir.Graph, exit_: ir.Value, producer: ir.Node, inputs: set[ir.Value]) -> ir.Node:
    """Cut the old neighbourhood off its readers and remove what nothing reads any more.

    Returns a stand-in node at the place where the student goes.
    """
    slot = ir.node("Identity", [], name="slot")
    slot.outputs[0].name, slot.outputs[0].type, slot.outputs[0].shape = "slot", exit_.type, exit_.shape
    graph.insert_after(producer, slot)
    exit_.replace_all_uses_with(slot.outputs[0], replace_graph_outputs=True)
    _remove_dead(graph, producer, inputs)
    return slot


def _remove_dead(graph: ir.Graph, start: ir.Node, living: set[ir.Value]) -> None:
    """Remove a node and then whatever only it read, as far back as the values that will be read again."""
    stack = [start]
    while stack:
        node = stack.pop()
        in_use = any(value.uses() or value.is_graph_output() or value in living for value in node.outputs)
        if in_use or node.graph is not graph:
            continue
        read = list(dict.fromkeys(reads(node)))
        graph.remove(node, safe=True)
        stack.extend(before for value in read if (before := value.producer()) is not None)
        for value in read:
            if value.is_initializer() and not value.uses() and not value.is_graph_output():
                del graph.initializers[value.name or ""]
                if value in graph.inputs:
                    graph.inputs.remove(value)


def _rename_clashes(graph: ir.Graph, student: ir.Graph, name: str) -> None:
    """Give the student's values and nodes names that the rest of the model does not use; equal weights become one."""
    values, own_values = (_names(ir.convenience.create_value_mapping(g).values()) for g in (graph, student))
    nodes, own_nodes = (_names(g) for g in (graph, student))
    boundary = set(student.inputs) | set(student.outputs)
    for value in list(student.initializers.values()):
        held = graph.initializers.get(value.name or "")
        if held is not None and _equal(held.const_value, value.const_value):
            value.replace_all_uses_with(held)
            del student.initializers[value.name or ""]
        elif value.name in values:
            value.name = _free(f"{value.name}/{name}", values, own_values)
    for node in student:
        for value in node.outputs:
            if value not in boundary and value.name in values:
                value.name = _free(f"{value.name}/{name}", values, own_values)
        if node.name and node.name in nodes:
            node.name = _free(f"{node.name}/{name}", nodes, own_nodes)


def _names(named: Iterable[ir.Value | ir.Node]) -> set[str | None]:
    return {item.name for item in named}


def _equal(one: ir.TensorProtocol | None, other: ir.TensorProtocol | None) -> bool:
    if one is None or other is None or one is other:
        return one is other
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def _free(name: str, taken: Container[str | None], own: set[str | None]) -> str:
    """A name that neither side uses; from now on it is the student's."""
    while name in taken or name in own:
        name += "'"
    own.add(name)
    return name


def _adopt_initializers(model: ir.Model, student: ir.Graph) -> None:
    for value in list(student.initializers.values()):
        del student.initializers[value.name or ""]
        model.graph.register_initializer(value)
        if model.ir_version < _INITIALIZERS_MAY_STAND_ALONE:
            model.graph.inputs.append(value)


_INITIALIZERS_MAY_STAND_ALONE = 4
"""IR version from which an initializer need not be among the inputs."""
