"""Ways to shrink a slice: each turns a teacher slice into a candidate."""

from ndonnx.students.base import Candidate, StudentMethod, TeacherSlice
from ndonnx.students.width import Width

__all__ = ["Candidate", "StudentMethod", "TeacherSlice", "Width"]
