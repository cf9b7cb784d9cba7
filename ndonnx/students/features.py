"""Linear operators that read a channel group, as a plain matrix on features of captured data.

A convolution is a matrix on patches, `Gemm` and `MatMul` are matrices on rows. First and second
moments of the features are all that ranking and refitting need.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from ndonnx.convert.linear import Window
from ndonnx.errors import ShrinkError
from ndonnx.graph.costs import constant_of
from ndonnx.partition import ChannelGroups

Matrix = npt.NDArray[np.float64]

ROWS = 60_000
"""Feature rows, at most, from which moments are taken."""
_CHUNK = 2**24
"""Numbers of features, about, that are in memory at a time."""
_STRIP = 128
"""Least width of the strips in which a symmetric product is computed."""


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
        if not is_plain(node) or (name := node.inputs[1].name if node.inputs[1] is not None else None) not in units:
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


def features(node: ir.Node, data: npt.NDArray[np.float32], kernel: tuple[int, ...]) -> torch.Tensor:
    """Rows that the weight matrix is applied to: (rows, features).

    Rows of a convolution are in the order of positions, then samples; `targets` follows it.
    """
    if node.op_type != "Conv":
        return torch.from_numpy(np.ascontiguousarray(data)).reshape(-1, data.shape[-1])
    patches = _patches(node, torch.from_numpy(data), kernel)
    return patches.reshape(int(np.prod(patches.shape[:3])), -1).T


def _patches(node: ir.Node, data: torch.Tensor, kernel: tuple[int, ...]) -> torch.Tensor:
    """What a convolution sees: (channels, kernel height, width, output height, width, samples), overlapping in memory.

    With the samples innermost, a copy moves runs of them; `torch.nn.functional.unfold` moves rows
    of the image, which are short where there are many channels.
    """
    window = Window({name: _plain(attribute) for name, attribute in node.attributes.items()})
    stride, dilation = window.stride(2), window.dilation(2)
    (top, left), (bottom, right) = window.padding(data.shape[2:], kernel)
    padded = torch.nn.functional.pad(data.permute(1, 2, 3, 0), (0, 0, left, right, top, bottom)).contiguous()
    channels, height, width, samples = padded.shape
    per_channel, per_line, per_pixel, _ = padded.stride()
    sizes = [
        (length - d * (k - 1) - 1) // s + 1
        for length, k, s, d in zip((height, width), kernel, stride, dilation, strict=True)
    ]
    return padded.as_strided(
        (channels, *kernel, *sizes, samples),
        (per_channel, per_line * dilation[0], per_pixel * dilation[1], per_line * stride[0], per_pixel * stride[1], 1),
    )


def targets(node: ir.Node, output: npt.NDArray[np.float32]) -> torch.Tensor:
    """A node's output in the order of `features`: (rows, outputs)."""
    if node.op_type == "Conv":
        return torch.from_numpy(output).permute(1, 2, 3, 0).reshape(output.shape[1], -1).T
    return torch.from_numpy(np.ascontiguousarray(output)).reshape(-1, output.shape[-1])


def kernel_of(weight_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Kernel of a convolution's weight; empty for a matrix."""
    return weight_shape[2:]


def samples_for(rows_per_sample: int) -> int:
    """Samples that give about `ROWS` rows."""
    return max(1, ROWS // max(1, rows_per_sample))


def moments(reader: LinearReader, data: npt.NDArray[np.float32]) -> Moments:
    """Moments of a reader's features on captured data.

    Raises:
        ShrinkError: the features are so large that their squares overflow.
    """
    chunks = _chunks(reader, _thinned(data))
    first = next(chunks)
    # In float32 a large mean would drown what varies about it, so most of it goes before squaring.
    shift = first.mean(dim=0)
    count, total = 0, torch.zeros(len(shift), dtype=torch.float64)
    square = torch.zeros(len(shift), len(shift), dtype=torch.float64)
    for chunk in itertools.chain([first], chunks):
        rows = chunk - shift
        count += len(rows)
        total += rows.sum(dim=0)
        square += gram(rows)
    rest = total / count
    covariance = (square / count).addr_(rest, rest, alpha=-1)
    return Moments((shift.double() + rest).numpy(), covariance.numpy())


def _chunks(reader: LinearReader, data: npt.NDArray[np.float32]) -> Iterator[torch.Tensor]:
    step = max(1, _CHUNK // max(1, _rows(data) * reader.features))
    for start in range(0, len(data), step):
        yield features(reader.node, data[start : start + step], reader.kernel)


def energies(reader: LinearReader, data: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Mean square of each of a reader's features: the diagonal of `Moments.second`."""
    squares = torch.from_numpy(_thinned(data)).double().square()
    if reader.node.op_type == "Conv":
        return _patches(reader.node, squares, reader.kernel).mean(dim=(3, 4, 5)).flatten().numpy()
    return squares.reshape(-1, squares.shape[-1]).mean(dim=0).numpy()


def gram(rows: torch.Tensor) -> torch.Tensor:
    """Inner products of the features over all rows: float64 (features, features).

    Raises:
        ShrinkError: the features are so large that their squares overflow.
    """
    size = rows.shape[1]
    products = torch.empty(size, size, dtype=torch.float64)
    # Half of a symmetric matrix is enough; in strips, as torch has no product that knows.
    strip = max(_STRIP, -(-size // 8))
    for start in range(0, size, strip):
        end = min(start + strip, size)
        products[start:end, start:] = rows[:, start:end].T @ rows[:, start:]
        products[end:, start:end] = products[start:end, end:].T
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
