"""What `ndonnx threshold` wrote, read again by a run that goes by it: checked, and matched with the run's partition."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ndonnx.config.recipe import Recipe
from ndonnx.errors import RecipeError, UsageError
from ndonnx.metrics.sensitivity.tolerance import Tolerance

DOCUMENT = "threshold.json"
"""Name of the document in a study's folder."""

_MOST_BYTES = 64 * 2**20
_MOST_NAMES = 5
_EXPECTED = "expected the JSON document of `ndonnx threshold`"


@dataclass(frozen=True)
class ErrorBudget:
    """How large the error at one exit may be, while there is none anywhere else."""

    nmse: float
    """The largest NMSE that is known to cost no more than the study's drop."""
    limit: float | None
    """The NMSE beyond which it is known to cost more; None where nothing that was tried did."""


@dataclass(frozen=True)
class StudyFile:
    """The part of a study that a run goes by."""

    path: Path
    max_drop: float
    """What the tolerances are for, in the unit of `metric`."""
    metric: str
    noise: Mapping[str, Tolerance]
    """Read off curves of noise, by neighbourhood."""
    students: Mapping[str, Tolerance]
    """Read off untrained students: what follows averages independent noise away, so that these are the true ones."""
    kept: frozenset[str]
    """Neighbourhoods that could not be measured."""
    exits: Mapping[str, str]
    """The value at which each neighbourhood ends; empty in a document that does not say so."""

    def budgets_of(self, exits: Mapping[str, str]) -> dict[str, ErrorBudget]:
        """What the neighbourhoods of a partition bear; those that could not be measured are left out.

        Args:
            exits: name of the exit of each neighbourhood that can be distilled.

        Raises:
            UsageError: the study is of another model or of another partition.
        """
        known = self.noise.keys() | self.students.keys() | self.kept
        again = "run `ndonnx threshold` on this model, with the same --granularity, --cut and --freeze"
        missing = [name for name in exits if name not in known]
        if missing:
            raise UsageError(
                f"{self.path}: has no tolerance of {_listed(missing)}: a study of another model or partition; {again}"
            )
        moved = [name for name, value in exits.items() if self.exits.get(name, value) != value]
        if moved:
            raise UsageError(
                f"{self.path}: {moved[0]} ends at {_shown(self.exits[moved[0]])} there and at "
                f"{_shown(exits[moved[0]])} here: a study of another model or partition; {again}"
            )
        found = {name: _bearable(self.students.get(name), self.noise.get(name)) for name in exits}
        return {name: budget for name, budget in found.items() if budget is not None}


def read_study(path: str | Path) -> StudyFile:
    """Read the document of a study, or the one in a study's folder.

    Raises:
        UsageError: it cannot be read, or is something else.
    """
    path = Path(path)
    path = path / DOCUMENT if path.is_dir() else path
    try:
        size = path.stat().st_size
        text = path.read_bytes() if size <= _MOST_BYTES else b""
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        what = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path}: cannot read the tolerances: {what}; `ndonnx threshold` writes them") from error
    if size > _MOST_BYTES:
        raise UsageError(f"{path}: {_EXPECTED}, found {size} bytes, more than any has")
    try:
        # All numbers as floats: an integer of thousands of digits becomes infinite, and is refused as such.
        document = json.loads(text, parse_int=float)
    except RecursionError as error:
        raise UsageError(f"{path}: {_EXPECTED}, found brackets nested too deeply") from error
    except ValueError as error:
        raise UsageError(f"{path}: {_EXPECTED}, found no JSON: {error}") from error
    return _study(path, document)


def _study(path: Path, document: object) -> StudyFile:
    if not isinstance(document, dict):
        raise UsageError(f"{path}: {_EXPECTED}, found {_shown(document)}")
    wanting = [key for key in ("max_drop", "metric", "tolerances", "student_tolerances") if key not in document]
    if wanting:
        raise UsageError(f"{path}: {_EXPECTED}, found one without {wanting[0]!r}")
    metric = document["metric"]
    if metric not in ("accuracy", "agreement", "nmse"):
        raise _wrong(path, "metric", "accuracy, agreement or nmse", metric)
    return StudyFile(
        path=path,
        max_drop=_number(path, "max_drop", document["max_drop"]),
        metric=metric,
        noise=_tolerances(path, "tolerances", document["tolerances"]),
        students=_tolerances(path, "student_tolerances", document["student_tolerances"]),
        kept=frozenset(_texts(path, "kept", document.get("kept", {}))),
        exits=_texts(path, "exits", document.get("exits", {})),
    )


def _tolerances(path: Path, key: str, entries: object) -> dict[str, Tolerance]:
    if not isinstance(entries, list):
        raise _wrong(path, key, "a list", entries)
    found: dict[str, Tolerance] = {}
    for number, entry in enumerate(entries):
        where = f"{key}[{number}]"
        if not isinstance(entry, dict):
            raise _wrong(path, where, "a table with name, nmse and largest", entry)
        name, nmse = entry.get("name"), entry.get("nmse")
        if not isinstance(name, str) or name in found:
            raise _wrong(path, f"{where}.name", "a neighbourhood that is not in it yet", name)
        largest = _number(path, f"{where}.largest", entry.get("largest"))
        limit = None if nmse is None else _number(path, f"{where}.nmse", nmse)
        found[name] = Tolerance(name, limit, largest, None)
    return found


def _number(path: Path, where: str, value: object) -> float:
    if not isinstance(value, float) or not math.isfinite(value) or value < 0:
        raise _wrong(path, where, "a number from 0 up", value)
    return value


def _texts(path: Path, where: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _wrong(path, where, "names and texts", value)
    return value


def _bearable(student: Tolerance | None, noise: Tolerance | None) -> ErrorBudget | None:
    """By students where there are any; the limit that they did not reach may be known from noise, which costs less."""
    known = [found for found in (student, noise) if found is not None and (found.nmse is not None or found.largest > 0)]
    if not known:
        return None
    first, *others = known
    if first.nmse is not None:
        return ErrorBudget(first.nmse, first.nmse)
    limits = [max(first.largest, found.nmse) for found in others if found.nmse is not None]
    return ErrorBudget(first.largest, limits[0] if limits else None)


def _wrong(path: Path, where: str, expected: str, found: object) -> UsageError:
    return UsageError(f"{path}: {where}: expected {expected}, found {_shown(found)}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _shown(value: object) -> str:
    """A value of a file from outside, short and without what a terminal would obey."""
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def study_of(recipe: Recipe) -> StudyFile | None:
    """The study that a recipe names, if any.

    Raises:
        UsageError: it cannot be read, or is no study.
        RecipeError: it says nothing of what the recipe measures.
    """
    if recipe.threshold is None:
        return None
    if recipe.inputs == "noise":
        raise RecipeError(
            "threshold: its tolerances are of errors on data, and with inputs = 'noise' errors are measured on noise; "
            "leave one of them out"
        )
    return read_study(recipe.threshold)
