"""Flags that are made from the recipe: a command names the settings that it takes and writes its own flags by hand."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ndonnx.config.panel import Panel

if TYPE_CHECKING:
    from ndonnx.config.setting import Setting

TELL = "What it tells"
_PANELS = (None, *Panel, TELL)
_TABLE = "__"
"""Between table and key in the name of a parameter: `search__steps`."""


@dataclass(frozen=True)
class Changed:
    """A setting that a command tells in its own words, or by a flag of its own."""

    name: str
    """Key of the setting in a recipe."""
    help: str
    """Help text in place of the recipe's."""
    default: str = ""
    """Default in words in place of the recipe's; empty: the recipe's."""
    flag: str = ""
    """Name of the flag in place of the recipe's; empty: the recipe's."""

    def of(self, setting: Setting) -> Setting:
        """The recipe's setting as this command tells it."""
        told = replace(setting, help=self.help)
        return replace(told, default_text=self.default or told.default_text, flag=self.flag or told.flag)


@dataclass(frozen=True)
class Command:
    """A command before its flags are made: its function, and the settings of the recipe that it takes as well."""

    function: Callable[..., int]
    """What the command does; its parameters are the command's own flags, and the first is typer's context."""
    taken: tuple[str | Changed, ...] | None
    """Settings of the recipe that are flags of the command. None: all flat ones, those that student methods declare
    among them."""

    def build(self) -> Callable[..., int]:
        """The function as typer wants it: with a parameter for each flag, those of the settings that are known now."""
        own = inspect.signature(self.function, eval_str=True).parameters
        made = {parameter_name(setting): _parameter(setting) for setting in self._settings()}
        if clash := sorted(own.keys() & made.keys()):
            raise TypeError(f"{self.function.__name__}: parameters have the names of settings: {', '.join(clash)}")

        def command(**values: Any) -> int:
            return self.function(**{name: value for name, value in values.items() if name in own})

        named = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*own.values(), *made.values())]
        parameters = sorted(named, key=_place)
        command.__name__, command.__doc__ = self.function.__name__, self.function.__doc__
        command.__annotations__ = {each.name: each.annotation for each in parameters} | {"return": int}
        command.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
        return command

    def listed(self) -> Callable[[], int]:
        """The function as it stands in the list of commands: with what it says of itself, and without flags."""

        def command() -> int:
            raise NotImplementedError(f"{self.function.__name__} was made to be listed")

        command.__name__, command.__doc__ = self.function.__name__, self.function.__doc__
        return command

    def _settings(self) -> Iterator[Setting]:
        from ndonnx.config.recipe import settings  # noqa: PLC0415 - pydantic is not for the list of commands

        known = settings()
        if self.taken is None:
            yield from (setting for name, setting in known.items() if "." not in name)
            return
        for each in self.taken:
            yield each.of(known[each.name]) if isinstance(each, Changed) else known[each]


def takes(*taken: str | Changed) -> Callable[[Callable[..., int]], Command]:
    """Decorates a command that takes these settings of the recipe as flags: keys, `search.` ones with their table."""
    return lambda function: Command(function, taken)


def takes_all(function: Callable[..., int]) -> Command:
    """Decorates a command that takes every flat setting of the recipe as a flag, declared ones included."""
    return Command(function, None)


def given(context: typer.Context) -> dict[str, Any]:
    """What the flags of a command say of the recipe, by its keys; settings without a flag on the line are left out."""
    from ndonnx.config.recipe import parse_inputs, settings  # noqa: PLC0415 - pydantic is not for the list of commands

    known, found = settings(), dict[str, Any]()
    for name, value in context.params.items():
        key = name.replace(_TABLE, ".")
        if key in known and _is_given(context, name):
            table, _, inner = key.rpartition(".")
            (found.setdefault(table, {}) if table else found)[inner] = value
    of_inputs = parse_inputs(context.params.get("input_settings") or (), context.params.get("shapes") or ())
    return found | ({"model_inputs": of_inputs} if of_inputs else {})


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def parameter_name(setting: Setting) -> str:
    """Name of the parameter of a command that holds a setting, as `search__steps`."""
    return setting.name.replace(".", _TABLE)


def option(name: str, metavar: str, text: str, default: str, panel: str | None = None) -> Any:
    """A flag of a command's own, with its default told in words."""
    return typer.Option(
        name, metavar=metavar or None, help=f"{text} (default: {default})", rich_help_panel=panel, show_default=False
    )


def _parameter(setting: Setting) -> inspect.Parameter:
    """A flag whose own default is None: the recipe holds the real one, and the help tells it."""
    names, kind = setting.flag_name, setting.option_type
    if kind is bool and setting.default:
        names = f"{names}/--no-{names.removeprefix('--')}"
    text = f"{setting.help} Repeatable." if setting.repeatable else setting.help
    info = option(names, setting.metavar, text.replace("`", ""), setting.told_default.replace("`", ""), setting.panel)
    annotation = Annotated[(list[kind] if setting.repeatable else kind) | None, info]  # type: ignore[valid-type]
    return inspect.Parameter(
        parameter_name(setting), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _place(parameter: inspect.Parameter) -> int:
    """The rank of the heading under which a parameter stands; those of one heading stay in order."""
    metadata = getattr(parameter.annotation, "__metadata__", ())
    panel = next((each.rich_help_panel for each in metadata if hasattr(each, "rich_help_panel")), None)
    return _PANELS.index(panel)
