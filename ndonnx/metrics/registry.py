"""Metrics by name: those of `named/`, of installed packages, of the program itself, and `module:function`."""

from __future__ import annotations

import os

from ndonnx.data.user_code import import_function
from ndonnx.errors import RecipeError, first_line
from ndonnx.metrics import named
from ndonnx.metrics.metric import REGISTERED, Metric
from ndonnx.runtime.plugins import Plugins

ENTRY_POINTS = "ndonnx.metrics"
"""Group of entry points under which an installed package names its metrics: `words = "my_package.words"`."""

_PLUGINS = Plugins(named, ENTRY_POINTS)


def metric_names() -> list[str]:
    """Names of all metrics, sorted."""
    return sorted({*_PLUGINS.homes(), *REGISTERED})


def metric_of(spec: str) -> Metric:
    """The metric that `--metric` asks for, imported where that has not happened.

    Args:
        spec: a name, or `module:function`.

    Raises:
        RecipeError: there is no such metric, or its module cannot be imported.
    """
    if ":" in spec:
        return import_function(spec, os.getcwd(), RecipeError)
    if spec not in metric_names():
        raise RecipeError(f"--metric {spec}: expected {', '.join(metric_names())} or module:function")
    if spec not in REGISTERED:
        try:
            _PLUGINS.load(spec)
        except Exception as error:  # a module may raise anything while it is imported
            raise RecipeError(f"--metric {spec}: {first_line(error)}") from error
    return REGISTERED[spec]


def check_metric(spec: str | None) -> None:
    """Refuse a metric that is not there, before anything is run; None is none.

    Raises:
        RecipeError: it is not known, its module cannot be imported, or has no such function.
    """
    if spec is not None:
        metric_of(spec)
