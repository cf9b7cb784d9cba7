"""torchvision for onnx2torch, loaded by the two operators that need it and by nothing else.

onnx2torch imports torchvision for `NonMaxSuppression` and `RoiAlign` as soon as it is imported itself. torchvision may
be missing, and a build for CUDA does not load beside a CPU-only torch: no reason to refuse every other operator.
Nothing is defined in torchvision's name: a definition that comes before its own ends the process.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_ROOT = "torchvision"
_OPERATORS = "torchvision.ops"


@contextmanager
def torchvision_on_demand() -> Iterator[None]:
    """Stand in for torchvision while a module is imported that only names its operators.

    A torchvision that is loaded already stays as it is. Otherwise whatever the module imports from
    `torchvision.ops` loads the real one when it is called; what then fails is a `NotImplementedError`
    that says why. Afterwards `import torchvision` is as if this had never been.
    """
    if sys.modules.get(_ROOT) is not None:
        yield
        return
    hidden = {name: sys.modules[name] for name in (_ROOT, _OPERATORS) if name in sys.modules}
    root, operators = _module(_ROOT), _module(_OPERATORS)
    root.__path__ = []
    vars(root)["ops"] = operators
    vars(operators)["__getattr__"] = _on_demand
    sys.modules.update({_ROOT: root, _OPERATORS: operators})
    try:
        yield
    finally:
        for name in (_ROOT, _OPERATORS):
            del sys.modules[name]
        sys.modules.update(hidden)


def _module(name: str) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)  # `find_spec` of a module without one raises
    return module


def _on_demand(name: str) -> Callable[..., Any]:
    """The function of `torchvision.ops` with this name, looked up when it is called."""
    if name.startswith("__"):
        raise AttributeError(name)

    def operator(*args: Any, **kwargs: Any) -> Any:
        try:
            importlib.import_module(_ROOT)  # alone it says better why it does not load
            function = getattr(importlib.import_module(_OPERATORS), name)
        except Exception as error:  # builds that do not match fail in as many ways as there are builds
            reason = str(error).partition("\n")[0]
            raise NotImplementedError(f"it needs torchvision, which does not load here ({reason})") from error
        return function(*args, **kwargs)

    return operator
