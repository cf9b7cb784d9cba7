"""How the values of a recipe are written as text: bytes, durations, sparsities, names, sizes."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)
_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h|)\s*", re.IGNORECASE)
_PATTERN = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*")


def parse_bytes(value: object) -> object:
    """Read `4GB`, `512MiB` or a plain number as bytes; pass anything else to pydantic."""
    if isinstance(value, str) and (found := _BYTES.fullmatch(value)):
        number, unit, binary = found.groups()
        scale = 1024 ** "kmgt".index(unit.lower()) * 1024 if binary and unit else _UNITS[unit.lower()]
        size = float(number) * scale
        return int(size) if math.isfinite(size) else value
    return value


def parse_duration(value: object) -> object:
    """Read `90`, `90s`, `3m` or `1h` as seconds; pass anything else to pydantic."""
    if isinstance(value, str) and (found := _DURATION.fullmatch(value)):
        seconds = float(found[1]) * _SECONDS[found[2].lower()]
        return seconds if math.isfinite(seconds) else value
    return value


def parse_sparsity(value: object) -> str:
    """Check `0.7` or `2:4` and return it as text.

    Raises:
        ValueError: it is neither a number from 0 to below 1 nor N:M with 0 < N < M.
    """
    text = str(value)
    if found := _PATTERN.fullmatch(text):
        zeros, group = int(found[1]), int(found[2])
        if 0 < zeros < group:
            return f"{zeros}:{group}"
    else:
        with suppress(ValueError):
            if 0 <= float(text) < 1:
                return text
    raise ValueError("should be a part from 0 to below 1, as 0.7, or zeros in a group, as 2:4")


def parse_names(value: object) -> object:
    """Take one name for a list of one; pass anything else to pydantic."""
    return (value,) if isinstance(value, str) else value


def parse_plain(value: object) -> object:
    """Take a number as its text; pass anything else to pydantic."""
    return f"{value}" if isinstance(value, int | float) and not isinstance(value, bool) else value


def parse_augmentations(value: object) -> object:
    """Read `none` as nothing and `flip,mixup` as two; pass anything else to pydantic."""
    if isinstance(value, str):
        value = tuple(name.strip() for name in value.split(","))
    return () if value in (("none",), ["none"]) else value


def parse_baselines(value: object) -> object:
    """Read `int8,fp16` as two names and `none` as nothing; pass anything else to pydantic."""
    if isinstance(value, str):
        value = tuple(name.strip() for name in value.split(","))
    return () if value in (("none",), ["none"]) else value


def parse_value(value: object) -> object:
    """Read `16000`, `true` or `0.6,1,0.8` as numbers; pass anything else to pydantic."""
    if not isinstance(value, str):
        return value
    parts = [_number(part.strip()) for part in value.split(",")]
    return parts[0] if len(parts) == 1 else parts


def _number(text: str) -> bool | int | float:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"expected numbers by commas, or true or false; found '{text[:40]}'") from None


def parse_tasks(value: object) -> object:
    """Take `embedding`, `boxes=regression` or `module:function`, one or several; pass anything else to pydantic.

    Which kinds there are is not known here: they register themselves.
    """
    given = (value,) if isinstance(value, str) else value
    return tuple(given) if isinstance(given, tuple | list) else value


def parse_sizes(value: object) -> object:
    """Read `1,3,48,320` as sizes; pass anything else to pydantic."""
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
Duration = Annotated[float, BeforeValidator(parse_duration), Field(gt=0)]
Sparsity = Annotated[str, BeforeValidator(parse_sparsity)]
Drop = Annotated[str, BeforeValidator(parse_plain)]
Tasks = Annotated[tuple[str, ...], BeforeValidator(parse_tasks)]
Names = Annotated[tuple[str, ...], BeforeValidator(parse_names)]
Augmentation = Literal["auto", "flip", "shift", "mixup"]
Augmentations = Annotated[tuple[Augmentation, ...], BeforeValidator(parse_augmentations)]
Baseline = Literal["int8", "dynamic", "fp16"]
BaselineNames = Annotated[tuple[Baseline, ...], BeforeValidator(parse_baselines)]
Value = Annotated[bool | int | float | list[Any], BeforeValidator(parse_value)]
Sizes = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(parse_sizes)]
