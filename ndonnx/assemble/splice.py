"""Students into the teacher: each takes its neighbourhood's place, everything else stays untouched."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Mapping
from functools import cache
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from ndonnx.errors import VerificationError
from ndonnx.graph.dataflow import reads
from ndonnx.graph.load import add_initializer
from ndonnx.graph.passes.fused import take_node_apart
from ndonnx.graph.passes.fused_writer import is_read
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.graph.shapes.lengths import axes_measured
from ndonnx.graph.shapes.symbolic import resolve_shapes

_Shapes = Mapping[str | None, ir.Shape]
"""By the name of the value."""


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


def splice(
    teacher: ir.Model, students: Mapping[str, ir.Model], shared: Mapping[str, str] = MappingProxyType({})
) -> ir.Model:
    """A copy of the teacher with students in it.

    Args:
        teacher: as loaded; not changed. Its names, opset, metadata and outer nodes survive.
        students: by the name of the neighbourhood, for unique names; each is a model whose
            inputs are values of the teacher and whose one output is the value it replaces.
        shared: neighbourhoods whose student is that of an earlier one, by name, with the name of that one: initializers
            of one name are one in all their places.

    Raises:
        VerificationError: a student cannot be put into its place, such as one that reads or makes a value that the
            teacher does not have; it names the neighbourhood.
    """
    model = teacher.clone()
    shapes = cache(lambda: _resolved(teacher))
    several = set(shared.values())
    held: dict[str, dict[str, ir.Value]] = {}
    for name, student in students.items():
        first = shared.get(name, name)
        weights = held.setdefault(first, {}) if first in several else {}
        try:
            _replace(model, name, student.clone(), shapes, weights)
        except Exception as error:  # of a student of any origin; whoever splices can do without it
            reason = " ".join(str(error).split()) or type(error).__name__
            raise VerificationError(f"{name}: does not fit into the teacher: {reason}", name) from error
    _restore_names(model.graph, held.values())
    return infer_shapes(model)


def _restore_names(graph: ir.Graph, held: Iterable[Mapping[str, ir.Value]]) -> None:
    """Give weights of several places back the names that the teacher's had until the last place was replaced."""
    renamed = [(name, value) for weights in held for name, value in weights.items() if value.name != name]
    if not renamed:
        return
    taken = _names(ir.convenience.create_value_mapping(graph).values())
    for name, value in renamed:
        if name not in taken and graph.initializers.get(value.name or "") is value:
            value.name = name
            taken.add(name)


def _resolved(teacher: ir.Model) -> _Shapes:
    """Shapes of the teacher's values, as far as they can be known."""
    nodes = resolve_shapes(teacher.clone()).graph
    return {value.name: value.shape for node in nodes for value in node.outputs if value.shape is not None}


def _replace(
    model: ir.Model, name: str, student: ir.Model, shapes: Callable[[], _Shapes], held: dict[str, ir.Value]
) -> None:
    """Put a student in its place; `held` are the weights that it has from its other places, and gets what it brings."""
    graph = model.graph
    values = ir.convenience.create_value_mapping(graph, include_subgraphs=False)
    exit_ = values[student.graph.outputs[0].name or ""]
    producer = exit_.producer()
    if producer is not None and sum(is_read(producer, at) for at in range(len(producer.outputs))) > 1:
        # The student makes one of them: a fused operator would make the others of what it made that one of before.
        take_node_apart(model, producer)
        values = ir.convenience.create_value_mapping(graph, include_subgraphs=False)
        exit_ = values[student.graph.outputs[0].name or ""]
        producer = exit_.producer()
    if producer is None:
        raise KeyError(f"{name}: '{exit_.name}' is made by no node")
    inputs = {value: values[value.name or ""] for value in student.graph.inputs}
    slot, left = _detach(graph, exit_, producer, set(inputs.values()))
    for value, outer in inputs.items():
        value.replace_all_uses_with(outer)
    handed_over = _hand_lengths_over(graph, student, left, set(inputs.values()), shapes)
    for weight in list(student.graph.initializers.values()):
        if (there := held.get(weight.name or "")) is not None:
            weight.replace_all_uses_with(there)
            del student.graph.initializers[weight.name or ""]
    brought = {weight.name or "": weight for weight in student.graph.initializers.values()}
    _rename_clashes(graph, student.graph, name)
    own = set(student.graph.initializers.values())
    held.update({before: weight for before, weight in brought.items() if weight in own})
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
    if handed_over:
        graph.sort()  # what reads the lengths may stand in front of the student
    for domain, version in student.opset_imports.items():
        model.opset_imports.setdefault(domain, version)


def _forget_shapes(nodes: Iterable[ir.Node], output: ir.Value) -> None:
    """Drop inferred shapes: their made-up symbols (`unk__1`) mean other sizes than the same ones in the teacher."""
    for node in nodes:
        for value in node.outputs:
            if value is not output:
                value.shape = None


