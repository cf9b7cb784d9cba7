"""Modules that bring something by a name: one a file of a folder that ships, and those that entry points name.

They are found without being imported, so a help text costs nothing, and something new is one new file.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType


@dataclass(frozen=True)
class Plugins:
    """The modules of one kind of thing."""

    package: ModuleType
    """Package of which every file brings what it is called after."""
    group: str
    """Group of entry points of installed packages."""

    def shipped(self) -> list[str]:
        """Names of the files of the package."""
        return [found.name for found in pkgutil.iter_modules(self.package.__path__)]

    def homes(self) -> dict[str, str]:
        """Modules by the name of what they bring; a file of ours goes before a package's."""
        own = {name: f"{self.package.__name__}.{name}" for name in self.shipped()}
        return _of_packages(self.group) | own

    def load(self, name: str) -> None:
        """Import the module of a name, which registers what it brings."""
        importlib.import_module(self.homes()[name])


@cache
def _of_packages(group: str) -> dict[str, str]:
    return {point.name: point.module for point in entry_points(group=group)}
