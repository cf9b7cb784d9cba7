"""What the measurements share: their arguments, the machine they ran on, tables, and slices ready to train."""

from __future__ import annotations

import argparse
import csv
import platform
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from rich.console import Console
from rich.table import Table

from ndonnx import demo
from ndonnx.config.recipe import Recipe, load_recipe
from ndonnx.data import DataSource, input_specs, open_source
from ndonnx.data.split import draw
from ndonnx.data.subset import Subset
from ndonnx.distill.samples import SliceSamples
from ndonnx.errors import NdonnxError, UsageError
from ndonnx.flow.prepare import partition_model
from ndonnx.graph import load
from ndonnx.partition import Neighbourhood, Partition
from ndonnx.runtime.atomic import atomic_write_json
from ndonnx.runtime.machine import computes_in_bf16, pick_device, usable_cores
from ndonnx.students import Candidate, TeacherSlice
from ndonnx.students.registry import method_of
from ndonnx.teacher import ActivationStore, make_session

CAPTURE_BATCH = 64
"""Samples that a sweep of the teacher runs at a time, as `compress` does."""
PLAIN_WIDTH = 140
"""Columns of a table that does not go to a terminal."""
BAD_INPUT = 2
"""Exit code, as the command line's."""
_SHAPING_SAMPLES = 1024
_SHAPING_BYTES = 128 * 2**20
"""Most samples, and most bytes of them as float32, that shape a candidate: as in a distil job."""


@dataclass(frozen=True)
class Subject:
    """What is measured: a teacher, the data to train on, the data to judge by, and the recipe."""

    model: Path
    data: str
    judge: str | None
    recipe: Recipe

    def open(self, spec: str) -> DataSource:
        """A data source for this teacher."""
        return open_source(spec, input_specs(make_session(self.model)), self.recipe.data, seed=self.recipe.seed)

    def partition(self) -> Partition:
        """The teacher's neighbourhoods.

        Raises:
            UsageError: none of them has a width to shrink.
        """
        parts = partition_model(load(self.model), self.recipe)
        if not parts.distillable:
            raise UsageError(f"{self.model}: no neighbourhood has a width to shrink, there is nothing to measure")
        return parts


class Stopwatch:
    """Wall time, in seconds, of what is not paused."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._spent = seconds
        self._began: float | None = time.perf_counter()

    @property
    def seconds(self) -> float:
        """What has gone by so far; stands still in a pause."""
        return self._spent + (0.0 if self._began is None else time.perf_counter() - self._began)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block out."""
        self._spent, self._began = self.seconds, None
        try:
            yield
        finally:
            self._began = time.perf_counter()


class Notes:
    """The notes and refusals of a run, on stderr; the rest of its progress is not told."""

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None: ...

    def advance(self, amount: int = 1) -> None: ...

    def step(self, neighbourhood: str, step: int, steps: int, nmse: float) -> None: ...

    def finished(self, neighbourhood: str, status: str, nmse: float | None, reason: str | None) -> None:
        """Tell of a neighbourhood only when training was meant to change it and did not."""
        if reason is not None:
            self.note(f"{neighbourhood} is {status}: {reason}")

    def note(self, message: str) -> None:
        """One line on stderr."""
        print(message, file=sys.stderr, flush=True)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the arguments that name a teacher and its data; the description keeps its line breaks."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_subject(parser)
    return parser


def add_subject(parser: argparse.ArgumentParser) -> None:
    """The arguments that `subject_of` reads."""
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL", help="the teacher, an ONNX file")
    parser.add_argument("--data", metavar="SRC", help="inputs to distil on: .npz, .npy, .parquet, folder, gaussian")
    parser.add_argument("--eval", metavar="SRC", help="data to judge by, with labels where accuracy is wanted")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="recipe in TOML, for `[data]` and the training")
    parser.add_argument("--demo", action="store_true", help="use the teacher and the data that ship with ndonnx")
    parser.add_argument("--seed", type=int, help="seed of everything drawn at random (default: the recipe's, 0)")


def subject_of(options: argparse.Namespace, *, judged: bool, **overrides: Any) -> Subject:
    """What the arguments name; the recipe is the file's, with `overrides` that are not None laid over it.

    Raises:
        UsageError: a model, data or (where `judged`) evaluation data is missing, or given beside --demo.
    """
    recipe = load_recipe(options.recipe, seed=options.seed, **overrides)
    if options.demo:
        if given := [name for name in ("model", "data", "eval") if getattr(options, name) is not None]:
            raise UsageError(f"--demo brings its own model and data; leave out {', '.join(given)}")
        return Subject(demo.teacher_path(), str(demo.data_path("train")), str(demo.data_path("test")), recipe)
    wanted = ("model", "data", "eval") if judged else ("model", "data")
    if missing := [name for name in wanted if getattr(options, name) is None]:
        raise UsageError(f"missing: {', '.join(missing)}; give them, or --demo")
    return Subject(options.model, options.data, options.eval, recipe)


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number}: expected at least 1")
    return number


