"""Linear operators that read a channel group, and their weights as plain matrices.

A convolution is a matrix on patches, `Gemm` and `MatMul` are matrices on rows; see `least_squares`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ndonnx.graph.costs import constant_of
from ndonnx.partition import ChannelGroups
from ndonnx.students.least_squares import kernel_of

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LinearReader:
    """A node whose weight sums over channels that have units."""

    node: ir.Node
    data: str
    """Name of the value it reads."""
    output: str
    weight: str
    bias: str | None
    units: npt.NDArray[np.int64]
    """Unit of each input channel, -1 where it stays."""

    @property
    def has_bias(self) -> bool:
        """Whether an offset can be refitted with the weights."""
        return self.bias is not None

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel of a convolution; empty for a matrix."""
        tensor = constant_of(self.node.inputs[1])
        assert tensor is not None
        return kernel_of(tuple(int(d) for d in tensor.shape.numpy()))

    @property
    def features(self) -> int:
        """Features that one output sums over: input channels times kernel positions."""
        return len(self.units) * int(np.prod(self.kernel, dtype=np.int64))

    def weight_matrix(self) -> npt.NDArray[np.float32]:
        """Weights as (features, outputs); features are input channels times kernel positions."""
        tensor = constant_of(self.node.inputs[1])
        assert tensor is not None
        return as_matrix(self.node, tensor.numpy())


def linear_readers(model: ir.Model, groups: ChannelGroups, held: Collection[str] = ()) -> list[LinearReader]:
    """Readers in topological order: `Conv` without groups, `Gemm` and `MatMul` with a constant weight.

    Left out are those whose weight is `held`. A bias that is held, or that another operator reads too, is none to fit.
    """
    units = {(axis.initializer, axis.axis): axis.units for axis in groups.axes if axis.role == "in"}
    found = []
    for node in model.graph:
        if not is_plain(node) or node.inputs[1] is None:
            continue
        name, summed = node.inputs[1].name or "", summed_axis(node)
        if (name, summed) not in units or name in held:
            continue
        data, bias = node.inputs[0], offset_of(node)
        assert data is not None and data.name
        fitting = bias is not None and len(bias.uses()) == 1 and bias.name not in held
        offset = bias.name if fitting and bias is not None else None
        found.append(LinearReader(node, data.name, node.outputs[0].name or "", name, offset, units[name, summed]))
    return found


def summed(node: ir.Node, output: npt.NDArray[np.float32], *, offset: bool) -> npt.NDArray[np.float32]:
    """What an operator's weight, and its offset if that is to be fitted, has to answer for.

    Args:
        node: `Conv`, `Gemm` or `MatMul` of the teacher.
        output: all that it gives.
        offset: whether its bias is fitted too; a constant bias that is not stays as it is.
    """
    tensor = constant_of(node.inputs[2]) if len(node.inputs) > 2 and not offset else None
    if tensor is None:
        return output
    bias = tensor.numpy()
    rest: npt.NDArray[np.float32] = output - (bias.reshape(-1, 1, 1) if node.op_type == "Conv" else bias)
    return rest


def offset_of(node: ir.Node) -> ir.Value | None:
    """The constant bias of a `Conv` or `Gemm` with one number for each output.

    None where there is none, or one that `Gemm` broadcasts in another way: a scalar, or a column.
    """
    weight, bias = (node.inputs[i] if len(node.inputs) > i else None for i in (1, 2))
    kernel, offset = constant_of(weight), constant_of(bias)
    if kernel is None or offset is None or node.op_type not in ("Conv", "Gemm"):
        return None
    outputs = kernel.shape[0 if node.op_type == "Conv" or _is_transposed(node) else 1]
    return bias if offset.size == outputs and offset.shape[-1:] == (outputs,) else None


def summed_axis(node: ir.Node) -> int:
    """The axis of a plain operator's weight that is summed over."""
    return 1 if node.op_type == "Conv" or _is_transposed(node) else 0


def is_plain(node: ir.Node) -> bool:
    attributes = node.attributes
    if node.op_type == "Conv":
        return ("group" not in attributes or attributes["group"].as_int() == 1) and len(node.inputs[1].shape or ()) == 4  # type: ignore[union-attr]
    if node.op_type == "Gemm":
        plain = all(attributes[name].as_float() == 1.0 for name in ("alpha", "beta") if name in attributes)
        return plain and ("transA" not in attributes or attributes["transA"].as_int() == 0)
    return node.op_type == "MatMul" and len(node.inputs[1].shape or ()) == 2  # type: ignore[union-attr]


def as_matrix(node: ir.Node, weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A node's weight as (features, outputs)."""
    if node.op_type == "Conv":
        return weight.reshape(len(weight), -1).T
    return weight.T if _is_transposed(node) else weight


def _is_transposed(node: ir.Node) -> bool:
    return node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int() == 1


def from_matrix(node: ir.Node, matrix: Matrix, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """The inverse of `as_matrix` for a weight of this shape."""
    by_output = matrix.T if node.op_type == "Conv" or _is_transposed(node) else matrix
    return np.ascontiguousarray(by_output.reshape(shape))
