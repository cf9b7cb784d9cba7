"""`module:function`: the user's own code, called for an iterable of samples or batches."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from ndonnx.data.registry import Opening, register_source
from ndonnx.data.source import file_bytes, first_line
from ndonnx.data.sources.items import ItemSource
from ndonnx.data.sources.noise import is_name
from ndonnx.data.user_code import import_function
from ndonnx.errors import DataError

_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def _is_function(given: Any) -> bool:
    if not isinstance(given, str) or is_name(given):
        return False
    return _FUNCTION.fullmatch(given) is not None and not Path(given).exists()


@register_source("module:function", opens=_is_function)
class FunctionSource(ItemSource):
    """Items from a function without arguments, which is called afresh for every pass."""

    def __init__(self, opening: Opening) -> None:
        """Import the function and look at its first item.

        Raises:
            DataError: it cannot be imported or called, or its first item does not fit the model.
        """
        self._function = import_function(opening.given, os.getcwd(), DataError)
        super().__init__(opening)

    def _raw_items(self) -> Iterator[Any]:
        # The user's own code may raise anything; whatever it is, it is a fault of the source.
        try:
            yield from self._function()
        except Exception as error:
            raise DataError(f"{self.spec}: raised {first_line(error)}") from error

    def _content(self) -> Iterator[bytes]:
        """The spec and the module's source; data that the function reads from elsewhere is not seen."""
        file = inspect.getsourcefile(self._function)
        return chain([self.spec.encode()], file_bytes(Path(file), file) if file is not None else [])
