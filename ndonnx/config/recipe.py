"""Everything that can be configured, in one place: unknown keys are refused.

A recipe is flat: every key is also a flag of `ndonnx compress` (`batch_size` is
`--batch-size`), except the `[data]` table, which says how raw samples become model inputs, the
`[inputs.NAME]` tables, which say what the model's inputs are, and the `[search]` table, which says
how a search goes about its target.
Precedence: flag, then recipe file, then the default here.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ndonnx.errors import RecipeError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


def parse_bytes(value: object) -> object:
    """Read `4GB`, `512MiB` or a plain number as bytes; pass anything else to pydantic."""
    if isinstance(value, str) and (found := _BYTES.fullmatch(value)):
        number, unit, binary = found.groups()
        scale = 1024 ** "kmgt".index(unit.lower()) * 1024 if binary and unit else _UNITS[unit.lower()]
        return int(float(number) * scale)
    return value


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]


_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h|)\s*", re.IGNORECASE)
_PATTERN = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*")


def parse_duration(value: object) -> object:
    """Read `90`, `90s`, `3m` or `1h` as seconds; pass anything else to pydantic."""
    if isinstance(value, str) and (found := _DURATION.fullmatch(value)):
        return float(found[1]) * _SECONDS[found[2].lower()]
    return value


Duration = Annotated[float, BeforeValidator(parse_duration), Field(gt=0)]


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


Sparsity = Annotated[str, BeforeValidator(parse_sparsity)]


def parse_names(value: object) -> object:
    """Take one name for a list of one; pass anything else to pydantic."""
    return (value,) if isinstance(value, str) else value


def parse_plain(value: object) -> object:
    """Take a number as its text; pass anything else to pydantic."""
    return f"{value}" if isinstance(value, int | float) and not isinstance(value, bool) else value


Drop = Annotated[str, BeforeValidator(parse_plain)]

Names = Annotated[tuple[str, ...], BeforeValidator(parse_names)]


def parse_augmentations(value: object) -> object:
    """Read `none` as nothing and `flip,mixup` as two; pass anything else to pydantic."""
    if isinstance(value, str):
        value = tuple(name.strip() for name in value.split(","))
    return () if value in (("none",), ["none"]) else value


Augmentation = Literal["flip", "shift", "mixup"]
Augmentations = Annotated[tuple[Augmentation, ...], BeforeValidator(parse_augmentations)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


class DataRecipe(_Section):
    """How a raw sample becomes a model input: `(x * scale - mean) / std` per channel.

    Images are decoded as RGB (or grey when the model's input has one channel), resized to
    `size` when it differs, scaled, normalised and laid out. Arrays from `.npz`, `.npy` and
    `module:function` are taken as they are unless a key here is set.
    """

    size: tuple[int, int] | None = None
    """Height and width in pixels. None: taken from the model's input where it is fixed."""
    scale: float | None = None
    """Factor on the raw values. None: 1/255 for images, 1 for arrays."""
    mean: tuple[float, ...] | float | None = None
    """Subtracted after scaling, one value or one per channel."""
    std: tuple[Annotated[float, Field(gt=0)], ...] | Annotated[float, Field(gt=0)] | None = None
    """Divides after the mean, one value or one per channel."""
    layout: Literal["NCHW", "NHWC"] | None = None
    """Layout of the model's image input. None: read off the input's shape."""
    dtype: str | None = None
    """numpy name of the input's element type. None: the model's own."""


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


Value = Annotated[bool | int | float | list[Any], BeforeValidator(parse_value)]


def parse_sizes(value: object) -> object:
    """Read `1,3,48,320` as sizes; pass anything else to pydantic."""
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


Sizes = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(parse_sizes)]


class InputRecipe(_Section):
    """What one input of the model is, where neither the model nor the data tell: `[inputs.NAME]` in a recipe."""

    value: Value | None = None
    """The one value that the input has for all samples, such as a sampling rate: a number, or a list of them. The
    students are made for it; the input stays an input of theirs. None: the data hold the input's values."""
    axis: int | None = Field(None, ge=0)
    """Axis along which the samples lie, counted from 0. None: read off the shapes of all inputs, mostly the first."""
    shape: Sizes | None = None
    """Sizes of all axes, the samples' among them, for made-up inputs, costs and timings. None: as the model says."""
    min: float | None = None
    """Smallest made-up value."""
    max: float | None = None
    """Largest made-up value."""

    @model_validator(mode="after")
    def _agrees(self) -> InputRecipe:
        if self.value is not None and self.axis is not None:
            raise ValueError("has one value for all samples and an axis along which they lie; give one of the two")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}")
        return self


