"""Teacher and student in the numbers of a report."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ndonnx.config.recipe import Recipe
from ndonnx.data import DataSource
from ndonnx.graph.storage.files import compressed_bytes, file_bytes
from ndonnx.metrics.evaluation import Evaluation, evaluate
from ndonnx.partition import Partition
from ndonnx.report import ModelSummary
from ndonnx.runtime.progress import Progress

_MANY_ZEROS = 0.01
"""Part of the weights."""
_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE}


def compare(
    teacher: Path, student: ir.Model, comparison_data: DataSource, progress: Progress, recipe: Recipe
) -> dict[str, Evaluation]:
    """Both on the data of the final comparison.

    Args:
        teacher: its file.
        student: compared with it.
        comparison_data: the data.
        progress: told how far it is.
        recipe: what the user says of the outputs, and a metric of the user's own.

    Raises:
        UsageError: the metric raises, or gives no finite number.
    """
    told, metric = recipe.task, recipe.metric
    ours = evaluate(student, comparison_data, teacher=teacher, tasks=told, metric=metric, progress=progress)
    theirs = evaluate(teacher, comparison_data, tasks=told, metric=metric)
    return {"teacher": theirs, "student": ours}


def summaries(
    teacher: ir.Model,
    given: Path,
    student: ir.Model,
    written: Path | None,
    parts: Partition,
) -> list[ModelSummary]:
    """Teacher and student in numbers; compressed sizes only where the student has zeros that the teacher has not.

    Args:
        teacher: as loaded.
        given: its file.
        student: the compressed model.
        written: its file; None if there is none.
        parts: partition of the teacher, which says what MACs are told for.
    """
    zeros = [zero_weights(model) for model in (teacher, student)]
    packed = zeros[1] > zeros[0] + _MANY_ZEROS * parts.cost_of(student).parameters
    found = []
    for model, path, none in ((teacher, given, zeros[0]), (student, written, zeros[1])):
        cost = parts.cost_of(model)
        size = file_bytes(path) if path is not None else None
        small = compressed_bytes(path) if path is not None and packed else None
        found.append(ModelSummary(str(path) if path else None, cost.parameters, cost.macs, size, none, small))
    return found


def told_shapes(parts: Partition) -> dict[str, list[int]] | None:
    """Shape of each input that MACs are told for; None where they cannot be told."""
    if parts.whole.macs is None or parts.shapes.inputs is None:
        return None
    return {name: list(shape) for name, shape in parts.shapes.inputs.items()}


def zero_weights(model: ir.Model) -> int:
    """How many elements of floating-point initializers are exactly 0."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(
        int(tensor.size) - int(np.count_nonzero(tensor.numpy()))
        for tensor in tensors
        if tensor is not None and tensor.dtype in _FLOATS
    )


def drop_of(student: Evaluation, teacher: Evaluation) -> tuple[float, float]:
    """What a student loses on the data of the final comparison, and its metric: accuracy, agreement or NMSE."""
    if student.accuracy is not None and teacher.accuracy is not None:
        return teacher.accuracy - student.accuracy, student.accuracy
    if student.agreement is not None:
        return 1 - student.agreement, student.agreement
    nmse = math.inf if student.nmse is None else student.nmse
    return nmse, nmse
