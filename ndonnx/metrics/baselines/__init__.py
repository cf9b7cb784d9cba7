"""What a user has without this library: onnxruntime's INT8, static and dynamic, and float16, beside a student."""

from __future__ import annotations

from ndonnx.metrics.baselines.comparison import BaselineRow, Baselines, Comparison
from ndonnx.metrics.baselines.making import CALIBRATION, Made, Material, make_baselines

__all__ = ["CALIBRATION", "BaselineRow", "Baselines", "Comparison", "Made", "Material", "make_baselines"]
