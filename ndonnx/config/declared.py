"""Settings that a student method, or any other plug-in, declares for itself.

    declare(Setting("bits", Annotated[int, Field(ge=2, le=16)], 8, "Number of bits of a quantised weight.", "N"))

makes `bits` a key of every recipe and a flag of `ndonnx compress`; its value is `recipe.extra["bits"]`. A setting
is declared when the plug-in is imported, before recipes are read and the command line is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ndonnx.config.setting import Setting

_DECLARED: dict[str, Setting] = {}
_TAKEN: set[str] = set()


def declare(setting: Setting) -> Setting:
    """Make a setting a key of every recipe and a flag of `ndonnx compress`; the same one may be declared again.

    Raises:
        ValueError: its name is no identifier or a key of every recipe, another setting has been declared under it,
            or its default is not of its own type.
    """
    if not setting.name.isidentifier():
        raise ValueError(f"setting '{setting.name}': its name should be an identifier, as round_to")
    if setting.name in _TAKEN:
        raise ValueError(f"setting '{setting.name}': a recipe has this key already")
    if _DECLARED.get(setting.name, setting) != setting:
        raise ValueError(f"setting '{setting.name}' is declared already, and differently")
    try:
        TypeAdapter(setting.annotation).validate_python(setting.default)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ValueError(f"setting '{setting.name}': its default {setting.default!r}: {reason}") from error
    return _DECLARED.setdefault(setting.name, setting)


def withdraw(name: str) -> None:
    """Forget a declared setting, as a test does after a plug-in of its own."""
    _DECLARED.pop(name, None)
    _reader.cache_clear()


def reserve(names: Iterable[str]) -> None:
    """Keep names from being declared: those that are fields of the recipe itself."""
    _TAKEN.update(names)


def declared() -> Mapping[str, Setting]:
    """The declared settings by name, in the order of their declaration."""
    return dict(_DECLARED)


class SettingError(ValueError):
    """A value is not of the type of its setting, or its setting is not declared."""

    def __init__(self, name: str, value: object, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.value, self.reason = name, value, reason


class Extra(Mapping[str, Any]):
    """Values of declared settings, never changed: it holds those that were given, and answers defaults for the others.

    `extra["bits"]` is what the user gave, else the default that was declared; `len`, iteration and `in` tell what
    was given. `extra | {"bits": 4}` is a new one.
    """

    __slots__ = ("_given",)

    def __init__(self, given: Mapping[str, Any] | None = None) -> None:
        self._given = dict(given or {})

    @classmethod
    def read(cls, values: object) -> object:
        """Validate each value by the type of its setting; pass what is no mapping to pydantic.

        Raises:
            SettingError: a setting is not declared, or a value is not of its type.
        """
        if isinstance(values, Extra) or not isinstance(values, Mapping):
            return values
        return cls({name: _read(name, value) for name, value in values.items()})

    def __getitem__(self, name: str) -> Any:
        if name in self._given:
            return self._given[name]
        return _DECLARED[name].default

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)

    def __contains__(self, name: object) -> bool:
        return name in self._given

    def __or__(self, other: Mapping[str, Any]) -> Extra:
        read = Extra.read(dict(other))
        return Extra({**self._given, **(read if isinstance(read, Extra) else {})})

    def __hash__(self) -> int:
        return hash(frozenset(self._given.items()))

    def __repr__(self) -> str:
        return f"Extra({self._given!r})"


def _read(name: str, value: Any) -> Any:
    if name not in _DECLARED:
        raise SettingError(name, value, "no student method declares this setting")
    try:
        return _reader(name).validate_python(value)
    except ValidationError as error:
        raise SettingError(name, value, error.errors()[0]["msg"]) from error


@cache
def _reader(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(_DECLARED[name].annotation)
