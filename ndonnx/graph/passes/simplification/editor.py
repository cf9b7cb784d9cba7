"""What the rules of a simplification share: who reads a value, what a constant holds, and how nodes are replaced.

A value that keeps its name keeps its contents. So a rule may drop inner values, but what computes others than before is
renamed; graph outputs and the values that the caller names are never dropped nor renamed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ndonnx.graph.costs import constant_of
from ndonnx.graph.dataflow import STANDARD_DOMAINS
from ndonnx.graph.initializers import set_numbers
from ndonnx.graph.load import add_initializer

Array = npt.NDArray[np.float64]

FLOATS = {ir.DataType.FLOAT: np.float32, ir.DataType.DOUBLE: np.float64}
"""Types whose numbers are folded: of narrower ones a second rounding would be seen."""
_LARGEST = 2**20
"""Elements of a constant up to which it is read to see what it does; weights may be larger."""
_OVERRIDABLE_SINCE = 4
"""IR version from which an initializer among the inputs is one that callers may override."""
_DEPTH = 4
"""Nodes that are looked back for the rank of a value."""


@dataclass(frozen=True, eq=False)
class Editor:
    """One model while it is simplified."""

    model: ir.Model
    named: frozenset[str]
    """Values that stay, with their contents, beside the graph's outputs."""

    @cached_property
    def _taken(self) -> set[str | None]:
        """Names that no new value and no new node may have: of those that there are, and of some that there were."""
        values = ir.convenience.create_value_mapping(self.graph).values()
        return {value.name for value in values} | {node.name for node in self.graph}

    def free_name(self, name: str) -> str:
        """The name, or one like it that nothing in the graph has; taken from now on."""
        while name in self._taken:
            name += "'"
        self._taken.add(name)
        return name

    @property
    def graph(self) -> ir.Graph:
        """The main graph: what lies inside control flow is left alone."""
        return self.model.graph

    @property
    def opset(self) -> int:
        """Version of ONNX's operators."""
        return self.model.opset_imports.get("", self.model.opset_imports.get("ai.onnx", 1))

    def nodes(self, *operators: str) -> Iterator[ir.Node]:
        """The nodes of ONNX's own of these kinds, in order; all of ONNX's own where none is given.

        Those that there were at the first step, but for what the caller removes before their turn comes.
        """
        return (
            node
            for node in list(self.graph)
            if node.graph is self.graph
            and node.domain in STANDARD_DOMAINS
            and (not operators or node.op_type in operators)
        )

    def nodes_backwards(self) -> Iterator[ir.Node]:
        """All nodes, readers before what they read, but for what the caller removes before their turn comes."""
        return (node for node in reversed(list(self.graph)) if node.graph is self.graph)

    def is_free(self, value: ir.Value) -> bool:
        """Whether a value may go, or hold something else under another name."""
        return not value.is_graph_output() and value.name not in self.named

    def readers(self, value: ir.Value) -> list[ir.Node] | None:
        """The nodes that read a value that may go, one entry for each time; None where it has to stay."""
        nodes = [use.node for use in value.uses()]
        inside = all(node.graph is self.graph and node.domain in STANDARD_DOMAINS for node in nodes)
        return nodes if nodes and inside and self.is_free(value) else None

    def only_reader(self, value: ir.Value) -> ir.Node | None:
        """The one node that reads a value, once; None where there are others, or the value has to stay."""
        found = self.readers(value)
        return found[0] if found is not None and len(found) == 1 else None

    def numbers(self, value: ir.Value | None) -> Array | None:
        """The numbers of a constant of moderate size and of a type in `FLOATS`; None for anything else."""
        tensor = self._tensor(value)
        small = tensor is not None and tensor.dtype in FLOATS and tensor.size <= _LARGEST
        return tensor.numpy().astype(np.float64) if tensor is not None and small else None

    def number(self, value: ir.Value | None) -> float | None:
        """The one number that such a constant holds; None where it holds several."""
        found = self.numbers(value)
        return float(found.reshape(-1)[0]) if found is not None and found.size == 1 else None

    def own_weight(self, value: ir.Value | None) -> ir.TensorProtocol | None:
        """The tensor of an initializer that one node reads, once; None where others would see it change."""
        tensor = self._tensor(value)
        if value is None or tensor is None or not value.is_initializer() or tensor.dtype not in FLOATS:
            return None
        return tensor if self.only_reader(value) is not None else None

    def shares(self, node: ir.Node) -> bool:
        """Whether a node reads a vector or matrix that others read too: in all its places it is one weight."""
        held = ((value, self._tensor(value)) for value in node.inputs if value is not None)
        return any(tensor is not None and tensor.size > 1 and self.own_weight(value) is None for value, tensor in held)

    def _tensor(self, value: ir.Value | None) -> ir.TensorProtocol | None:
        if value is None or (value.is_graph_input() and self.model.ir_version >= _OVERRIDABLE_SINCE):
            return None
        return constant_of(value)

    def rewrite(self, weight: ir.Value, numbers: Array) -> None:
        """Give such an initializer other numbers, rounded to its own type."""
        set_numbers(weight, numbers)

    def constant(self, name: str, numbers: Array, like: ir.Value) -> ir.Value:
        """A new initializer of the type of another constant, under a free name like this one."""
        tensor = constant_of(like)
        assert tensor is not None
        return self.initializer(self.free_name(name), numbers.astype(FLOATS[tensor.dtype]))

    def initializer(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        """A new initializer."""
        tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        add_initializer(self.model, value)
        return value

    def put(self, before: ir.Node, op: str, inputs: list[ir.Value | None], **attributes: float | int) -> ir.Node:
        """A new node in front of another one, named after it, whose output has the type and shape of that one's."""
        like = before.outputs[0]
        node = ir.node(op, inputs, attributes=attributes)
        node.name = node.outputs[0].name = self.free_name(f"{like.name}/{op}")
        node.outputs[0].type, node.outputs[0].shape = like.type, like.shape
        self.graph.insert_before(before, node)
        return node

    def hand_over(self, old: ir.Value, new: ir.Value) -> None:
        """Let a computed value take the name, the place and the readers of another one of the same contents."""
        name = old.name
        new.type, new.shape = old.type or new.type, old.shape or new.shape
        new.doc_string = old.doc_string
        new.metadata_props.update(old.metadata_props)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name = None
        new.name = name

    def rename(self, value: ir.Value, ending: str) -> None:
        """Give a value that holds something else from now on a name that says so."""
        value.name = self.free_name(f"{value.name}/{ending}")

    def skip(self, node: ir.Node) -> None:
        """Let the readers of a node read what it reads, and remove it."""
        data = data_of(node)
        assert data is not None
        node.outputs[0].replace_all_uses_with(data)
        self.remove(node)

    def remove(self, *nodes: ir.Node) -> None:
        """Remove nodes whose outputs nobody reads, last ones first, and the constants that they alone read."""
        for node in nodes:
            read = [value for value in node.inputs if value is not None]
            self.graph.remove(node, safe=True)
            self.drop_unread(read)

    def drop_unread(self, values: Iterable[ir.Value]) -> None:
        """Drop those of these values that are constants and that nobody reads any more."""
        for value in dict.fromkeys(values):
            if value.uses() or value.is_graph_output() or self._tensor(value) is None:
                continue
            producer = value.producer()
            if producer is not None and producer.graph is self.graph:
                self.graph.remove(producer, safe=True)
            elif self.graph.initializers.get(value.name or "") is value:
                del self.graph.initializers[value.name or ""]
                self._taken.discard(value.name)
                if value in self.graph.inputs:
                    self.graph.inputs.remove(value)


def data_of(node: ir.Node) -> ir.Value | None:
    """The one input of a node that is computed; None where there are several, or none."""
    found = [value for value in node.inputs if value is not None and constant_of(value) is None]
    return found[0] if len(found) == 1 else None


def rank_of(value: ir.Value | None) -> int | None:
    """Number of axes; None where it is not known."""
    return len(value.shape) if value is not None and value.shape is not None else None


def least_rank(value: ir.Value | None, depth: int = _DEPTH) -> int:
    """Number of axes that a value has at least."""
    known, node = rank_of(value), value.producer() if value is not None else None
    if known is not None or node is None or depth == 0:
        return known or 0
    if node.op_type == "MatMul":
        return max(0, *(least_rank(side, depth - 1) - 1 for side in node.inputs))
    if node.op_type in _AS_WIDE_AS_ANY:
        return max(least_rank(side, depth - 1) for side in node.inputs)
    return least_rank(node.inputs[0], depth - 1) if node.op_type in _AS_WIDE_AS_FIRST else 0


_AS_WIDE_AS_ANY = {"Add", "Div", "Mul", "Sub"}
_AS_WIDE_AS_FIRST = {"Clip", "Relu", "Sigmoid", "Softmax", "Tanh", "Transpose"}
