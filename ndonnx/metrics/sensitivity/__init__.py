"""How much error each neighbourhood, and all together, can bear: the thresholding effect (figures 1, 4 and 6)."""

from ndonnx.metrics.sensitivity.noise import AMPLITUDES, Draws, Point
from ndonnx.metrics.sensitivity.reading import DOCUMENT, ErrorBudget, StudyFile, read_study, study_of
from ndonnx.metrics.sensitivity.study import (
    KEEP,
    REPEATS,
    SHAPING_SAMPLES,
    STUDIED,
    Curve,
    Shrunk,
    StudyPlan,
    ThresholdReport,
    WeightNoise,
    check_study,
    study,
)
from ndonnx.metrics.sensitivity.tolerance import Tolerance, tolerances

__all__ = [
    "AMPLITUDES",
    "DOCUMENT",
    "KEEP",
    "REPEATS",
    "SHAPING_SAMPLES",
    "STUDIED",
    "Curve",
    "Draws",
    "ErrorBudget",
    "Point",
    "Shrunk",
    "StudyFile",
    "StudyPlan",
    "ThresholdReport",
    "Tolerance",
    "WeightNoise",
    "check_study",
    "read_study",
    "study",
    "study_of",
    "tolerances",
]
