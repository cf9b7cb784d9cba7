"""`module:function`: finding the user's own code, in the folder from which the command was started."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from ndonnx.data.source import first_line
from ndonnx.errors import UsageError


def import_function(spec: str, folder: str, refusal: type[UsageError]) -> Callable[..., Any]:
    """The function that `module:function` names.

    Args:
        spec: as the user wrote it.
        folder: where modules are looked for besides the installed ones.
        refusal: the error to raise.

    Raises:
        UsageError: of the kind `refusal`: the module cannot be imported, or has no such function.
    """
    module_name, _, function_name = spec.partition(":")
    # Installed commands do not look in the current directory; stays, since the function may import later.
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module may raise anything while it is imported
        raise refusal(f"{spec}: cannot import '{module_name}' from {folder}: {first_line(error)}") from error
    function = vars(module).get(function_name)
    if not inspect.isfunction(function):
        public = [name for name, value in vars(module).items() if inspect.isfunction(value) and name[0] != "_"]
        raise refusal(f"{spec}: '{module_name}' has no function '{function_name}'; it has {public or 'none'}")
    return function
