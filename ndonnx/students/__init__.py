"""Ways to shrink a slice: each turns a teacher slice into a candidate."""

from ndonnx.students.base import WHOLE, Candidate, Constraint, StudentMethod, TeacherSlice

__all__ = ["WHOLE", "Candidate", "Constraint", "StudentMethod", "TeacherSlice"]
