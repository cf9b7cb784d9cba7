"""Linear operators that read a channel group, as a plain matrix on features of captured data.

A convolution is a matrix on patches, `Gemm` and `MatMul` are matrices on rows. First and second
moments of the features are all that ranking and refitting need.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from ndonnx.convert.linear import Window, torch_pads
from ndonnx.errors import ShrinkError
from ndonnx.graph.costs import constant_of
from ndonnx.partition import ChannelGroups

Matrix = npt.NDArray[np.float64]

ROWS = 60_000
"""Feature rows, at most, from which moments are taken."""


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

    def weight_matrix(self) -> npt.NDArray[np.float32]:
        """Weights as (features, outputs); features are input channels times kernel positions."""
        tensor = constant_of(self.node.inputs[1])
        assert tensor is not None
        return as_matrix(self.node, tensor.numpy())


@dataclass(frozen=True)
class Moments:
    """Mean (features) and second moment about it (features, features) over rows."""

    mean: Matrix
    covariance: Matrix

    def second(self) -> Matrix:
        """Second moment about zero."""
        return self.covariance + np.outer(self.mean, self.mean)


def linear_readers(model: ir.Model, groups: ChannelGroups) -> list[LinearReader]:
    """Readers in topological order: `Conv` without groups, `Gemm` and `MatMul` with a constant weight."""
    units = {axis.initializer: axis.units for axis in groups.axes if axis.role == "in"}
    found = []
    for node in model.graph:
        if not _is_plain(node) or (name := node.inputs[1].name if node.inputs[1] is not None else None) not in units:
            continue
        data, bias = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
        assert data is not None and data.name and name
        fitting = bias is not None and constant_of(bias) is not None and len(node.outputs) == 1
        found.append(
            LinearReader(
                node, data.name, node.outputs[0].name or "", name, bias.name if fitting and bias else None, units[name]
            )
        )
    return found


def _is_plain(node: ir.Node) -> bool:
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


def features(node: ir.Node, data: npt.NDArray[np.float32], kernel: tuple[int, ...]) -> torch.Tensor:
    """Rows that the weight matrix is applied to: (rows, features)."""
    tensor = torch.from_numpy(np.ascontiguousarray(data))
    if node.op_type != "Conv":
        return tensor.reshape(-1, tensor.shape[-1])
    window = Window({name: _plain(attribute) for name, attribute in node.attributes.items()})
    before, behind = window.padding(tensor.shape[2:], kernel)
    padded = torch.nn.functional.pad(tensor, torch_pads(before, behind))
    patches = torch.nn.functional.unfold(padded, kernel, tuple(window.dilation(2)), 0, tuple(window.stride(2)))
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def targets(node: ir.Node, output: npt.NDArray[np.float32]) -> torch.Tensor:
    """A node's output in the order of `features`: (rows, outputs)."""
    tensor = torch.from_numpy(np.ascontiguousarray(output))
    if node.op_type == "Conv":
        tensor = tensor.flatten(2).transpose(1, 2)
    return tensor.reshape(-1, tensor.shape[-1])


def kernel_of(weight_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Kernel of a convolution's weight; empty for a matrix."""
    return weight_shape[2:]


def samples_for(rows_per_sample: int) -> int:
    """Samples that give about `ROWS` rows."""
    return max(1, ROWS // max(1, rows_per_sample))


def moments(reader: LinearReader, data: npt.NDArray[np.float32]) -> Moments:
    """Moments of a reader's features on captured data."""
    tensor = constant_of(reader.node.inputs[1])
    assert tensor is not None
    rows = features(reader.node, _thinned(data), kernel_of(tuple(int(d) for d in tensor.shape.numpy())))
    mean = rows.mean(dim=0)
    # Centred first: in float32 a large mean would drown what varies about it.
    return Moments(mean.double().numpy(), (gram(rows - mean) / len(rows)).numpy())


def gram(rows: torch.Tensor) -> torch.Tensor:
    """Inner products of the features over all rows: float64 (features, features).

    Raises:
        ShrinkError: the features are so large that their squares overflow.
    """
    products = (rows.T @ rows).double()
    if not bool(products.isfinite().all()):
        raise ShrinkError(f"activations as large as {float(rows.abs().max()):.1g} overflow when they are squared")
    return products


def thin(data: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], ...]:
    """As many samples of two arrays as give about `ROWS` rows of the second."""
    count = samples_for(_rows(other))
    return data[:count], other[:count]


def _thinned(data: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return data[: samples_for(_rows(data))]


def _rows(data: npt.NDArray[np.float32]) -> int:
    """Rows that one sample brings: spatial positions of an image, positions of a sequence."""
    shape = data.shape[2:] if data.ndim == 4 else data.shape[1:-1]
    return int(np.prod(shape, dtype=np.int64))


def _plain(attribute: ir.Attr) -> object:
    value = attribute.value
    return list(value) if isinstance(value, tuple) else value
