"""Ways to shrink a slice: each turns a teacher slice into a candidate."""

from ndonnx.students.activation import ActivationSwap
from ndonnx.students.base import WHOLE, Candidate, Constraint, StudentMethod, TeacherSlice
from ndonnx.students.custom import Custom, ValueType
from ndonnx.students.lowrank import LowRank
from ndonnx.students.methods import check_method, method_of
from ndonnx.students.removal import Removal
from ndonnx.students.sparsity import Sparsity
from ndonnx.students.width import Width

__all__ = [
    "WHOLE",
    "ActivationSwap",
    "Candidate",
    "Constraint",
    "Custom",
    "LowRank",
    "Removal",
    "Sparsity",
    "StudentMethod",
    "TeacherSlice",
    "ValueType",
    "Width",
    "check_method",
    "method_of",
]
