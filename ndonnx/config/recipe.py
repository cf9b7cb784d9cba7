"""Everything that can be configured, in one place: unknown keys are refused.

A recipe is flat: every key is also a flag of `ndonnx compress` (`batch_size` is
`--batch-size`), except the `[data]` table, which says how raw samples become model inputs, the
`[inputs.NAME]` tables, which say what the model's inputs are, and the `[search]` table, which says
how a search goes about its target. Its keys are declared in the sections that stand beside this file.
Precedence: flag, then recipe file, then the default of the section.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    InstanceOf,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from ndonnx.config.build import Build
from ndonnx.config.data import DataRecipe
from ndonnx.config.declared import Extra, SettingError, declared, reserve
from ndonnx.config.execution import Execution
from ndonnx.config.finetuning import FINETUNE_FACTOR, Finetuning
from ndonnx.config.goal import Goal
from ndonnx.config.inputs import InputRecipe, parse_inputs
from ndonnx.config.search import SearchRecipe
from ndonnx.config.setting import Section, Setting, settings_of
from ndonnx.config.training import Training
from ndonnx.config.values import parse_augmentations, parse_bytes, parse_duration, parse_sparsity
from ndonnx.errors import RecipeError

__all__ = [
    "FINETUNE_FACTOR",
    "KEYS",
    "DataRecipe",
    "InputRecipe",
    "Recipe",
    "SearchRecipe",
    "load_recipe",
    "make_recipe",
    "method_in",
    "parse_augmentations",
    "parse_bytes",
    "parse_duration",
    "parse_inputs",
    "parse_sparsity",
    "settings",
]


def _plain(extra: Extra) -> dict[str, Any]:
    """The values that were given; `dict` itself has no signature, which pydantic 2.7 looks for."""
    return dict(extra)


class Recipe(Execution, Finetuning, Training, Goal, Build):  # pydantic puts the fields of the last base first
    """The whole of a compression run; see `ndonnx compress --help` for the same list."""

    model_inputs: dict[str, InputRecipe] = Field(default_factory=dict)
    """What the model's inputs are, by name. In a file `[inputs.NAME]`, or `[model_inputs.NAME]` where the file says
    `inputs = "refit"` as well."""
    data: DataRecipe = Field(default_factory=DataRecipe)
    """How raw samples become model inputs: the table `[data]`."""
    search: SearchRecipe = Field(default_factory=SearchRecipe)
    """How the candidates of a search are trained, measured and chosen: the table `[search]`."""
    extra: Annotated[InstanceOf[Extra], BeforeValidator(Extra.read), PlainSerializer(_plain)] = Extra()
    """Values of the settings that student methods declare for themselves, by name. In a file and as arguments of
    `load_recipe` they are flat keys as all others; dumps leave the field out where none was given."""

    @model_validator(mode="before")
    @classmethod
    def _tables(cls, values: Any) -> Any:
        """Take `[inputs.NAME]` for what the model's inputs are, and gather declared settings in `extra`."""
        if not isinstance(values, Mapping):
            return values
        values = dict(values)
        if isinstance(values.get("inputs"), Mapping):
            values["model_inputs"] = _merged(values.pop("inputs"), values.get("model_inputs", {}))
        found = {name: values.pop(name) for name in declared() if name in values}
        if found:
            values["extra"] = {**values.get("extra", {}), **found}
        return values

    @model_serializer(mode="wrap")
    def _without_empty(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = dump(self)
        return values if values.get("extra", True) else {key: kept for key, kept in values.items() if key != "extra"}

    def setting(self, name: str) -> Any:
        """The value of a flat key, also of one that a student method declares.

        Raises:
            KeyError: a recipe has no such key.
        """
        if name == "keep":
            return self.part_kept
        return getattr(self, name) if name in type(self).model_fields else self.extra[name]

    @property
    def part_kept(self) -> float:
        """The fraction that is kept where nobody decides otherwise: the paper's half where the recipe says none."""
        return _HALF if self.keep is None else self.keep

    def with_settings(self, values: Mapping[str, Any]) -> Recipe:
        """This recipe with other values of some flat keys, those of student methods among them.

        Values of the recipe's own keys are taken as they are, those of declared settings are validated.

        Raises:
            SettingError: a key is neither the recipe's own nor declared, or a declared one has a wrong value.
        """
        own = {name: value for name, value in values.items() if name in KEYS}
        further = {name: value for name, value in values.items() if name not in KEYS}
        return self.model_copy(update={**own, "extra": self.extra | further} if further else own)

    @property
    def changes_nothing(self) -> bool:
        """Whether the student in float is the teacher by definition: every channel kept, and nothing trained."""
        return self.method == "width" and self.keep == 1 and self.steps == 0

    @property
    def quantises(self) -> bool:
        """Whether students are to be in 8 bits."""
        return self.bits < _FLOAT_BITS

    @property
    def trains_nothing(self) -> bool:
        """Whether there is nothing to train, neither in float nor in 8 bits."""
        return self.changes_nothing and not self.quantises

    @property
    def simplifies(self) -> bool:
        """Whether the teacher is simplified before it is partitioned."""
        return self.simplify and not self.trains_nothing


_HALF = 0.5
_FLOAT_BITS = 32
_TABLES: dict[str, type[Section]] = {"data": DataRecipe, "search": SearchRecipe, "model_inputs": InputRecipe}
KEYS = frozenset(Recipe.model_fields) - frozenset(_TABLES) - {"extra"}
"""Flat keys of a recipe: those outside its tables, without the settings that student methods declare."""


reserve(Recipe.model_fields)


def settings() -> dict[str, Setting]:
    """Every setting that has a flag, by its key (`search.steps` in `[search]`); those of student methods come last."""
    return {setting.name: setting for setting in (*_own_settings(), *declared().values())}


@cache
def _own_settings() -> tuple[Setting, ...]:
    """Those of the recipe itself: a command line asks for them once per command."""
    return (*settings_of(Recipe), *settings_of(SearchRecipe, "search"))


def _merged(tables: Any, over: Any) -> Any:
    """Tables by name with others laid over them, key by key; what is none is left to pydantic."""
    if not isinstance(tables, Mapping) or not isinstance(over, Mapping):
        return over or tables
    merged = dict(tables)
    for name, table in over.items():
        both = isinstance(table, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = {**merged[name], **table} if both else table
    return merged


def load_recipe(path: str | Path | None = None, **overrides: Any) -> Recipe:
    """Read a TOML recipe and lay the given keys over it; `None` leaves a key alone, also inside a table.

    Raises:
        RecipeError: the file cannot be read, or a key is unknown or out of range.
    """
    values: dict[str, Any] = {} if path is None else _read(path)
    if isinstance(values.get("inputs"), dict):
        values["model_inputs"] = _merged(values.pop("inputs"), values.get("model_inputs", {}))
    for key, value in overrides.items():
        if key == "model_inputs" and value is not None:
            values[key] = _merged(values.get(key, {}), value)
        elif key in _TABLES and isinstance(value, dict) and isinstance(table := values.get(key, {}), dict):
            values[key] = table | {inner: kept for inner, kept in value.items() if kept is not None}
        elif value is not None:
            values[key] = value
    return make_recipe(values, where=str(path) if path is not None else "options")


def method_in(path: str | Path) -> str | None:
    """The student method that a TOML recipe names, before anything else of it is believed; None where it names none.

    Raises:
        RecipeError: the file cannot be read.
    """
    found = _read(path).get("method")
    return found if isinstance(found, str) else None


def _read(path: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot read the recipe: {error.strerror}") from error
    except RecursionError as error:
        raise RecipeError(f"{path}: not a recipe: its values are nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits is none of tomllib's own errors
        raise RecipeError(f"{path}: not a TOML file: {error}") from error


def make_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a mapping as a recipe; the error names the key and what it may be.

    Raises:
        RecipeError: a key is unknown, or its value out of range.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key, found, reason = ".".join(str(part) for part in first["loc"]), first["input"], first["msg"]
        if first["type"] == "extra_forbidden":
            known = ", ".join(sorted(_known(str(first["loc"][0]) if len(first["loc"]) > 1 else "")))
            raise RecipeError(f"{where}: unknown key '{key}'; known keys: {known}") from error
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, SettingError):
            key, found, reason = cause.name, cause.value, cause.reason
        raise RecipeError(f"{where}: '{key}' = {found!r}: {reason}") from error


def _known(table: str) -> set[str]:
    """The keys of a table of a recipe; of its flat part where the table has no name."""
    if table in _TABLES:
        return set(_TABLES[table].model_fields)
    return {*KEYS, *_TABLES, *declared()}
