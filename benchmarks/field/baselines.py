"""What a user has today without this SDK: onnxruntime's INT8, static and dynamic, and float16."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16

from benchmarks.field.subjects import Arrays

_CALIBRATION = 100
"""Inputs whose ranges a static quantisation is given."""
_PER_CHANNEL = 13
"""First opset at which a QuantizeLinear has an axis."""


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Calibration inputs, one sample at a time."""

    def __init__(self, feeds: Arrays, count: int) -> None:
        self._samples = iter(samples(feeds, count))

    def get_next(self) -> Mapping[str, NDArray[np.generic]] | None:
        """The next sample, or None behind the last one."""
        return next(self._samples, None)


def samples(feeds: Arrays, count: int) -> Iterator[dict[str, NDArray[np.generic]]]:
    """Single samples of inputs: rows, a state's along axis 1, and what is one value for all as it is."""
    for row in range(count):
        yield {name: _row(name, array, row) for name, array in feeds.items()}


def _row(name: str, array: NDArray[np.generic], row: int) -> NDArray[np.generic]:
    if array.ndim == 0:
        return array
    return array[:, row : row + 1] if name == "state" else array[row : row + 1]


def make_all(model: Path, feeds: Arrays, folder: Path) -> dict[str, Path]:
    """Every baseline that can be made of a model.

    Args:
        model: the teacher.
        feeds: calibration inputs as the model takes them.
        folder: where the files go.
    """
    logging.getLogger().setLevel(logging.ERROR)  # the quantiser tells of every node that it leaves alone
    found = {}
    makers: dict[str, Callable[[Path], None]] = {
        "INT8 static": lambda path: _static(model, feeds, path),
        "INT8 dynamic": lambda path: quantize_dynamic(model, path, per_channel=True, weight_type=QuantType.QInt8),
        "fp16": lambda path: onnx.save(convert_float_to_float16(onnx.load(model), keep_io_types=True), path),
    }
    for name, make in makers.items():
        path = folder / f"{name.replace(' ', '-')}.onnx"
        try:
            make(path)
        except Exception as error:  # whatever these tools raise is their answer to this model, and is shown as it
            print(f"{model.name}: no {name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        else:
            found[name] = path
    return found


def _static(model: Path, feeds: Arrays, path: Path) -> None:
    ready = path.with_suffix(".ready.onnx")
    try:
        quant_pre_process(model, ready, skip_symbolic_shape=True)
    except Exception:  # its optimiser cannot open what it has no schema for; the quantiser itself may
        ready = model
    opset = max(
        o.version for o in onnx.load(model, load_external_data=False).opset_import if o.domain in ("", "ai.onnx")
    )
    quantize_static(
        ready,
        path,
        _Reader(feeds, _CALIBRATION),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=opset >= _PER_CHANNEL,
    )
