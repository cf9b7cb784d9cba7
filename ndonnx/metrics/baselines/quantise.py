"""One baseline's file, made as a specialist would by onnxruntime's own tools, in a worker process.

The tools print, log, and hold whatever they compute in memory: in a process of their own that harms nobody, and one
that dies costs its baseline only.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from ndonnx.errors import SliceError
from ndonnx.graph.passes.raise_opset import opset_of, raise_opset
from ndonnx.runtime.executor import OnStep

Feeds = Mapping[str, NDArray[np.generic]]

PER_CHANNEL = 13
"""First opset at which a `QuantizeLinear` has an axis."""
_AT_ONCE = 16
"""Runs whose inner values are held in memory together."""


class Maker(Protocol):
    """Something picklable that writes a model's baseline."""

    def __call__(self, teacher: Path, path: Path) -> str:
        """Write it; returns how it was made, in words. Raises whatever the tools raise."""


@dataclass(frozen=True)
class MakeBaseline:
    """The making of one file as an executor's job."""

    name: str
    teacher: Path
    path: Path
    make: Maker

    def __call__(self, on_step: OnStep) -> str:
        """Write the file; returns how it was made, in words."""
        del on_step
        logging.disable(logging.CRITICAL)  # the tools tell of every node that they leave alone
        with redirect_stdout(io.StringIO()):
            return self.make(self.teacher, self.path)


@dataclass(frozen=True)
class Float16:
    """Weights and computation in float16; inputs and outputs keep their types."""

    def __call__(self, teacher: Path, path: Path) -> str:
        from onnxruntime.transformers.float16 import convert_float_to_float16  # noqa: PLC0415 - slow to import

        onnx.save(convert_float_to_float16(onnx.load(teacher), keep_io_types=True), path)
        return "float16 inside, inputs and outputs as they were"


@dataclass(frozen=True)
class Dynamic:
    """INT8 weights for each channel, ranges of activations measured at every run."""

    def __call__(self, teacher: Path, path: Path) -> str:
        from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415 - slow to import

        with TemporaryDirectory(prefix="ndonnx-") as scratch:
            ready, _ = _prepared(teacher, Path(scratch))
            quantize_dynamic(ready, path, per_channel=True, weight_type=QuantType.QInt8)
        return "weights S8, per channel"


@dataclass(frozen=True)
class Static:
    """INT8 weights and activations (QDQ, U8S8, per channel), with ranges from calibration inputs."""

    calibration: str
    """One of onnxruntime's `CalibrationMethod`: `MinMax`, `Percentile` or `Entropy`."""
    runs: Sequence[Feeds]
    """What the model is fed, run after run."""

    def __call__(self, teacher: Path, path: Path) -> str:
        from onnxruntime.quantization import (  # noqa: PLC0415 - slow to import
            CalibrationMethod,
            QuantFormat,
            QuantType,
            quantize_static,
        )

        with TemporaryDirectory(prefix="ndonnx-") as scratch:
            ready, opset = _prepared(teacher, Path(scratch))
            per_channel = opset >= PER_CHANNEL
            # Entropy is searched over all bins of a histogram, whose number grows with every run that is wider than the
            # first: it takes the values of all its runs at once. The others take in one run after the other.
            at_once = self.calibration == "Entropy"
            runs = self.runs[:_AT_ONCE] if at_once else self.runs
            quantize_static(
                ready,
                path,
                _Reader(runs),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=per_channel,
                calibrate_method=CalibrationMethod[self.calibration],
                extra_options={} if at_once else {"CalibStridedMinMax": 1},
            )
        scope = "per channel" if per_channel else f"per tensor, as opset {opset} has no axis"
        return f"QDQ, U8S8, {scope}, {self.calibration} calibration on {len(runs)} runs"


class _Reader:
    """Calibration inputs as onnxruntime asks for them, also a range of them at a time."""

    def __init__(self, runs: Sequence[Feeds]) -> None:
        self._runs = runs
        self.set_range(0, len(runs))

    def __len__(self) -> int:
        return len(self._runs)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Begin anew with these runs only."""
        self._next = iter(self._runs[start_index:end_index])

    def get_next(self) -> Feeds | None:
        """The next run's inputs, or None behind the last one."""
        return next(self._next, None)


def _prepared(teacher: Path, scratch: Path) -> tuple[Path, int]:
    """The teacher at an opset that has quantisation per channel, optimised and with shapes, as far as the tools can."""
    from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: PLC0415 - slow to import

    model, ready = _raised(teacher, scratch), scratch / "ready.onnx"
    try:
        quant_pre_process(str(model), str(ready), skip_symbolic_shape=True)
    except Exception:  # its optimiser cannot open what it has no schema for; the quantiser itself may
        ready = model
    return ready, opset_of(onnx.load(ready, load_external_data=False))


def _raised(teacher: Path, scratch: Path) -> Path:
    """The teacher at opset 13 where it is below and can be raised, else as it is."""
    if opset_of(onnx.load(teacher, load_external_data=False)) >= PER_CHANNEL:
        return teacher
    try:
        converted = raise_opset(onnx.load(teacher), PER_CHANNEL)
    except SliceError:  # there is no way for some operators; then there is no axis, and one scale for each tensor
        return teacher
    raised = scratch / "raised.onnx"
    onnx.save(converted, raised)
    return raised
