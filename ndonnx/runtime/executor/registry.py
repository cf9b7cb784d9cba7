"""Executors by name: those of this folder, those that installed packages bring, and those of the program itself.

Every file of this folder is imported when an executor is looked up. The module of a package, found by its entry point
in the group `ndonnx.executors`, is imported only when its name is asked for.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import TypeAlias, TypeVar

from ndonnx.config.execution import Execution
from ndonnx.errors import RecipeError, first_line
from ndonnx.runtime.executor.base import Executor

MakeExecutor: TypeAlias = Callable[[int], Executor]
"""Makes an executor for a number of workers, which is at least 1."""
MakeConfigured: TypeAlias = Callable[[int, Execution], Executor]
"""The same, of what else the recipe says of how to run."""

_Made = TypeVar("_Made", bound=MakeExecutor)
_Configured = TypeVar("_Configured", bound=MakeConfigured)

ENTRY_POINTS = "ndonnx.executors"
"""Group of entry points under which an installed package names its executors: `ray = "my_package.ray"`."""


@dataclass(frozen=True)
class ExecutorKind:
    """One kind of executor."""

    says: str
    """How it runs jobs, in words for messages: `one after the other in this process`."""
    make: MakeConfigured
    """Makes one."""
    check: Callable[[Execution], None] | None = None
    """Refuses settings with which it could not run."""
    machines: Callable[[Execution], list[int]] | None = None
    """Cores of each machine that jobs run on; None: they run on this one."""


REGISTERED: dict[str, ExecutorKind] = {}
"""All that have been declared, by name."""


def register_executor(name: str, says: str) -> Callable[[_Made], _Made]:
    """Declare an executor: a decorator for a class or function that makes it of a number of workers.

    Args:
        name: the value of the recipe's `executor`.
        says: how it runs jobs, in words for messages, such as `one after the other in this process`.
    """

    def register(make: _Made) -> _Made:
        REGISTERED[name] = ExecutorKind(says, lambda workers, _: make(workers))
        return make

    return register


def register_configured(
    name: str,
    says: str,
    *,
    check: Callable[[Execution], None] | None = None,
    machines: Callable[[Execution], list[int]] | None = None,
) -> Callable[[_Configured], _Configured]:
    """Declare an executor that is made of a number of workers and of the recipe's other settings of how to run.

    Args:
        name: the value of the recipe's `executor`.
        says: how it runs jobs, in words for messages.
        check: called before anything is computed; it raises a `UsageError` where the executor could not run.
        machines: tells the cores of each machine that jobs run on, where that is not this one alone: by default there
            are as many workers as cores.
    """

    def register(make: _Configured) -> _Configured:
        REGISTERED[name] = ExecutorKind(says, make, check, machines)
        return make

    return register


def check_executor(execution: Execution) -> None:
    """Refuse a recipe's executor that is not known, or could not run, before anything is computed.

    Raises:
        RecipeError: it is not known, or its module cannot be imported.
        UsageError: it could not run.
    """
    kind = _kind(execution.executor)
    if kind.check is not None:
        kind.check(execution)


def machines_of(execution: Execution) -> list[int] | None:
    """Cores of each machine that the executor of a recipe runs jobs on; None: they run on this one."""
    machines = _kind(execution.executor).machines
    return None if machines is None else machines(execution)


def make_executor(name: str, workers: int, execution: Execution | None = None) -> Executor:
    """The executor of a recipe's `executor` and `workers`; `serial` runs one job at a time whatever `workers` is.

    Args:
        name: of the executor.
        workers: how many jobs it runs at a time.
        execution: the recipe. None: its defaults.

    Raises:
        RecipeError: `name` is unknown or `workers` is below 1.
        UsageError: the executor cannot run as the recipe says.
    """
    if workers < 1:
        raise RecipeError(f"workers = {workers}: at least 1 is needed")
    return _kind(name).make(workers, Execution() if execution is None else execution)


def _kind(name: str) -> ExecutorKind:
    _import_shipped()
    if name not in REGISTERED and name in _brought():
        _import_brought(name)
    if name not in REGISTERED:
        raise RecipeError(f"recipe: 'executor' = {name!r}: expected {_known()}")
    return REGISTERED[name]


def _known() -> str:
    """The known names, each with what is known of it."""
    told = {name: f"{name} ({kind.says})" for name, kind in REGISTERED.items()}
    *others, last = (told.get(name, name) for name in sorted({*_brought(), *told}))
    return f"{', '.join(others)} or {last}" if others else last


@cache
def _brought() -> dict[str, str]:
    """Modules by the name of the executor that an installed package names."""
    return {point.name: point.module for point in entry_points(group=ENTRY_POINTS)}


def _import_brought(name: str) -> None:
    module = _brought()[name]
    try:
        importlib.import_module(module)
    except Exception as error:  # a module may raise anything while it is imported
        raise RecipeError(f"recipe: 'executor' = {name!r}: cannot import {module}: {first_line(error)}") from error
    if name not in REGISTERED:
        raise RecipeError(f"recipe: 'executor' = {name!r}: {module} registers no executor of this name")


_SHIPPED = "ndonnx.runtime.executor"
"""Package of which every file may register an executor."""


@cache
def _import_shipped() -> None:
    for module in pkgutil.iter_modules(importlib.import_module(_SHIPPED).__path__):
        importlib.import_module(f"{_SHIPPED}.{module.name}")
