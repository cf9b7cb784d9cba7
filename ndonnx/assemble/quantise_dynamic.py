"""A model with weights in 8 bits, its activations quantised anew in every run: products, and tables of vectors."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ndonnx.assemble.quantise_numbers import Weights

TYPES = frozenset({"MatMul", "Gemm", "Gather"})


def dynamic_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes that can be quantised: products with a constant matrix, and look-ups in a constant table."""
    return [node for node in model.graph if node.domain == "" and node.op_type in TYPES and _fits(node)]


def _fits(node: ir.Node) -> bool:
    place = 0 if node.op_type == "Gather" else 1
    weight = node.inputs[place]
    tensor = None if weight is None or not weight.is_initializer() else weight.const_value
    if tensor is None or tensor.dtype is not ir.DataType.FLOAT or len(tensor.shape) != 2:
        return False
    if node.op_type == "Gather":
        axis = node.attributes.get("axis")
        return axis is None or axis.as_int() == 0
    if node.op_type == "MatMul":
        return True
    turned = node.attributes.get("transA")
    factors = (node.attributes.get(name) for name in ("alpha", "beta"))
    return (turned is None or not turned.as_int()) and all(f is None or f.as_float() == 1 for f in factors)


class DynamicQuantiser:
    """Quantises a model in place."""

    def __init__(self, model: ir.Model, weights: Weights, narrow: bool) -> None:
        """Take a model to be changed, and where weights in 8 bits are kept."""
        self._model = model
        self._graph = model.graph
        self._weights = weights
        self._narrow = narrow
        self._quantised: dict[ir.Value, Sequence[ir.Value]] = {}
        """Of values that products read: integers, scale and zero point."""

    def run(self, kept: Collection[str]) -> None:
        """Quantise all that can be, but for the nodes of these names."""
        for node in dynamic_nodes(self._model):
            if node.name not in kept:
                if node.op_type == "Gather":
                    self._look_up(node)
                else:
                    self._multiply(node)

    def _look_up(self, node: ir.Node) -> None:
        """Vectors of integers, that become floats when they are read: one scale for the table."""
        table, indices = node.inputs[0], node.inputs[1]
        assert table is not None
        integers, scale = self._weights.of(table.name or "", _numbers(table), None, self._narrow)
        new = ir.node(
            "Gather", [self._initializer(f"{table.name}/quantised", integers), indices], name=f"{node.name}/8"
        )
        new.outputs[0].name = f"{node.name}/looked_up"
        zero = self._initializer(f"{table.name}/zero_point", np.zeros((), np.int8))
        back = [new.outputs[0], self._initializer(f"{table.name}/scale", scale), zero]
        self._replace(node, [new, ir.node("DequantizeLinear", back, name=node.name)])

    def _multiply(self, node: ir.Node) -> None:
        read, weight = node.inputs[0], node.inputs[1]
        assert read is not None and weight is not None
        numbers, name = _numbers(weight), f"{node.name}/{weight.name}"
        turned = node.attributes.get("transB")
        if turned is not None and turned.as_int():
            numbers = np.ascontiguousarray(numbers.T)
        # Shared matrices may be turned by one reader and not by another.
        key = f"{weight.name}/{'turned' if turned is not None and turned.as_int() else 'plain'}"
        integers, scales = self._weights.of(key, numbers, 1, self._narrow)
        steps, scale, zero = self._quantise(read, node)
        held = self._initializer(f"{key}/quantised", integers)
        zeros = self._initializer(f"{key}/zero_point", np.zeros(scales.shape, np.int8))
        product = ir.node("MatMulInteger", [steps, held, zero, zeros], name=f"{node.name}/product")
        cast = ir.node("Cast", [product.outputs[0]], {"to": ir.DataType.FLOAT.value}, name=f"{node.name}/cast")
        factor = ir.node("Mul", [scale, self._initializer(f"{key}/scale", scales)], name=f"{node.name}/factor")
        nodes = [product, cast, factor]
        last = ir.node("Mul", [cast.outputs[0], factor.outputs[0]], name=node.name)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            last.name = f"{node.name}/scaled"
            nodes.append(last)
            last.outputs[0].name = f"{name}/scaled"
            last = ir.node("Add", [last.outputs[0], node.inputs[2]], name=node.name)
        for part, what in ((product, "product"), (cast, "cast"), (factor, "factor")):
            part.outputs[0].name = f"{name}/{what}"
        self._replace(node, [*nodes, last])

    def _quantise(self, value: ir.Value, before: ir.Node) -> Sequence[ir.Value]:
        if value not in self._quantised:
            node = ir.node("DynamicQuantizeLinear", [value], num_outputs=3, name=f"{value.name}/quantise")
            for output, what in zip(node.outputs, ("quantised", "scale", "zero_point"), strict=True):
                output.name = f"{value.name}/{what}"
            self._graph.insert_before(before, node)
            self._quantised[value] = node.outputs
        return self._quantised[value]

    def _replace(self, node: ir.Node, nodes: list[ir.Node]) -> None:
        """Put nodes in the place of one; what the last one makes takes the name of what that made."""
        old, new = node.outputs[0], nodes[-1].outputs[0]
        new.type, new.shape = old.type, old.shape
        self._graph.insert_after(node, nodes)
        name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        self._graph.remove(node, safe=True)
        old.name, new.name = None, name
        if old in self._quantised:
            self._quantised[new] = self._quantised.pop(old)

    def _initializer(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        if name not in self._graph.initializers:
            tensor = ir.tensor(np.asarray(array), name=name)
            shape, kind = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
            self._graph.register_initializer(ir.Value(name=name, const_value=tensor, shape=shape, type=kind))
        return self._graph.initializers[name]


def _numbers(value: ir.Value) -> NDArray[np.float32]:
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy(), np.float32)
