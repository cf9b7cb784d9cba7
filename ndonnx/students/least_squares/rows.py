"""A linear operator as a matrix on rows: what each of its output positions reads, and what it gives there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from ndonnx.convert.operators.linear import Window, torch_pads
from ndonnx.graph.costs import constant_of

Array = npt.NDArray[np.float32]
Index = npt.NDArray[np.int64]

_ROWS_PER_UNKNOWN = 20
"""Rows for each weight of an output. With independent rows, n of them for each unknown leave 1 / (n - 1) more error
than any number would: 5%."""
_LEAST_ROWS = 16_384
"""Rows of narrow operators, which cost nothing; neighbouring positions of one sample say much of the same."""
MOST_FEATURES = 5000
"""Features of an operator beyond which it has no closed form: the matrix of their products would take over 200 MB. A
3x3 window on 512 channels has 4,608."""
_CHUNK_NUMBERS = 2**22
"""Numbers of features, about, that are in memory at a time."""


def rows_needed(features: int) -> int:
    """Rows that settle a least-squares problem with so many features; more would only take time."""
    return max(_LEAST_ROWS, _ROWS_PER_UNKNOWN * features)


def kernel_of(weight_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Kernel of a convolution's weight; empty for a matrix."""
    return weight_shape[2:]


def groups_of(node: ir.Node) -> int:
    """Groups of a convolution; 1 for a matrix."""
    attribute = node.attributes.get("group")
    return attribute.as_int() if attribute is not None else 1


def shape_of(node: ir.Node) -> tuple[int, ...]:
    """Shape of a linear operator's constant weight."""
    tensor = constant_of(node.inputs[1])
    assert tensor is not None
    return tuple(int(size) for size in tensor.shape.numpy())


def features_of(node: ir.Node, weight_shape: tuple[int, ...]) -> int:
    """Numbers that one output of a linear operator sums over."""
    if node.op_type == "Conv":
        return math.prod(weight_shape[1:])
    transposed = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int() == 1
    return weight_shape[-1] if transposed else weight_shape[0]


class RowSampler:
    """A bounded number of an operator's rows, at random from equal parts of each batch.

    All samples and positions have their share. Batches have to come in order.
    """

    def __init__(self, node: ir.Node, samples: int, weight_shape: tuple[int, ...] | None = None) -> None:
        """Begin before the first batch.

        Args:
            node: `Conv`, `Gemm` or `MatMul`.
            samples: that will come in all.
            weight_shape: of the operator's weight; None where the node's own has it.
        """
        shape = weight_shape if weight_shape is not None else shape_of(node)
        self.features = features_of(node, shape)
        """Number of features of one group."""
        self.groups = groups_of(node)
        self._node, self._kernel, self._samples = node, kernel_of(shape), samples
        self._rng = np.random.default_rng(0)

    def index(self, count: int, data: Array) -> Index:
        """Which rows of a batch with so many samples are taken, in order.

        Args:
            count: samples in the batch.
            data: what the operator reads.
        """
        total = len(data) * math.prod(_positions(self._node, data, self._kernel))
        wanted = -(-rows_needed(self.features) * count // self._samples)
        if wanted >= total:
            return np.arange(total)
        drawn = (np.arange(wanted) + self._rng.random(wanted)) * (total / wanted)
        return np.minimum(drawn.astype(np.int64), total - 1)

    def chunks(self, index: Index, data: Array, output: Array | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """These rows of what the operator reads and, where it is given, of its output: so many at a time."""
        step = max(1, _CHUNK_NUMBERS // max(1, self.features * self.groups))
        for place in range(0, len(index), step):
            part = index[place : place + step]
            y = None if output is None else output_rows(self._node, output, part)
            yield rows_of(self._node, data, self._kernel, part), y


def output_rows(node: ir.Node, output: Array, index: Index) -> Tensor:
    """Rows of an operator's output, (rows, outputs) as it is typed.

    Args:
        node: `Conv`, `Gemm` or `MatMul`.
        output: its output, (samples, outputs, ...) of a convolution and (..., outputs) of a matrix.
        index: which of its rows, counted by samples, then by positions.
    """
    last = np.moveaxis(output, 1, -1) if node.op_type == "Conv" else output
    return torch.from_numpy(np.ascontiguousarray(last[np.unravel_index(index, last.shape[:-1])]))


def rows_of(node: ir.Node, data: Array, kernel: tuple[int, ...], index: Index) -> Tensor:
    """Rows that an operator's weight matrix is applied to: (rows, features), float32.

    Features of a convolution are its input channels (group after group) times the positions of its kernel.

    Args:
        node: `Conv`, `Gemm` or `MatMul`.
        data: what it reads.
        kernel: of a convolution; empty for a matrix.
        index: which rows, in the order of `output_rows`.
    """
    if node.op_type != "Conv":
        flat = data.reshape(-1, data.shape[-1])
        return torch.from_numpy(np.ascontiguousarray(flat[index]))
    window, rank = _window(node), len(kernel)
    stride, dilation = window.stride(rank), window.dilation(rank)
    before, behind = window.padding(data.shape[2:], kernel)
    # With channels last a position's channels lie together, and a row is a few copies.
    last = torch.from_numpy(data).permute(0, *range(2, 2 + rank), 1)
    padded = torch.nn.functional.pad(last, [0, 0, *torch_pads(before, behind)]).contiguous()
    sizes = padded.shape[1:-1]
    sample, *places = np.unravel_index(index, (len(data), *_positions(node, data, kernel)))
    corner = np.ravel_multi_index((sample, *(p * s for p, s in zip(places, stride, strict=True))), padded.shape[:-1])
    steps = [math.prod(sizes[axis + 1 :]) for axis in range(rank)]
    channels = padded.reshape(-1, padded.shape[-1])
    found = torch.empty(len(index), channels.shape[1], math.prod(kernel))
    for number, place in enumerate(itertools.product(*map(range, kernel))):
        offset = sum(p * d * s for p, d, s in zip(place, dilation, steps, strict=True))
        found[:, :, number] = channels[torch.from_numpy(corner + offset)]
    return found.flatten(1)


def _positions(node: ir.Node, data: Array, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of the output along each axis on which an operator is applied over and over, but for the first."""
    if node.op_type != "Conv":
        return data.shape[1:-1]
    window, rank = _window(node), len(kernel)
    before, behind = window.padding(data.shape[2:], kernel)
    sizes = [n + a + b for n, a, b in zip(data.shape[2:], before, behind, strict=True)]
    along = zip(sizes, kernel, window.stride(rank), window.dilation(rank), strict=True)
    return tuple((n - d * (k - 1) - 1) // s + 1 for n, k, s, d in along)


def _window(node: ir.Node) -> Window:
    return Window({name: _plain(attribute) for name, attribute in node.attributes.items()})


def _plain(attribute: ir.Attr) -> object:
    value = attribute.value
    return list(value) if isinstance(value, tuple) else value
