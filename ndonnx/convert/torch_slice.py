"""A slice as a torch module whose parameters are the slice's initializers, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

import ndonnx.convert.operators  # noqa: F401 - its files register their converters
from ndonnx.convert.lower import lower
from ndonnx.convert.registry import convert
from ndonnx.errors import ConversionError, ParityError
from ndonnx.graph.costs import is_weight
from ndonnx.graph.precision import of_type
from ndonnx.graph.working_copy import slice_batch


@dataclass(frozen=True)
class Grid:
    """The integers that weights are rounded to in every step of a training, each channel with a scale of its own."""

    axes: Mapping[str, int]
    """Axis of the output channels of each weight that is rounded, by its name."""
    largest: int
    """Largest integer, 127 for 8 bits: the largest weight of a channel."""

    def rounded(self, weight: Tensor, axis: int) -> Tensor:
        """A weight as its integers hold it; its gradient is that of the weight itself."""
        rest = [place for place in range(weight.dim()) if place != axis]
        with torch.no_grad():
            largest = (weight.abs().amax(rest, keepdim=True) if rest else weight.abs()) / self.largest
            scales = torch.where(largest > 0, largest, 1)
            change = torch.round(weight / scales).mul_(scales).sub_(weight)
        return weight + change


class TorchSlice(nn.Module):
    """Computes what the ONNX slice computes; its parameters are the slice's weights.

    Call it with the slice's inputs in their order; it returns the one output.
    """

    def __init__(
        self,
        body: nn.Module,
        inputs: tuple[str, ...],
        tensors: dict[str, Tensor],
        moments: frozenset[str],
        batch: int | None = None,
    ):
        super().__init__()
        self.batch = batch
        """Samples that the body takes at a time, where the graph's own numbers hold them; None: any number."""
        self.macs: float = 0.0
        """Multiply-accumulates for one sample; 0 where they are not known."""
        self.grid: Grid | None = None
        """What weights are rounded to on their way into the body; None: they are not."""
        self.body = body.eval()
        self.input_names = inputs
        self.weight_names = tuple(tensors)
        self.weights = nn.ParameterList(
            nn.Parameter(tensor, requires_grad=name not in moments) for name, tensor in tensors.items()
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        rows = len(inputs[0]) if inputs and inputs[0].dim() else 0
        if self.batch is None or rows == self.batch:
            out: Tensor = self.body(*inputs, *self._rounded())
            return out
        answers = []
        for start in range(0, rows, self.batch):
            numbers = torch.arange(start, start + self.batch, device=inputs[0].device).clamp(max=rows - 1)
            held = (value[numbers] if value.dim() and len(value) == rows else value for value in inputs)
            answers.append(self.body(*held, *self._rounded()))
        return torch.cat(answers)[:rows]

    def _rounded(self) -> list[Tensor]:
        if self.grid is None:
            return list(self.weights)
        grid, named = self.grid, zip(self.weight_names, self.weights, strict=True)
        return [grid.rounded(weight, grid.axes[name]) if name in grid.axes else weight for name, weight in named]

    def train(self, mode: bool = True) -> TorchSlice:
        """Keep every operator as at inference: a slice learns weights, not statistics."""
        self.training = mode
        self.body.eval()
        return self

    def trained_weights(self) -> dict[str, np.ndarray]:
        """Every weight by its initializer's name, as contiguous arrays."""
        return {
            name: weight.detach().cpu().contiguous().numpy()
            for name, weight in zip(self.weight_names, self.weights, strict=True)
        }


def to_torch(model: ir.Model) -> TorchSlice:
    """Convert a slice (constants folded, one output) to torch.

    Raises:
        ConversionError: names the operator that does not convert, or the value that is no float32.
    """
    _check_types(model)
    lowered = lower(model)
    try:
        body = convert(lowered.proto)
    except NotImplementedError as error:
        raise ConversionError(f"does not convert to torch: {error}") from error
    except Exception as error:  # onnx2torch reports unsupported cases in many ways; all mean that this slice is kept
        raise ConversionError(f"does not convert to torch: {type(error).__name__}: {error}") from error
    tensors = {name: _tensor(model.graph.initializers[name]) for name in lowered.weights}
    inputs = tuple(value.name or "" for value in model.graph.inputs)
    return TorchSlice(body, inputs, tensors, lowered.moments, slice_batch(model))


def write_back(model: ir.Model, weights: Mapping[str, np.ndarray]) -> ir.Model:
    """A copy of the slice with these weights in its initializers; names, nodes and opset stay.

    Raises:
        KeyError: a weight has no initializer of its name.
        ValueError: a weight's shape differs from its initializer's.
        TrainingError: a weight is too large for its initializer's type.
    """
    copy = model.clone()
    for name, array in weights.items():
        value = copy.graph.initializers[name]
        old = value.const_value
        assert old is not None
        if tuple(array.shape) != tuple(old.shape.numpy()):
            raise ValueError(f"{name}: shape {array.shape} does not fit the initializer's {tuple(old.shape.numpy())}")
        value.const_value = ir.tensor(of_type(array, old.dtype, name), name=name)
    return copy


def relative_error(answer: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference over the largest absolute expected value."""
    scale = float(np.abs(expected).max(initial=0.0))
    difference = float(np.abs(answer.astype(np.float64) - expected).max(initial=0.0))
    return difference / scale if scale > 0 else difference


def check_parity(
    module: TorchSlice, inputs: list[np.ndarray], expected: np.ndarray, tolerance: float, *, strict: bool = True
) -> float:
    """The gate before any training: the torch slice must answer as onnxruntime does, in float32.

    Args:
        inputs: the slice's inputs in order, float32 where floating.
        expected: onnxruntime's answer to them.
        tolerance: largest error relative to the output's scale.
        strict: False lets pass what rounding makes of long sums, in onnxruntime as in torch: an error that is small
            everywhere, and next to nothing beside the spread of the output.

    Returns:
        The relative error.

    Raises:
        ParityError: shapes differ, or the error is over the tolerance.
    """
    with torch.no_grad():
        try:
            answer = module(*(torch.from_numpy(np.ascontiguousarray(array)) for array in inputs)).numpy()
        except Exception as error:  # a converted graph may fail in as many ways as there are operators
            raise ParityError(f"the converted slice does not run: {type(error).__name__}: {error}") from error
    if answer.shape != expected.shape:
        raise ParityError(f"the converted slice answers with shape {answer.shape}, onnxruntime with {expected.shape}")
    difference = relative_error(answer, expected)
    if not difference <= tolerance and (strict or not _is_rounding(answer, expected, difference, tolerance)):
        raise ParityError(
            f"the converted slice differs from onnxruntime by {difference:.2g} of its scale (at most {tolerance:g})"
        )
    return difference


def _is_rounding(answer: np.ndarray, expected: np.ndarray, difference: float, tolerance: float) -> bool:
    if not difference <= min(_LARGEST_ROUNDING, _LARGEST_TIMES * tolerance):
        return False
    error = float(np.sqrt(np.square(answer.astype(np.float64) - expected).mean()))
    return error <= min(_ROUNDING, _TIMES * tolerance) * float(expected.astype(np.float64).std())


_LARGEST_ROUNDING, _LARGEST_TIMES = 1e-2, 100.0
"""Largest error that may be rounding, relative to the output's scale, and over the tolerance. Measured: what
onnxruntime sums over half a million numbers is wrong by 6e-4 of the scale, by what float64 says."""
_ROUNDING, _TIMES = 1e-3, 10.0
"""Root of the mean squared error that may be rounding, over the deviation of the output, and over the tolerance: an
NMSE of a millionth, far below a student's."""


def _check_types(model: ir.Model) -> None:
    """Training is in float32 against onnxruntime's float32; see `ndonnx.graph.precision` for other types."""
    values = [*model.graph.inputs, *filter(is_weight, model.graph.initializers.values())]
    for value in values:
        if value.dtype is not None and value.dtype.is_floating_point() and value.dtype is not ir.DataType.FLOAT:
            raise ConversionError(
                f"does not convert to torch: '{value.name}' is {value.dtype}, which is not trained; "
                "export the teacher in float32 or float16"
            )


def _tensor(value: ir.Value) -> Tensor:
    assert value.const_value is not None
    return torch.from_numpy(np.array(value.const_value.numpy(), dtype=np.float32))