def parse_inputs(settings: Sequence[str], shapes: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """What `--input NAME=VALUE`, `--input NAME:axis=1` and `--shape NAME=1,3,48,320` say, as `[inputs]` in a recipe.

    Raises:
        RecipeError: a text has no name or no `=`.
    """
    found: dict[str, dict[str, Any]] = {}
    for flag, texts in (("--input", settings), ("--shape", shapes)):
        for text in texts:
            name, equals, value = text.rpartition("=")
            key = "value" if flag == "--input" else "shape"
            stem, _, suffix = name.rpartition(":")
            if flag == "--input" and stem and suffix in ("axis", "min", "max"):
                name, key = stem, suffix
            if not equals or not name:
                example = "NAME=VALUE or NAME:axis=1" if flag == "--input" else "NAME=1,3,48,320"
                raise RecipeError(f"{flag} {text}: expected {example}")
            found.setdefault(name, {})[key] = value
    return found


class SearchRecipe(_Section):
    """How the candidates of a search are trained, measured and chosen."""

    candidates: Names = ()
    """What is tried in every neighbourhood, as `width 0.5` or `sparsity 2:4`. Empty: width 0.1 to 0.9,
    and lowrank 0.3 to 0.75."""
    steps: int | None = Field(None, ge=0)
    """Optimiser steps of a candidate in the search. None: a fifth of the recipe's `steps`."""
    quality: Literal["divergence", "metric", "nmse"] = "divergence"
    """What a candidate costs in quality: the divergence of the model with it alone from the teacher, the drop of the
    metric (the paper's), or its own NMSE times the measured sensitivity of its neighbourhood (cheap)."""
    solver: Literal["milp", "greedy"] = "milp"
    """Exact, or the paper's threshold on each neighbourhood alone."""
    samples: int = Field(2000, ge=2)
    """Samples on which candidates are measured; whole students are chosen by twice as many, and a promised drop is
    tested on five times as many others, where the data have them. No training sees any of them."""
    attempts: int = Field(3, ge=0)
    """Corrections of the choice after a whole student was measured, or failed the test of a promise."""
    early_stop: bool = True
    """Leave out what is smaller than a candidate that alone loses far more than `max_drop` allows."""


FINETUNE_FACTOR = 3
"""Steps of fine-tuning for each step of a neighbourhood, unless the recipe says how many."""


class Recipe(_Section):
    """The whole of a compression run; see `ndonnx compress --help` for the same list."""

    # What to build
    method: Literal["width", "sparsity", "lowrank", "activation", "removal", "custom"] = "width"
    """How a slice is shrunk."""
    keep: float = Field(0.5, gt=0, le=1)
    """Multiplier k: the part of each neighbourhood's inner channels that is kept; for `lowrank`, of its weights."""
    sparsity: Sparsity = "0.5"
    """For `sparsity`: the part of the weights that becomes zero, or N:M, N zeros in every M weights."""
    swap: tuple[str, ...] = ()
    """For `activation`: `OLD=NEW` pairs of operators. Empty: costly activations become cheap ones."""
    student: str | None = None
    """For `custom`: `module:function` that builds a student (a torch module) for a slice."""
    round_to: int | None = Field(None, ge=1)
    """Kept widths become multiples of this. None: 8 where the width is at least 64, else 1."""
    granularity: Literal["block", "layer"] = "block"
    """`block`: the smallest regions with a width to shrink inside; `layer`: one operator with weights each."""
    cut: tuple[str, ...] = ()
    """Values that must be a boundary between neighbourhoods."""
    freeze: tuple[str, ...] = ()
    """Values whose producing neighbourhood stays as the teacher has it."""
    init: Literal["teacher", "least-squares", "random"] = "least-squares"
    """Starting weights of a student."""

    # What to reach
    target: Names = ()
    """Parts of the teacher's costs to reach, `params=0.5`, `macs=0.5`, `size=0.5` or `latency=0.6`: candidates are
    searched instead of one for all. Empty: none."""
    max_drop: Drop | None = None
    """Largest loss of quality, with 95% confidence by a test on samples that nothing else sees, as `1%` or `0.01`.
    None: any."""

    # How to train it
    data_free: bool = False
    """Make inputs up where no data is given."""
    inputs: Literal["teacher", "student", "refit", "noise"] | None = None
    """What a student learns on: the teacher's activations (the paper's method), those of the students before it
    (one after the other), the teacher's and then a closed-form refit on the students' own, or Gaussian noise.
    None: `teacher`; where no fine-tuning follows that would make up for the same errors, `student`, or `refit` in a
    search, whose candidates are trained apart."""
    steps: int = Field(1000, ge=0)
    """Optimiser steps per neighbourhood."""
    batch_size: int = Field(64, ge=1)
    """Samples per optimiser step, at most: down to 16 where they have more than 65,536 positions together."""
    lr: float = Field(0.1, gt=0)
    """Peak step, relative to the root mean square of each weight."""
    optimiser: Literal["muon", "adam"] = "muon"
    """`muon` orthogonalises the steps of matrices where that is cheap, and has Adam for the rest."""
    warmup: float = Field(0.05, ge=0, le=1)
    """Part of the steps over which the learning rate rises linearly."""
    look_ahead: int = Field(0, ge=0)
    """Teacher slices after a neighbourhood through which its error is measured too (equations 4 and 5)."""
    look_ahead_weights: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Weight of each look-ahead loss. Empty: 1 for each."""
    finetune_steps: int | None = Field(None, ge=0)
    """Optimiser steps of the whole student against the teacher's answers (equation 3). None: three times `steps`."""
    finetune_samples: int = Field(50_000, ge=2)
    """Most samples of fine-tuning, for which only inputs and outputs are kept."""
    augment: Augmentations = ("flip", "shift")
    """What is done to copies of images in fine-tuning: `flip`, `shift`, `mixup`, or `none`. The teacher answers each,
    so that none needs a label; there are as many as the steps can use."""
    finetune_lr: float = Field(0.01, gt=0)
    """Peak step in fine-tuning, relative to the root mean square of each weight."""
    temperature: float = Field(4.0, gt=0)
    """Of the softened class scores in fine-tuning."""
    label_weight: float = Field(0.0, ge=0, le=1)
    """Weight of the labels' cross-entropy in fine-tuning; the teacher's answers have the rest."""
    threshold: str | None = None
    """What `ndonnx threshold` has written for this model: no neighbourhood is trained further than it needs, a time
    budget is spent where errors cost most, and students beyond what their place bears are told. None: no such file."""
    time_budget: Duration | None = None
    """Seconds until the student is there (`3m`): steps are chosen to fit it. None: as many steps as the recipe says."""
    holdout: float = Field(0.05, gt=0, lt=1)
    """Part of the samples of a training that chooses its best state."""
    samples: int = Field(16_000, ge=2)
    """Most samples of a neighbourhood's training, drawn at random."""
    parity: float = Field(1e-4, gt=0)
    """Largest error of a converted slice, relative to its output's scale."""
    seed: int = Field(0, ge=0, lt=2**31)

    # How to run it
    workers: int | None = Field(None, ge=1)
    """Jobs trained at the same time. None: one per core, fewer for few neighbourhoods."""
    executor: Literal["serial", "process"] = "process"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 where the machine computes in it, else fp32."""
    cache_budget: Bytes = 4 * 10**9
    """Most disk that captured activations may take, in bytes (`4GB`, `512MiB`)."""
    memory_budget: Bytes | None = None
    """Memory that the run may take with all its workers, in bytes: it decides how many there are, and where one alone
    is too much, how many samples are computed at a time. None: a quarter of the machine's."""

    model_inputs: dict[str, InputRecipe] = {}
    """What the model's inputs are, by name. In a file `[inputs.NAME]`, or `[model_inputs.NAME]` where the file says
    `inputs = "refit"` as well."""
    data: DataRecipe = DataRecipe()
    search: SearchRecipe = SearchRecipe()

    @model_validator(mode="before")
    @classmethod
    def _inputs_as_table(cls, values: Any) -> Any:
        """Take `[inputs.NAME]` for what the model's inputs are, and `inputs = "..."` for what students learn on."""
        if isinstance(values, Mapping) and isinstance(values.get("inputs"), Mapping):
            rest = {key: value for key, value in values.items() if key != "inputs"}
            return rest | {"model_inputs": _merged(values["inputs"], values.get("model_inputs", {}))}
        return values

    def setting(self, name: str) -> Any:
        """The value of a key."""
        return getattr(self, name)

    @property
    def changes_nothing(self) -> bool:
        """Whether the student is the teacher by definition: every channel kept, and nothing trained."""
        return self.method == "width" and self.keep == 1 and self.steps == 0 and self.time_budget is None


_SECTIONS: dict[str, type[_Section]] = {"data": DataRecipe, "search": SearchRecipe, "model_inputs": InputRecipe}
KEYS = frozenset(Recipe.model_fields) - frozenset(_SECTIONS)
"""Of a recipe, outside its tables."""


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
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"{path}: cannot read the recipe: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: not a TOML file: {error}") from error
    if isinstance(values.get("inputs"), dict):
        values["model_inputs"] = _merged(values.pop("inputs"), values.get("model_inputs", {}))
    for key, value in overrides.items():
        if key == "model_inputs" and value is not None:
            values[key] = _merged(values.get(key, {}), value)
        elif key in _SECTIONS and isinstance(value, dict) and isinstance(table := values.get(key, {}), dict):
            values[key] = table | {inner: kept for inner, kept in value.items() if kept is not None}
        elif value is not None:
            values[key] = value
    return make_recipe(values, where=str(path) if path is not None else "options")


def make_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a mapping as a recipe; the error names the key and what it may be."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            section = _SECTIONS.get(str(first["loc"][0]), Recipe) if len(first["loc"]) > 1 else Recipe
            raise RecipeError(
                f"{where}: unknown key '{key}'; known keys: {', '.join(sorted(section.model_fields))}"
            ) from error
        raise RecipeError(f"{where}: '{key}' = {first['input']!r}: {first['msg']}") from error
