"""Shapes that ONNX's own inference leaves open: those that a graph computes from its own shapes.

A TorchScript export takes its shapes apart and puts them together again (`Shape`, `Gather`,
`Concat`, `Reshape`), and ONNX gives up where one of the sizes is dynamic. One walk over the graph
follows such arithmetic, with names for dynamic sizes; the shape of every other operator is what
ONNX infers for that node alone, given what is known by then.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir

from ndonnx.graph.costs import constant_of
from ndonnx.graph.dataflow import STANDARD_DOMAINS, sub_graphs
from ndonnx.graph.shapes.numbers_of import (
    INTEGERS,
    MOST_NUMBERS,
    Numbers,
    Shape,
    bounds,
    concat,
    cut,
    elementwise,
    expanded,
    filled,
    gather,
    reshaped,
    shape_of,
    size_of,
    transposed,
    where,
)
from ndonnx.graph.shapes.sizes import (
    Size,
    add,
    broadcast,
    divide,
    equal,
    is_made_up,
    product,
    quotient,
    remainder,
    subtract,
)


def resolve_shapes(model: ir.Model) -> ir.Model:
    """Fill in the shapes that are open after ONNX's inference where they follow from the graph; in place.

    What is known stays as it is. A size that stays unknown gets a name, one for equal sizes.
    """
    if any(_is_open(value) for node in model.graph for value in node.outputs):
        shapes = _Shapes(model)
        for node in model.graph:
            shapes.visit(node)
        shapes.write(model.graph)
    return model


def known_numbers(model: ir.Model) -> dict[ir.Value, Numbers]:
    """Small integers and truth values that a model computes from its own shapes, as far as they are known.

    Works on a model whose shapes ONNX has inferred; fills its open ones in on the way.
    """
    shapes = _Shapes(model)
    for node in model.graph:
        shapes.visit(node)
    return shapes.numbers


def _is_open(value: ir.Value) -> bool:
    return value.shape is None or any(not isinstance(size, int) and _unnamed(size.value) for size in value.shape)


def _unnamed(name: str | None) -> bool:
    return name is None or is_made_up(name)


class _Shapes:
    """What is known of sizes and of integers computed from them, node after node."""

    def __init__(self, model: ir.Model) -> None:
        self.opsets = model.opset_imports
        self.numbers: dict[ir.Value, Numbers] = {}
        self._news: set[ir.Value] = set()
        """Values of which more is known than ONNX knew when it inferred the whole graph."""
        self._known: dict[str, Size] = {}
        """Made-up names whose size has been found: what else carries the name has that size too."""
        values = (value for node in model.graph for value in (*node.inputs, *node.outputs) if value is not None)
        taken = {str(size) for value in values for size in value.shape or ()}
        self._fresh = (name for n in itertools.count() if (name := f"unk__{n}") not in taken)

    def visit(self, node: ir.Node) -> None:
        """Infer the node's shapes where they are open, and its numbers where it computes with sizes."""
        if node.domain not in STANDARD_DOMAINS or any(True for _ in sub_graphs(node)):
            return
        try:
            if any(_is_open(value) for value in node.outputs):
                rule = _SHAPES.get(node.op_type)
                shape = rule(self, node) if rule is not None else None
                shapes = [shape] if shape is not None else self._as_onnx_infers(node) if self._has_news(node) else []
                for value, found in zip(node.outputs, shapes, strict=False):
                    self._refine(value, found)
                if rule is not None and node.op_type not in _TYPED_OTHERWISE and node.inputs[0] is not None:
                    node.outputs[0].type = node.outputs[0].type or node.inputs[0].type
            if node.op_type in _NUMBERS and node.outputs[0].dtype in INTEGERS:
                numbers = _NUMBERS[node.op_type](self, node)
                if numbers is not None and numbers.size <= MOST_NUMBERS:
                    self.numbers[node.outputs[0]] = numbers
        except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError):
            return  # a node that does not fit its operator's definition: its sizes stay open

    def sizes(self, value: ir.Value | None) -> Shape | None:
        """Lengths of a value's axes; None where not even their number is known."""
        if value is None or value.shape is None:
            tensor = constant_of(value)
            return [int(size) for size in tensor.shape.numpy()] if tensor is not None else None
        for axis, size in enumerate(value.shape):
            if not isinstance(size, int) and size.value is None and not value.shape.frozen:
                value.shape[axis] = next(self._fresh)
        return [size if isinstance(size, int) else self._found(size.value) for size in value.shape]

    def integers(self, value: ir.Value | None) -> Numbers | None:
        """Elements of a small tensor of integers, as far as they are known."""
        if value is None or value in self.numbers:
            return self.numbers.get(value) if value is not None else None
        tensor = constant_of(value)
        if tensor is None or tensor.size > MOST_NUMBERS or tensor.dtype not in INTEGERS:
            return None
        return np.array(tensor.numpy().tolist(), dtype=object)

    def write(self, graph: ir.Graph) -> None:
        """Put the sizes that were found wherever their made-up names stand."""
        for node in graph:
            for value in node.outputs:
                if value.shape is not None and _is_open(value):
                    value.shape = ir.Shape(self.sizes(value) or ())

    def _found(self, name: str | None) -> Size | None:
        size: Size | None = name
        while isinstance(size, str) and size in self._known:
            size = self._known[size]
        return size

    def _has_news(self, node: ir.Node) -> bool:
        if any(value.is_graph_output() for value in node.outputs):  # open by the model's own word, see `infer_shapes`
            return True
        return any(
            value is not None and (value in self._news or value in self.numbers or self._is_found(value))
            for value in node.inputs
        )

    def _is_found(self, value: ir.Value) -> bool:
        """Whether a made-up name in its shape has turned out to be a size, at some other value."""
        return any(not isinstance(size, int) and size.value in self._known for size in value.shape or ())

    def _refine(self, value: ir.Value, shape: Shape | None) -> None:
        """Believe a new shape where the old one was open."""
        old = self.sizes(value)
        if shape is None or (old is not None and len(old) != len(shape)):
            return
        found: Shape = []
        for before, size in zip(old or [None] * len(shape), shape, strict=True):
            is_open = before is None or (isinstance(before, str) and _unnamed(before))
            if isinstance(before, str) and is_open and size not in (None, before):
                self._known[before] = size
            found.append(size if is_open and size is not None else next(self._fresh) if before is None else before)
        if found != [size if isinstance(size, int) else size.value for size in value.shape or ()]:
            self._news.add(value)
        value.shape = ir.Shape(found)

    def _as_onnx_infers(self, node: ir.Node) -> list[Shape | None]:
        """Shapes of the outputs as ONNX infers them for this node alone."""
        inputs = [value for value in node.inputs if value is not None]
        types = {value.name or "": _type_of(value, self.sizes(value)) for value in inputs}
        data = {value.name or "": tensor for value in inputs if (tensor := self._tensor(value)) is not None}
        opset = self.opsets.get(node.domain, self.opsets.get("", 1))
        try:
            schema = onnx.defs.get_schema(node.op_type, opset, "")
            imports = [onnx.helper.make_opsetid("", opset)]
            found = onnx.shape_inference.infer_node_outputs(
                schema, ir.to_proto(node), types, data, opset_imports=imports
            )
        except (
            onnx.checker.ValidationError,  # of operators that were withdrawn, GroupNormalization 18 for one
            onnx.defs.SchemaError,
            onnx.shape_inference.InferenceError,
            RuntimeError,
        ):
            return []
        for value in node.outputs:
            if value.type is None and (inferred := found.get(value.name or "")) is not None:
                value.type = _tensor_type(inferred)
        return [_shape_in(found.get(value.name or "")) for value in node.outputs]

    def _tensor(self, value: ir.Value) -> onnx.TensorProto | None:
        """The value as a constant, where it is small and all of it is known."""
        tensor = constant_of(value)
        if tensor is not None:
            return ir.to_proto(tensor) if tensor.size <= MOST_NUMBERS else None
        numbers = self.numbers.get(value)
        if numbers is None or value.dtype is None or not all(isinstance(n, int) for n in numbers.reshape(-1)):
            return None
        return onnx.numpy_helper.from_array(numbers.astype(value.dtype.numpy()), value.name)


