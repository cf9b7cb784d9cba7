"""The metric that the user asks for: a function of all outputs of student and teacher, and of the labels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real

import numpy as np
from numpy.typing import NDArray

from ndonnx.data.source import first_line
from ndonnx.errors import UsageError
from ndonnx.metrics.registry import metric_of

Array = NDArray[np.generic]


class UserMetric:
    """Collects answers batch by batch, and hands them all to the user's function."""

    def __init__(self, spec: str) -> None:
        """Find the function.

        Args:
            spec: a name, or `module:function`.

        Raises:
            RecipeError: there is no such metric.
        """
        self._spec = spec
        self._function = metric_of(spec)
        self._student: dict[str, list[Array]] = {}
        self._teacher: dict[str, list[Array]] = {}
        self._labels: list[NDArray[np.int64] | None] = []

    def add(
        self, outputs: Mapping[str, Array], expected: Mapping[str, Array], labels: NDArray[np.int64] | None
    ) -> None:
        """Keep the answers to a batch, and its labels where it has any."""
        for kept, answers in ((self._student, outputs), (self._teacher, expected)):
            for name, value in answers.items():
                kept.setdefault(name, []).append(np.atleast_1d(value))
        self._labels.append(labels)

    def result(self) -> float:
        """What the function gives for all that was added.

        Raises:
            UsageError: it raises, or returns something else than a finite number; or the answers do not fit together.
        """
        student, teacher = self._joined(self._student), self._joined(self._teacher)
        known = [labels for labels in self._labels if labels is not None]
        labels = np.concatenate(known) if known and len(known) == len(self._labels) else None
        try:
            found = self._function(student, teacher, labels)
        except Exception as error:  # the user's code may raise anything
            raise UsageError(f"metric {self._spec}: raised {first_line(error)}") from error
        if not isinstance(found, Real) or isinstance(found, bool):
            raise UsageError(f"metric {self._spec}: returned {type(found).__name__}, expected a finite float")
        if not math.isfinite(found):
            raise UsageError(f"metric {self._spec}: returned {float(found)}, expected a finite float")
        return float(found)

    def _joined(self, kept: Mapping[str, list[Array]]) -> dict[str, Array]:
        for name, parts in kept.items():
            shapes = sorted({part.shape[1:] for part in parts})
            if len(shapes) > 1:
                raise UsageError(
                    f"metric {self._spec}: output '{name}' has rows of several shapes, as {list(shapes[0])} and "
                    f"{list(shapes[-1])}, which make no array; give data for which it has one"
                )
        return {name: np.concatenate(parts) for name, parts in kept.items()}
