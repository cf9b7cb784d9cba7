"""The copy of the teacher that is partitioned and captured: inputs settled, constants folded, samples located.

Where the samples lie in a value is read off its shape: the size of the batch gets a name in the inputs, and shape
inference carries it through `Transpose`, `Squeeze`, `Reshape` and all the rest. A fixed batch is named too, so that it
is seen where the graph passes it on and where the graph's own numbers hold it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from ndonnx.graph.dataflow import Kind, kinds_of, real_inputs
from ndonnx.graph.interface import NOWHERE, WHOLE, Interface, note_feeding, sample_axis, set_sample_axis
from ndonnx.graph.passes.branches import fix_inputs
from ndonnx.graph.passes.normalise import fold_constants
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.graph.shapes.onnx_inference import take_inferred
from ndonnx.graph.shapes.sizes import factors, product

_NAME = "samples"
"""Name of the batch's size where the model has none of its own."""


def working_copy(model: ir.Model, interface: Interface | None = None) -> ir.Model:
    """A copy of a loaded model with its constant parts folded, and with a note at each value of where the samples lie.

    Args:
        model: not changed; value names are the same in the copy. Branches that are always taken are open in it
            (`ndonnx.graph.passes.branches.open_branches`).
        interface: how its inputs are fed. None: samples along the first axis of each.

    Raises:
        ModelError: a constant cannot be computed, or is far larger than the model.
    """
    interface = Interface() if interface is None else interface
    copy = fix_inputs(model.clone(), interface.fixed)
    sampled = [value for value in real_inputs(copy.graph) if value.shape is not None and len(value.shape)]
    for value in sampled:
        set_sample_axis(value, interface.axes.get(value.name or "", 0))
    declared = [_size(value) for value in sampled]
    name = _common_name(sampled)
    if sampled and name is None:
        name = _name_the_batch(copy, sampled)
    elif interface.fixed:
        infer_shapes(copy)
    copy = fold_constants(copy)
    fixed = interface.batch or next((size for size in declared if isinstance(size, int)), None)
    if name is not None:
        _locate_samples(copy.graph, name, fixed)
        if fixed is not None:
            _write_batch(copy.graph, name, fixed)
    note_feeding(copy, interface)
    return copy


def batch_size(graph: ir.Graph) -> int | None:
    """Samples that a working copy takes at a time; None where any number will do."""
    sizes = (_size(value) for value in real_inputs(graph) if value.shape is not None and len(value.shape))
    return next((size for size in sizes if isinstance(size, int)), None)


def slice_batch(slice_: ir.Model) -> int | None:
    """Samples that a slice takes at a time; None where any number will do. Its entry tells: context may be shared."""
    size = _size(slice_.graph.inputs[0]) if slice_.graph.inputs else None
    return size if isinstance(size, int) else None


def hold_batch(slice_: ir.Model, inputs: Collection[str], size: int) -> ir.Model:
    """Let a slice take so many samples at a time along the first axis of these inputs; in place, returned."""
    for value in slice_.graph.inputs:
        if value.name in inputs:
            _set_size(value, size)
    return slice_


def _write_batch(graph: ir.Graph, name: str, size: int) -> None:
    """Put the size of a fixed batch wherever its name stands in a shape."""
    for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
        if value.shape is not None and name in str(value.shape):
            value.shape = ir.Shape([_written(old, name, size) for old in value.shape])


def _written(old: int | ir.SymbolicDim, name: str, size: int) -> int | str | None:
    if isinstance(old, int) or old.value is None:
        return old if isinstance(old, int) else None
    number, names = factors(old.value)
    if name not in names:
        return old.value
    rest = [other for other in names.elements() if other != name]
    return product([number * size ** names[name], *rest])


def _size(value: ir.Value) -> int | str | None:
    """Length of the axis of the samples; a name, or None, where it is open."""
    axis = sample_axis(value)
    size = value.shape[axis] if value.shape is not None and 0 <= axis < len(value.shape) else None
    if isinstance(size, int):
        return size if size > 0 else None  # exporters write 0 or -1 for a size that they do not know
    return None if size is None else size.value


def _set_size(value: ir.Value, size: int | str) -> None:
    axis = sample_axis(value)
    if value.shape is not None and 0 <= axis < len(value.shape):
        value.shape = ir.Shape([size if place == axis else old for place, old in enumerate(value.shape)])


def _common_name(sampled: Sequence[ir.Value]) -> str | None:
    """The name that all inputs give the size of the batch, and nothing else; None where there is none."""
    names = {_size(value) for value in sampled}
    name = names.pop() if len(names) == 1 else None
    others = (size for value in sampled for place, size in enumerate(value.shape or ()) if place != sample_axis(value))
    taken = {size if isinstance(size, int) else size.value for size in others}
    return name if isinstance(name, str) and name not in taken else None


def _name_the_batch(model: ir.Model, sampled: Sequence[ir.Value]) -> str:
    """Give the batch one name in all inputs, and infer all shapes anew; the name."""
    values = [value for node in model.graph for value in node.outputs]
    known = {str(size) for value in (*sampled, *values) for size in value.shape or ()}
    name = _NAME
    while name in known:
        name += "_"
    for value in sampled:
        _set_size(value, name)
    before = [(value, value.shape) for value in values]
    for value in values:
        value.shape = None
    take_inferred(model)  # of the outputs too, whose own word would be that the batch is fixed
    for value, shape in before:
        if value.shape is None:  # behind an operator that ONNX does not know
            value.shape = shape
    return name


def _locate_samples(graph: ir.Graph, name: str, batch: int | None) -> None:
    """Note at every value that depends on the inputs' contents where its samples lie."""
    kinds = kinds_of(graph)
    for node in graph:
        for value in node.outputs:
            if kinds.get(value) is Kind.STREAM and value.shape is not None:
                set_sample_axis(value, _axis_in(value.shape, name, batch))


def _axis_in(shape: ir.Shape, name: str, batch: int | None) -> int:
    sizes = [size if isinstance(size, int) else size.value for size in shape]
    holding = [axis for axis, size in enumerate(sizes) if size is not None and name in factors(size)[1]]
    if len(holding) == 1 and sizes[holding[0]] == name:
        return holding[0]
    if batch == 1:
        return 0 if sizes and sizes[0] == 1 else WHOLE
    if holding:
        return NOWHERE
    if batch is not None and all(isinstance(size, int) for size in sizes):
        return sizes.index(batch) if batch in sizes else NOWHERE
    return 0