def _detach(
    graph: ir.Graph, exit_: ir.Value, producer: ir.Node, inputs: set[ir.Value]
) -> tuple[ir.Node, list[ir.Node]]:
    """Cut the old neighbourhood off its readers and remove what nothing reads any more.

    Returns a stand-in node at the place where the student goes, and the nodes that are still read from elsewhere.
    """
    slot = ir.node("Identity", [], name="slot")
    slot.outputs[0].name, slot.outputs[0].type, slot.outputs[0].shape = "slot", exit_.type, exit_.shape
    graph.insert_after(producer, slot)
    exit_.replace_all_uses_with(slot.outputs[0], replace_graph_outputs=True)
    return slot, _remove_dead(graph, producer, inputs)


def _remove_dead(graph: ir.Graph, start: ir.Node, living: set[ir.Value]) -> list[ir.Node]:
    """Remove a node and then whatever only it read, as far back as the values that will be read again.

    Returns the nodes in front of these that stay because others read them.
    """
    stack, left = [start], dict.fromkeys((start,))
    while stack:
        node = stack.pop()
        if node.graph is not graph or any(value in living for value in node.outputs):
            continue
        if any(value.uses() or value.is_graph_output() for value in node.outputs):
            left[node] = None
            continue
        read = list(dict.fromkeys(reads(node)))
        graph.remove(node, safe=True)
        stack.extend(before for value in read if (before := value.producer()) is not None)
        for value in read:
            if value.is_initializer() and not value.uses() and not value.is_graph_output():
                del graph.initializers[value.name or ""]
                if value in graph.inputs:
                    graph.inputs.remove(value)
    return [node for node in left if node.graph is graph]


def _hand_lengths_over(
    graph: ir.Graph,
    student: ir.Model,
    left: Iterable[ir.Node],
    inputs: Collection[ir.Value],
    shapes: Callable[[], _Shapes],
) -> bool:
    """Let what reads lengths of the old neighbourhood's inner values read them of the student's; whether any did.

    An old value and all in front of it would otherwise stay for the sake of its shape. The student's value takes
    its place and its name, so the reader stays as it is.
    """
    own = {v.name: v for node in student.graph for v in node.outputs if v not in student.graph.outputs}
    stack, handed_over = [*left], False
    while stack:
        node = stack.pop()
        pairs = [(value, own.get(value.name)) for value in node.outputs if value.uses()]
        if node.graph is not graph or any(new is None or not _only_measured(value) for value, new in pairs):
            continue
        resolve_shapes(student)
        same = all(new is not None and _same_lengths(value, shapes().get(value.name), new) for value, new in pairs)
        if not pairs or not same or _feeds(node, inputs):
            continue
        for value, new in pairs:
            if new is not None:
                value.replace_all_uses_with(new)
        stack += _remove_dead(graph, node, set(inputs))
        handed_over = True
    return handed_over


def _only_measured(value: ir.Value) -> bool:
    """Whether no more is read of a value than its shape."""
    return not value.is_graph_output() and all(user.op_type in ("Shape", "Size") for user in value.consumers())


def _same_lengths(old: ir.Value, shape: ir.Shape | None, new: ir.Value) -> bool:
    """Whether the lengths that are read of an old value of this shape are those of a value of the student."""
    before, after = old.producer(), new.producer()
    if before is None or after is None or before.op_type != after.op_type:
        return False
    if shape is None or new.shape is None or len(shape) != len(new.shape):
        return False
    if old.shape is None:
        old.shape = shape
    differ = {axis for axis, (a, b) in enumerate(zip(shape, new.shape, strict=True)) if _differ(a, b)}
    read = [axes_measured(user) for user in old.consumers()]
    return all(axes is not None and differ.isdisjoint(axes) for axes in read)


def _differ(one: int | ir.SymbolicDim, other: int | ir.SymbolicDim) -> bool:
    return (isinstance(one, int) or isinstance(other, int)) and one != other


def _feeds(node: ir.Node, values: Collection[ir.Value]) -> bool:
    """Whether any of the values is computed from a node."""
    stack = [producer for value in values if (producer := value.producer()) is not None]
    seen: set[ir.Node] = set()
    while stack:
        before = stack.pop()
        if before is node:
            return True
        if before not in seen:
            seen.add(before)
            stack += [producer for value in reads(before) if (producer := value.producer()) is not None]
    return False


def _rename_clashes(graph: ir.Graph, student: ir.Graph, name: str) -> None:
    """Give the student's values and nodes names that the rest of the model does not use; equal weights become one."""
    own_values = _names(ir.convenience.create_value_mapping(student).values())
    read = ir.convenience.create_value_mapping(graph).values()  # of the student's values those handed over
    values = _names(value for value in read if (node := value.producer()) is None or node.graph is not student)
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
        add_initializer(model, value)
