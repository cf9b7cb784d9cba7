"""What is known of a setting beside its value: its help, its flag and its section, read off the recipe's own fields.

A field of a section says everything once. Its annotation holds its type and a `Flag`; the docstring below it is its
help, and ends in `Default: ...` where the default has to be told in words:

    steps: Annotated[int | None, Flag("N", Panel.TRAIN)] = Field(None, ge=0)
    \"\"\"Number of optimizer steps. Default: a fifth of the recipe's.\"\"\"
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, field_validator

from ndonnx.config.docstrings import field_docstrings
from ndonnx.config.panel import Panel


@dataclass(frozen=True)
class Flag:
    """How a field of a section appears on the command line."""

    metavar: str
    """Placeholder of the flag's value in help texts; empty for a switch without a value."""
    panel: Panel
    """Heading under which the flag is listed."""
    name: str = ""
    """Name of the flag, as `--keep`. Empty: the field's name with dashes."""
    repeatable: bool = False
    """Whether the flag may be given several times, each time with one element of a tuple."""


_NO_FLAG = Flag("", Panel.BUILD)
_MOST = 2**63 - 1


class Section(BaseModel):
    """Base of everything that can be set in a recipe: frozen, and unknown keys are refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        protected_namespaces=(),
        defer_build=True,  # `--help` reads the fields and validates nothing
        allow_inf_nan=False,
    )

    @field_validator("*")
    @classmethod
    def _in_range(cls, value: Any) -> Any:
        """Refuse whole numbers that do not fit into 64 bits: whatever is counted, nobody means so many."""
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, int) and not -_MOST <= each <= _MOST:
                raise ValueError(f"is out of range: at most {_MOST:.2g}")
        return value


@dataclass(frozen=True)
class Setting:
    """One setting: its type and default, and how `--help` and README tell it."""

    name: str
    """Key in a recipe, with its table where it stands in one: `keep`, `search.steps`."""
    annotation: Any
    """Type of the value, as pydantic reads it, `Annotated` constraints included."""
    default: Any
    """Value where neither a recipe nor a flag gives one."""
    help: str
    """Full sentence that says what is set; words between backticks are literal."""
    metavar: str
    """Placeholder of the value in help texts; empty for a switch without a value."""
    panel: Panel = Panel.BUILD
    """Heading under which the setting is listed."""
    default_text: str = ""
    """The default in words. Empty: the default as it is written on a command line."""
    flag: str = ""
    """Name of the command-line flag. Empty: the last part of `name` with dashes, as `--round-to`."""
    repeatable: bool = False
    """Whether the flag may be given several times, each time with one element of a tuple."""

    @property
    def flag_name(self) -> str:
        """Name of the command-line flag, as `--round-to`."""
        return self.flag or f"--{self.name.rpartition('.')[2].replace('_', '-')}"

    @property
    def told_default(self) -> str:
        """The default as help texts tell it: in words, or as it is written on a command line."""
        if self.default_text:
            return self.default_text
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        if isinstance(self.default, tuple):
            return ",".join(map(str, self.default)) or "none"
        return "none" if self.default is None else str(self.default)

    @property
    def option_type(self) -> Any:
        """Type of one value on the command line: int, float, bool, or str where the recipe reads the text itself."""
        if _reads_text(self.annotation):
            return str
        found = _plain_type(self.annotation)
        if get_origin(found) is Literal:
            found = type(get_args(found)[0])
        return found if found in (int, float, bool) else str


def settings_of(section: type[Section], table: str = "", *, unflagged: bool = False) -> Iterator[Setting]:
    """The settings of a section that have a flag, in the order of their declaration.

    Args:
        section: the class whose fields are read.
        table: name of the table in which the section stands in a recipe. Empty: none, its keys are flat.
        unflagged: whether fields without a flag are settings too, with an empty metavar.
    """
    helps = helps_of(section)
    for name, field in section.model_fields.items():
        flag = next((each for each in field.metadata if isinstance(each, Flag)), _NO_FLAG if unflagged else None)
        if flag is not None:
            text, default_text = helps[name]
            yield Setting(
                name=f"{table}.{name}" if table else name,
                annotation=Annotated[(field.annotation, *field.metadata, flag)],
                default=field.default,
                help=text,
                metavar=flag.metavar,
                panel=flag.panel,
                default_text=default_text,
                flag=flag.name,
                repeatable=flag.repeatable,
            )


def helps_of(section: type[Section]) -> dict[str, tuple[str, str]]:
    """By field of a section: its help, and its default in words, which may be empty; both from its docstring."""
    found = field_docstrings(section)
    parts = {name: found.get(name, "").partition(" Default: ") for name in section.model_fields}
    return {name: (text, default.removesuffix(".")) for name, (text, _, default) in parts.items()}


def _reads_text(annotation: Any) -> bool:
    """Whether a parser of the recipe's own reads the text of this type."""
    metadata = getattr(annotation, "__metadata__", ())
    return any(isinstance(each, BeforeValidator) for each in metadata) or any(map(_reads_text, get_args(annotation)))


def _plain_type(annotation: Any) -> Any:
    """The type of one element, without `Annotated`, `None` and the tuple around it."""
    inner = [each for each in get_args(annotation) if each is not type(None)]
    return _plain_type(inner[0]) if inner and get_origin(annotation) is not Literal else annotation
