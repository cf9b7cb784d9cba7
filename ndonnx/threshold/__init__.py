"""How much error each neighbourhood, and all together, can bear: the thresholding effect (figures 1, 4 and 6)."""

from ndonnx.threshold.noise import AMPLITUDES, Point
from ndonnx.threshold.study import KEEP, REPEATS, Curve, Shrunk, ThresholdReport, WeightNoise, check_study, study
from ndonnx.threshold.tolerance import Tolerance, tolerances

__all__ = [
    "AMPLITUDES",
    "KEEP",
    "REPEATS",
    "Curve",
    "Point",
    "Shrunk",
    "ThresholdReport",
    "Tolerance",
    "WeightNoise",
    "check_study",
    "study",
    "tolerances",
]
