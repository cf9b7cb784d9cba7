"""What a metric is, and how one is declared.

A metric is a function of the student's outputs and the teacher's (arrays by name, all samples) and of the labels, int64
(samples,) or None. It returns a float; higher is better.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

Metric: TypeAlias = Callable[..., Any]
"""Of the student's outputs, the teacher's, and the labels."""
_Given = TypeVar("_Given", bound=Metric)

REGISTERED: dict[str, Metric] = {}
"""All that have been declared, by name."""


def register_metric(name: str) -> Callable[[_Given], _Given]:
    """Declare a metric: a decorator for its function, which `--metric` and the recipe's `metric` then know by name."""

    def register(function: _Given) -> _Given:
        REGISTERED[name] = function
        return function

    return register
