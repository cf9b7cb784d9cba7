"""Training of student slices against the teacher's activations."""

from ndonnx.distill.job import DistilJob, DistilResult, HeadSlice, load_student, read_result
from ndonnx.distill.losses import (
    DistillationLoss,
    LookAheadLoss,
    NeighbourhoodLoss,
    Objective,
    nmse,
    target_variance,
)
from ndonnx.distill.plan import Plan
from ndonnx.distill.trainer import Training, learning_rate, train

__all__ = [
    "DistilJob",
    "DistilResult",
    "DistillationLoss",
    "HeadSlice",
    "LookAheadLoss",
    "NeighbourhoodLoss",
    "Objective",
    "Plan",
    "Training",
    "learning_rate",
    "load_student",
    "nmse",
    "read_result",
    "target_variance",
    "train",
]