def _type_of(value: ir.Value, shape: Shape | None) -> onnx.TypeProto:
    if value.dtype is None or not isinstance(value.type, ir.TensorType):
        raise ValueError(f"'{value.name}' is no tensor of a known type")
    return onnx.helper.make_tensor_type_proto(value.dtype.value, shape)


def _tensor_type(found: onnx.TypeProto) -> ir.TensorType | None:
    kind = found.tensor_type.elem_type
    return ir.TensorType(ir.DataType(kind)) if kind else None


def _shape_in(found: onnx.TypeProto | None) -> Shape | None:
    if found is None or not found.tensor_type.HasField("shape"):
        return None
    return [
        size.dim_value if size.HasField("dim_value") else size.dim_param or None for size in found.tensor_type.shape.dim
    ]


# Shapes that hang on the numbers in an input


def _reshape(shapes: _Shapes, node: ir.Node) -> Shape | None:
    data, target = shapes.sizes(node.inputs[0]), shapes.integers(node.inputs[1])
    if data is None or target is None:
        return None
    copies = "allowzero" not in node.attributes or node.attributes["allowzero"].as_int() == 0
    wanted: Shape = [data[axis] if size == 0 and copies else size for axis, size in enumerate(target.tolist())]
    left = [axis for axis, size in enumerate(wanted) if size in (None, -1)]
    rest = product(size for axis, size in enumerate(wanted) if axis not in left)
    for axis in left:
        # A number that is not known is what the others leave, just as -1 is.
        wanted[axis] = quotient(product(data), rest) if len(left) == 1 else None
    return wanted


