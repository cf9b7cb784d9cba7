"""Training of student slices against the teacher's activations."""

from ndonnx.distil.job import DistilJob, DistilResult, load_student, read_result
from ndonnx.distil.losses import neighbourhood_loss, nmse, target_variance
from ndonnx.distil.trainer import Plan, Training, learning_rate, train

__all__ = [
    "DistilJob",
    "DistilResult",
    "Plan",
    "Training",
    "learning_rate",
    "load_student",
    "neighbourhood_loss",
    "nmse",
    "read_result",
    "target_variance",
    "train",
]
