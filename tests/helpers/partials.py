"""Partial models on small networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx_ir as ir

from ndonnx.metrics.partial import PartialModels
from ndonnx.partition import Partition
from ndonnx.students import TeacherSlice
from ndonnx.students.methods.width import Width
from tests.helpers.models import (
    Array,
)


def batches_of(data: Mapping[str, Array], size: int = 16) -> Callable[[], Iterator[Mapping[str, Array]]]:
    count = len(next(iter(data.values())))
    return lambda: ({name: rows[i : i + size] for name, rows in data.items()} for i in range(0, count, size))


def half(parts: Partition, name: str, partial: PartialModels) -> ir.Model:
    """A student of half the width with the teacher's weights: a bad one."""
    n = next(n for n in parts.distillable if n.name == name)
    assert n.groups is not None
    teacher = TeacherSlice(name, parts.slice_of(n), n.groups, partial.inputs_of(name, 16))
    return Width(0.5, init="teacher").build(teacher, np.random.default_rng(0)).model