def run(main: Callable[[Sequence[str] | None], None]) -> None:
    """Run a measurement from the command line: an error of ours is one line and exit code 2."""
    try:
        main(None)
    except NdonnxError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None


def machine(recipe: Recipe) -> dict[str, str | int | bool]:
    """What the numbers were measured on."""
    device = pick_device(recipe.device)
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "bf16": in_bf16(recipe),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "onnx")},
        "onnxruntime": ort.__version__,
    }


def machine_line(found: Mapping[str, str | int | bool]) -> str:
    """The machine on one line, to stand above a table."""
    precision = "bf16" if found["bf16"] else "fp32"
    names = ("torch", "onnxruntime", "onnx", "python")
    versions = ", ".join(f"{name} {found[name]}" for name in names)
    return f"{found['processor']}, {found['cores']} cores, on {found['device']}, {precision}; {versions}"


def in_bf16(recipe: Recipe) -> bool:
    """Whether students are trained in bfloat16, as the recipe's `precision` comes out where steps are counted."""
    device = pick_device(recipe.device)
    return recipe.precision == "bf16" or (recipe.precision == "auto" and device == "cuda" and computes_in_bf16(device))


def count_samples(source: DataSource, wanted: int) -> int:
    """Samples there are, up to what is wanted; a source that cannot tell is run through."""
    if source.length is not None:
        return min(source.length, wanted)
    return sum(len(batch) for batch in source.batches(CAPTURE_BATCH, samples=wanted))


def training_data(source: DataSource, samples: int, recipe: Recipe) -> Subset:
    """The rows that `compress` trains on, those that choose the best state first."""
    return draw(source, samples, seed=recipe.seed, holdout=recipe.holdout).to_train(samples)


def capture_batch(model: ir.Model) -> int:
    """Samples at a time: what the model's first input fixes, else `CAPTURE_BATCH`."""
    for value in model.graph.inputs:
        if value.name not in model.graph.initializers and value.shape is not None and len(value.shape):
            size = value.shape[0]
            return size if isinstance(size, int) else CAPTURE_BATCH
    return CAPTURE_BATCH


def boundary(neighbourhoods: Iterable[Neighbourhood]) -> list[str]:
    """Names of the values that these neighbourhoods are trained on, each once, in order."""
    names: dict[str, None] = {}
    for neighbourhood in neighbourhoods:
        assert neighbourhood.entry is not None and neighbourhood.exit is not None
        values = (neighbourhood.entry, *neighbourhood.context, neighbourhood.exit)
        names.update(dict.fromkeys(value.name or "" for value in values))
    return list(names)


@dataclass(frozen=True)
class Slice:
    """A neighbourhood ready to be shrunk: the slice, and what was captured at its ends."""

    neighbourhood: Neighbourhood
    model: ir.Model
    samples: SliceSamples

    @classmethod
    def of(cls, parts: Partition, neighbourhood: Neighbourhood, store: ActivationStore, holdout: float) -> Slice:
        """Cut the slice out and find its activations in the store."""
        assert neighbourhood.exit is not None
        model = parts.slice_of(neighbourhood)
        inputs = [value.name or "" for value in model.graph.inputs]
        return cls(neighbourhood, model, SliceSamples.of(store, inputs, [neighbourhood.exit.name or ""], holdout))

    @property
    def target(self) -> str:
        """The value that it answers with."""
        return self.model.graph.outputs[0].name or ""

    def candidate(self, recipe: Recipe, first: int) -> Candidate:
        """The recipe's candidate, shaped on the captured rows from `first`, drawn as a distil job draws it.

        Raises:
            ShrinkError: this neighbourhood cannot be shrunk.
        """
        assert self.neighbourhood.groups is not None
        name, samples = self.neighbourhood.name, self.samples
        rows = samples.arrays(first, first + shaping_samples(samples.bytes_per_sample()))
        inputs = {value: rows[value] for value in samples.inputs}
        teacher = TeacherSlice(name, self.model, self.neighbourhood.groups, inputs, usable_cores())
        seed = zlib.crc32(name.encode(), recipe.seed)
        return method_of(recipe).build(teacher, np.random.default_rng(seed))


def shaping_samples(bytes_per_sample: int = 0) -> int:
    """Most samples on which a candidate is shaped, given the bytes of one as float32."""
    return min(_SHAPING_SAMPLES, max(16, _SHAPING_BYTES // max(1, bytes_per_sample)))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on stdout; all columns but the first are set to the right."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A header and the rows; None is an empty field."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """The document, whole or not at all."""
    atomic_write_json(path, document)


def with_init(recipe: Recipe, init: str) -> Recipe:
    """The recipe with other starting weights."""
    return recipe.model_copy(update={"init": init})


def percent(part: float | None) -> str:
    """`0.9876` as `98.76%`."""
    return "-" if part is None else f"{part:.2%}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
