"""The part of the samples whose class is among the student's five largest scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndonnx.distill.tasks.outputs import class_scores
from ndonnx.distill.tasks.scores import top_class
from ndonnx.errors import UsageError
from ndonnx.metrics.metric import register_metric

_MOST = 5


@register_metric("top5")
def top5(
    student: Mapping[str, NDArray[Any]], teacher: Mapping[str, NDArray[Any]], labels: NDArray[np.int64] | None
) -> float:
    """Part of the samples, 0 to 1, whose label (without labels: the teacher's class) is among the five largest scores.

    Raises:
        UsageError: no output holds class scores.
    """
    samples = max(len(values) for values in teacher.values())
    name = class_scores(teacher, samples, labelled=labels is not None)
    if name is None:
        raise UsageError("no output is known to hold class scores")
    wanted = top_class(teacher[name]) if labels is None else labels
    largest = np.argsort(-student[name], axis=1, kind="stable")[:, :_MOST]
    return float((largest == wanted[:, None]).any(axis=1).mean())
