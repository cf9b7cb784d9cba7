"""The linear operators of a slice that a method may rewrite or refit, whatever its channel groups are."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ndonnx.graph.costs import is_weight
from ndonnx.graph.initializers import add_constant, set_numbers
from ndonnx.partition import ChannelGroups, WeightAxis
from ndonnx.students.features import LinearReader, linear_readers


def every_reader(model: ir.Model, held: Collection[str] = ()) -> list[LinearReader]:
    """Linear operators with weights of their own, in topological order: `Conv` without groups, `Gemm`, `MatMul`."""
    return [reader for reader in linear_readers(model, axes_of(model), held) if _is_own(model, reader)]


def axes_of(model: ir.Model, outputs: Collection[str] | None = None) -> ChannelGroups:
    """The weights of linear operators as axes on which everything stays, as refitting takes them.

    Args:
        model: a slice.
        outputs: values whose operators are meant; all by default.
    """
    nodes = [node for node in model.graph if outputs is None or node.outputs[0].name in outputs]
    weights = dict.fromkeys(v for node in nodes if (v := _second_input(node)) is not None and is_weight(v))
    nothing = np.empty(0, np.int64)
    axes = (WeightAxis(value.name or "", axis, "in", nothing) for value in weights for axis in (0, 1))
    return ChannelGroups((), tuple(axes), ())


def _second_input(node: ir.Node) -> ir.Value | None:
    return node.inputs[1] if len(node.inputs) > 1 else None


def _is_own(model: ir.Model, reader: LinearReader) -> bool:
    """Whether no other operator shares the weights."""
    names = [name for name in (reader.weight, reader.bias) if name is not None]
    return all(name in model.graph.initializers and len(model.graph.initializers[name].uses()) == 1 for name in names)


def set_weight(model: ir.Model, name: str, array: npt.NDArray[np.floating]) -> None:
    """Give an initializer other numbers, in its own type."""
    set_numbers(model.graph.initializers[name], array)


def add_weight(graph: ir.Graph, name: str, array: npt.NDArray[np.floating]) -> ir.Value:
    """A new float32 initializer under this name, or under one like it that is free."""
    return add_constant(graph, name, np.asarray(array, dtype=np.float32))
