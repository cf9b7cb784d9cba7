"""The report of a run as it lies on disk: found, read, and asked for its parts without trusting any of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ndonnx.errors import UsageError
from ndonnx.metrics.worst import FOLDER

FILE = "report.json"
"""Name of the report in a run directory."""
_LARGEST = 64 * 2**20
"""Most bytes of a report that is read."""
_LARGEST_PICTURE, _PNG = 2**18, b"\x89PNG\r\n\x1a\n"
"""Most bytes of a picture of a page, and how each begins."""
_NEEDED = {"teacher": Mapping, "student": Mapping, "metrics": Mapping, "neighbourhoods": Sequence, "seconds": Mapping}
"""What every report of a compression holds."""


@dataclass(frozen=True)
class RunDocument:
    """The report of one run."""

    path: Path
    """Its file."""
    content: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What the run is called on a page: its student's file, or its folder."""
        student = text(self.at("student", "path"))
        return Path(student).name if student else self.path.parent.name

    def at(self, *keys: str) -> Any:
        """What stands under these keys, one inside the other; None where there is no such thing."""
        return at(self.content, *keys)

    def rows(self, *keys: str) -> list[Mapping[str, Any]]:
        """The mappings in a list; what is none is left out."""
        found = self.at(*keys)
        return [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []

    def picture(self, name: str) -> bytes | None:
        """A picture that the report names, from the run's folder of them; None where there is no such PNG file."""
        path = self.path.parent / FOLDER / Path(name).name
        try:
            if not name or path.is_symlink() or path.stat().st_size > _LARGEST_PICTURE:
                return None
            content = path.read_bytes()
        except (OSError, ValueError):
            return None
        return content if content.startswith(_PNG) else None


def at(content: Any, *keys: str) -> Any:
    """What stands in a mapping under these keys, one inside the other; None where there is no such thing."""
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def text(value: Any) -> str:
    """Text as it is; anything else is none."""
    return value if isinstance(value, str) else ""


def read_run(given: str | Path) -> RunDocument:
    """Read a run's report.

    Args:
        given: a run directory, or the file of a report.

    Raises:
        UsageError: there is none, it cannot be read, or it is not the report of a compression.
    """
    path = Path(given)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"{given}: expected a run directory or its {FILE}, found neither; `ndonnx compress` makes one")
    try:
        if path.stat().st_size > _LARGEST:
            raise UsageError(f"{path}: holds {path.stat().st_size} bytes, which no report has; give another file")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: cannot read the report: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not a JSON document; give the {FILE} of a run") from error
    for key, kind in _NEEDED.items():
        if not isinstance(at(content, key), kind) or isinstance(at(content, key), str):
            raise UsageError(f"{path}: not the report of a compression, as it has no '{key}'; give the {FILE} of a run")
    return RunDocument(path, content)
