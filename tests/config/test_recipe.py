"""The recipe's own words: every setting is declared once, and flags, README and dumps are made from it."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field, ValidationError
from typer.main import get_command

from ndonnx.config.declared import declare, declared, withdraw
from ndonnx.config.panel import Panel
from ndonnx.config.recipe import (
    DataRecipe,
    InputRecipe,
    Recipe,
    SearchRecipe,
    load_recipe,
    make_recipe,
    parse_bytes,
    settings,
)
from ndonnx.config.setting import Section, Setting, helps_of
from ndonnx.errors import RecipeError
from ndonnx_cli.main import build_app, main
from scripts.recipe_table import README, with_tables

BITS = Setting("digits", Annotated[int, Field(ge=2, le=16)], 8, "Number of digits of a quantised weight.", "N")
SIGNED = Setting("signed", bool, True, "Quantise symmetrically around zero.", "", Panel.TRAIN)
LEVELS = Setting("levels", tuple[float, ...], (), "Value that a weight may take.", "X", repeatable=True)


@pytest.fixture
def plugged() -> Iterator[None]:
    """Three settings as a student method declares them, for one test."""
    for setting in (BITS, SIGNED, LEVELS):
        declare(setting)
    yield
    for setting in (BITS, SIGNED, LEVELS):
        withdraw(setting.name)


# Words


def test_tables_of_readme_are_those_of_the_recipe() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run: python -m scripts.recipe_table"


@pytest.mark.parametrize("section", [Recipe, SearchRecipe, DataRecipe, InputRecipe])
def test_every_field_has_a_docstring_that_stands_alone(section: type[Section]) -> None:
    for name, (text, default) in helps_of(section).items():
        assert text.endswith(".") and text[0].isupper() and len(text.split()) > 3, name
        assert not default.endswith("."), name


def test_default_in_words_agrees_where_it_is_a_value() -> None:
    assert parse_bytes(settings()["cache_budget"].told_default) == Recipe().cache_budget
    assert settings()["search.steps"].told_default.endswith(f", {Recipe().steps // 5}")


@pytest.mark.parametrize("number", [float("inf"), float("nan"), 10**400, "9" * 400, "1e999", "9" * 400 + "h"])
@pytest.mark.parametrize("section", [Recipe, SearchRecipe, DataRecipe, InputRecipe])
def test_no_number_of_a_recipe_is_beyond_all_numbers(section: type[Section], number: float | str) -> None:
    """Neither as a number nor spelled out as bytes or as a time: what is taken is text, which is read later."""
    for name in section.model_fields:
        try:
            taken = getattr(section.model_validate({name: number}), name)
        except ValidationError:
            continue
        for each in taken if isinstance(taken, tuple) else (taken,):
            assert isinstance(each, str) or (math.isfinite(each) and abs(each) < 2**63), name


# Dumps


def test_dump_is_flat_and_reads_back() -> None:
    recipe = Recipe(keep=0.25, model_inputs={"sr": InputRecipe(value=16000)}, search=SearchRecipe(steps=3))
    values = recipe.model_dump(mode="json")
    assert values.keys() == Recipe.model_fields.keys() - {"extra"}
    assert make_recipe(values) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert recipe.model_dump(include={"keep", "extra"}) == {"keep": 0.25}


# Settings of student methods


@pytest.mark.usefixtures("plugged")
def test_declared_setting_is_a_flat_key(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("keep = 0.25\ndigits = 4\n")
    recipe = load_recipe(tmp_path / "r.toml", levels=["0.5", 1])
    assert (recipe.keep, recipe.extra["digits"], recipe.extra["levels"]) == (0.25, 4, (0.5, 1.0))
    assert dict(recipe.extra) == recipe.model_dump()["extra"] == {"digits": 4, "levels": (0.5, 1.0)}
    assert make_recipe(recipe.model_dump(mode="json")) == recipe == pickle.loads(pickle.dumps(recipe))
    assert load_recipe(tmp_path / "r.toml", digits=6).extra["digits"] == 6
    assert make_recipe({**recipe.model_dump(), "digits": 2}).extra == {"digits": 2, "levels": (0.5, 1.0)}


@pytest.mark.usefixtures("plugged")
def test_declared_default_holds_where_nothing_is_given() -> None:
    recipe = Recipe()
    assert recipe.extra["digits"] == 8 and "digits" not in recipe.extra
    assert "extra" not in recipe.model_dump()
    assert (recipe.setting("digits"), recipe.setting("keep")) == (8, 0.5)
    other = recipe.with_settings({"digits": "4", "keep": 0.25})
    assert (other.setting("digits"), other.setting("keep"), recipe.setting("digits")) == (4, 0.25, 8)


@pytest.mark.usefixtures("plugged")
def test_declared_setting_is_validated_by_its_type() -> None:
    with pytest.raises(RecipeError, match=r"^options: 'digits' = 99: Input should be less than or equal to 16$"):
        load_recipe(digits=99)
    with pytest.raises(ValidationError, match="digits"):
        Recipe.model_validate({"digits": "many"})
    with pytest.raises(RecipeError, match=r"'bytes'.*known keys: .*device, digits, "):
        load_recipe(bytes=1)


def test_undeclared_setting_is_refused() -> None:
    with pytest.raises(RecipeError, match="unknown key 'digits'"):
        load_recipe(digits=4)
    with pytest.raises(RecipeError, match="'digits' = 4: no student method declares"):
        make_recipe({"extra": {"digits": 4}})


@pytest.mark.usefixtures("plugged")
def test_declared_twice_only_the_same() -> None:
    assert declare(BITS) is BITS
    with pytest.raises(ValueError, match="differently"):
        declare(Setting("digits", int, 4, "Number of digits.", "N"))
    for wrong in (Setting("two words", int, 4, "A.", "N"), Setting("extent", int, "wide", "A.", "N"), KEEP):
        with pytest.raises(ValueError, match=wrong.name):
            declare(wrong)
    assert list(declared()) == ["digits", "signed", "levels"]


KEEP = Setting("keep", float, 0.5, "Fraction that is kept.", "K")


@pytest.mark.usefixtures("plugged")
def test_declared_setting_is_a_flag_of_an_app_that_is_built_afterwards() -> None:
    flags = {parameter.name: parameter for parameter in compress_of(build_app()).params}
    assert flags["digits"].help == "Number of digits of a quantised weight. (default: 8)"
    assert flags["digits"].opts == ["--digits"] and flags["digits"].rich_help_panel == Panel.BUILD
    assert (flags["signed"].opts, flags["signed"].secondary_opts) == (["--signed"], ["--no-signed"])
    assert flags["levels"].multiple


@pytest.mark.usefixtures("plugged")
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {}),
        (["--digits", "4"], {"digits": 4}),
        (["--no-signed", "--levels", "1", "--levels", "0.5"], {"signed": False, "levels": (1.0, 0.5)}),
    ],
)
def test_flags_of_declared_settings_reach_the_recipe(
    flags: list[str], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Recipe] = []

    def compress(*_: Any, recipe: Recipe, **__: Any) -> None:
        taken.append(recipe)
        raise RecipeError("seen")

    monkeypatch.setattr("ndonnx.compress", compress)
    assert main(["compress", "m.onnx", "--data", "d.npz", "-q", *flags]) == 2
    assert dict(taken[0].extra) == expected


def compress_of(app: Any) -> Any:
    return get_command(app).commands["compress"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "text",
    ["keep = " + "9" * 5000, "keep = " + "[" * 3000, "keep = " + "{a=" * 3000, "keep = 1\0", "a." * 3000 + "b = 1"],
    ids=["digits", "arrays", "tables", "control", "keys"],
)
def test_what_brings_a_reader_of_toml_to_fall_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.toml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"r\.toml: ") as caught:
        load_recipe(tmp_path / "r.toml")
    assert "\n" not in str(caught.value)