def _expand(shapes: _Shapes, node: ir.Node) -> Shape | None:
    data, target = shapes.sizes(node.inputs[0]), shapes.integers(node.inputs[1])
    if data is None or target is None:
        return None
    wanted: Shape = target.tolist()
    rank = max(len(data), len(wanted))
    pairs = zip([1] * (rank - len(data)) + data, [1] * (rank - len(wanted)) + wanted, strict=True)
    return [broadcast(size, other) for size, other in pairs]


def _constant_of_shape(shapes: _Shapes, node: ir.Node) -> Shape | None:
    target = shapes.integers(node.inputs[0])
    return None if target is None else target.tolist()


def _flatten(shapes: _Shapes, node: ir.Node) -> Shape | None:
    data = shapes.sizes(node.inputs[0])
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    return None if data is None else [product(data[:axis]), product(data[axis:])]


def _as_first_input(shapes: _Shapes, node: ir.Node) -> Shape | None:
    return shapes.sizes(node.inputs[0])


def _range(shapes: _Shapes, node: ir.Node) -> Shape | None:
    bounds = [shapes.integers(value) for value in node.inputs]
    start, limit, delta = (None if bound is None else bound.item() for bound in bounds)
    if isinstance(start, int) and isinstance(limit, int) and isinstance(delta, int):
        return [len(range(start, limit, delta))]
    return [limit if start == 0 and delta == 1 else None]


def _resize(shapes: _Shapes, node: ir.Node) -> Shape | None:
    target = shapes.integers(node.inputs[3]) if len(node.inputs) > 3 else None
    policy = node.attributes.get("keep_aspect_ratio_policy")
    plain = "axes" not in node.attributes and (policy is None or policy.as_string() == "stretch")
    return target.tolist() if target is not None and plain else None


def _slice(shapes: _Shapes, node: ir.Node) -> Shape | None:
    data = shapes.sizes(node.inputs[0])
    starts, ends, axes, steps = bounds(shapes, node)
    if data is None or starts is None or ends is None or axes is None or steps is None:
        return None
    found = list(data)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        size = data[axis]
        if all(isinstance(number, int) for number in (size, start, end, step)):
            found[axis] = len(range(*slice(start, end, step).indices(size)))
        elif (start, step) != (0, 1) or not (end == size or (isinstance(end, int) and end >= _TO_THE_END)):
            found[axis] = None
    return found


_TO_THE_END = 2**31 - 1
"""Bounds from here on mean the end of an axis."""

_SHAPES: dict[str, Callable[[_Shapes, ir.Node], Shape | None]] = {
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Flatten": _flatten,
    "GroupNormalization": _as_first_input,
    "LayerNormalization": _as_first_input,
    "Range": _range,
    "Reshape": _reshape,
    "Resize": _resize,
    "SimplifiedLayerNormalization": _as_first_input,
    "Slice": _slice,
}

_TYPED_OTHERWISE = {"ConstantOfShape", "Range"}
"""Those of them whose output is not of their first input's type."""


# Numbers computed from sizes


_NUMBERS: dict[str, Callable[[_Shapes, ir.Node], Numbers | None]] = {
    "Add": elementwise(add),
    "Cast": reshaped,
    "Concat": concat,
    "ConstantOfShape": filled,
    "Div": elementwise(divide),
    "Equal": elementwise(equal),
    "Expand": expanded,
    "Gather": gather,
    "Identity": reshaped,
    "Mod": elementwise(remainder),
    "Mul": elementwise(lambda a, b: product([a, b])),
    "Not": elementwise(lambda a: not a if isinstance(a, bool) else None),
    "Reshape": reshaped,
    "Shape": shape_of,
    "Size": size_of,
    "Slice": cut,
    "Squeeze": reshaped,
    "Sub": elementwise(subtract),
    "Transpose": transposed,
    "Unsqueeze": reshaped,
    "Where": elementwise(where),
}
