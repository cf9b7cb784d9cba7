"""Bias correction: what rounding moves the mean of a layer's output by is taken out again, through its bias.

Rounded weights and clipped activations shift every output channel of a layer by a constant that the layers behind do
not take out. In closed form: the mean over calibration samples in float, less that in 8 bits, is added to the bias of
the layer, one layer after the other, each on what the corrected ones before it give.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ndonnx.graph.costs import constant_of
from ndonnx.graph.interface import Interface
from ndonnx.teacher.probe import Probe

Shifts: TypeAlias = Mapping[str, NDArray[np.float32]]
"""What is added to the bias of each layer, (channels,), by the name of its node."""
Batches: TypeAlias = Callable[[], Iterable[Mapping[str, NDArray[Any]]]]

_MOST_SWEEPS = 16
"""Of a model with more layers, neighbours are corrected in one go."""
_BIASED = ("Conv", "ConvTranspose", "Gemm")
"""Operators with a bias of their own."""


def with_shifts(model: ir.Model, shifts: Shifts) -> ir.Model:
    """A copy of a prepared float model with other biases; a layer that has none gets one."""
    copy = model.clone()
    for node in copy.graph:
        if (shift := shifts.get(node.name or "")) is not None:
            _shift(copy.graph, node, shift)
    return copy


def _shift(graph: ir.Graph, node: ir.Node, shift: NDArray[np.float32]) -> None:
    before = constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
    numbers = shift if before is None else (before.numpy() + shift).astype(np.float32)
    name = f"{node.name}/corrected bias"
    tensor = ir.tensor(numbers, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(numbers.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, value)


def corrected(
    model: ir.Model,
    in_bits: Callable[[Shifts], ir.Model],
    layers: Sequence[str],
    batches: Batches,
    *,
    interface: Interface,
    threads: int,
) -> Iterator[dict[str, NDArray[np.float32]]]:
    """Correct the biases of layers in order, some at a time.

    Args:
        model: prepared, in float.
        in_bits: the same with these shifts of its biases, in 8 bits.
        layers: names of nodes of `correctable`, in order.
        batches: calibration samples, a few at a time; the same on every call.
        interface: how the models are fed.
        threads: for onnxruntime.

    Yields:
        All shifts so far, after each step.

    Raises:
        ModelError, OrtError: onnxruntime fails on one of the models.
    """
    ends = {node.name or "": node.outputs[0].name or "" for node in model.graph}
    wanted = _means(interface.applied(model), [ends[name] for name in layers], batches, threads)
    shifts: dict[str, NDArray[np.float32]] = {}
    step = max(1, -(-len(layers) // _MOST_SWEEPS))
    for start in range(0, len(layers), step):
        these = layers[start : start + step]
        found = _means(interface.applied(in_bits(shifts)), [ends[name] for name in these], batches, threads)
        shifts |= {name: (wanted[ends[name]] - found[ends[name]]).astype(np.float32) for name in these}
        yield dict(shifts)


def correctable(model: ir.Model, kept: Collection[str]) -> list[str]:
    """Names of the layers with a bias of their own that are in 8 bits, in order."""
    return [node.name or "" for node in model.graph if node.name not in kept and _is_correctable(node)]


def _is_correctable(node: ir.Node) -> bool:
    if node.domain or node.op_type not in _BIASED or node.outputs[0].dtype is not ir.DataType.FLOAT:
        return False
    plain = all(name not in node.attributes or node.attributes[name].as_float() == 1 for name in ("alpha", "beta"))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = constant_of(bias)
    return plain and constant_of(node.inputs[1]) is not None and (bias is None or _is_vector(tensor))


def _is_vector(tensor: ir.TensorProtocol | None) -> bool:
    return tensor is not None and len(tensor.shape) == 1


def _means(model: ir.Model, names: Sequence[str], batches: Batches, threads: int) -> dict[str, NDArray[np.float64]]:
    """Mean of values over samples and positions, (channels,), channels along the second axis."""
    probe = Probe(model, list(dict.fromkeys(names)), threads=threads)
    sums: dict[str, Any] = {}
    count = 0
    for batch in batches():
        values, size = probe.run(batch), max(len(array) for array in batch.values())
        count += size
        for name in names:
            rest = tuple(axis for axis in range(values[name].ndim) if axis != 1)
            sums[name] = sums.get(name, 0.0) + values[name].mean(axis=rest, dtype=np.float64) * size
    return {name: total / max(1, count) for name, total in sums.items()}
