"""What a file states of its inner values: believed, unless a part of it contradicts what follows from the inputs.

Files are edited: somebody opens the batch, and what an earlier inference wrote down about inner values stays. Such
statements are no harm to onnxruntime, which goes by what it infers itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir

from ndonnx.graph.shapes.sizes import is_made_up

Statement = tuple[ir.Shape | None, ir.TypeProtocol]
"""Shape and type."""
Statements = dict[ir.Value, Statement]

_FROM_FILE = "ndonnx.statements"
"""Key of a model's metadata."""


def set_aside(graph: ir.Graph) -> Statements:
    """Forget what is stated of the inner values of a graph, in place, so that all of it is inferred."""
    stated: Statements = {}
    for node in graph:
        for value in node.outputs:
            if value.type is not None and not value.is_graph_output():
                stated[value] = (value.shape, value.type)
                value.shape = value.type = None
    return stated


def believe_statements(graph: ir.Graph, stated: Statements) -> bool:
    """Fill in what could not be inferred, in place; nothing, and False, where a statement contradicts the rest."""
    inputs = {str(size) for value in graph.inputs for size in value.shape or () if isinstance(size, ir.SymbolicDim)}
    if any(_contradicts(value, shape, type_, inputs) for value, (shape, type_) in stated.items()):
        return False
    for value, (shape, type_) in stated.items():
        if value.type is None:
            value.type = type_
        if value.shape is None:
            value.shape = shape
        elif shape is not None:
            value.shape = ir.Shape(_better(found, said) for found, said in zip(value.shape, shape, strict=True))
    return True


def remember_statements(model: ir.Model, stated: Statements) -> None:
    """Let a model know what its file states; a copy of it has to be told, see `copy_of`."""
    model.meta[_FROM_FILE] = {value.name: statement for value, statement in stated.items()}


def copy_of(model: ir.Model) -> ir.Model:
    """A copy of a loaded model that knows, as the model does, what the file states."""
    copy = model.clone()
    copy.meta.update(model.meta)
    return copy


def state_as_in_file(model: ir.Model, teacher: ir.Model) -> ir.Model:
    """Let inner values be stated as the teacher's file states them where they still have that shape, or not at all.

    onnxruntime fuses by the shapes that a file states: with others than the teacher's file has, even the same nodes
    with the same weights may answer with other last bits.

    Args:
        model: the teacher, a copy of it, or a student with its shapes inferred; changed in place, and returned.
        teacher: as loaded.
    """
    stated: dict[str | None, Statement] = teacher.meta[_FROM_FILE]
    shapes = {value.name: value.shape for value in _inner_values(teacher)}
    for value in _inner_values(model):
        statement = stated.get(value.name)
        if statement is not None and _is_same(value.shape, shapes.get(value.name)):
            value.shape, value.type = statement
        else:
            value.shape = value.type = None
    return model


def _inner_values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        for node in graph:
            yield from (value for value in node.outputs if not value.is_graph_output())


def _is_same(one: ir.Shape | None, other: ir.Shape | None) -> bool:
    """Whether two shapes can be the same, names of open sizes aside."""
    if one is None or other is None:
        return one is other
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(a == b for a, b in pairs if isinstance(a, int) or isinstance(b, int))


def _contradicts(value: ir.Value, shape: ir.Shape | None, type_: ir.TypeProtocol, inputs: Collection[str]) -> bool:
    if value.type is not None and value.type != type_:
        return True
    if value.shape is None or shape is None:
        return False
    if len(value.shape) != len(shape):
        return True
    return any(_differ(found, said, inputs) for found, said in zip(value.shape, shape, strict=True))


def _differ(found: int | ir.SymbolicDim, said: int | ir.SymbolicDim, inputs: Collection[str]) -> bool:
    """Whether a number is stated where there is another one, or a size that an input leaves open."""
    return isinstance(said, int) and found != said and (isinstance(found, int) or str(found.value) in inputs)


def _better(found: int | ir.SymbolicDim, said: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
    if isinstance(found, int) or not _is_open(found):
        return found
    return said if isinstance(said, int) or not _is_open(said) else found


def _is_open(size: ir.SymbolicDim) -> bool:
    return size.value is None or is_made_up(size.value)
