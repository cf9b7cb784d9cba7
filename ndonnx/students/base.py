"""What every student method shares: a slice and captured samples in, a candidate out.

A method is one class with one verb, `_build`. The base class runs its conditions: a candidate
that changes the slice's boundary fails here, by name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import onnx_ir as ir

from ndonnx.config.recipe import Recipe
from ndonnx.errors import ShrinkError, first_line
from ndonnx.graph.working_copy import slice_batch
from ndonnx.partition import ChannelGroups
from ndonnx.teacher.probe import Arrays, Probe, run_batches, sample_count
from ndonnx.teacher.sessions import REFUSALS

if TYPE_CHECKING:
    from torch import Tensor  # it takes seconds to import, and only annotations name it

_PROBE_SAMPLES = range(4, 17)
"""Samples on which a slice is compared with what was made of it, from the fewest to the most."""
_PROBE_BYTES = 4 * 2**20
"""Bytes, about, of the inputs and the output of the samples in such a comparison."""

WHOLE = "whole"
"""The `shape_key` of a student that is as large as its slice: the teacher's own is never worse."""


def probe_samples(sample_bytes: int) -> int:
    """How many samples tell whether two slices answer alike: fewer where each holds thousands of positions.

    Args:
        sample_bytes: of one sample of the slice's inputs and output, as float32.
    """
    return min(max(_PROBE_BYTES // max(1, sample_bytes), _PROBE_SAMPLES.start), _PROBE_SAMPLES.stop - 1)


@dataclass(frozen=True)
class TeacherSlice:
    """What a method is given."""

    name: str
    model: ir.Model
    """The slice with the teacher's weights."""
    groups: ChannelGroups
    samples: Mapping[str, np.ndarray]
    """Captured inputs by name, float32 where floating; first axis is the sample."""
    threads: int = 1
    constants: frozenset[str] = frozenset()
    """Inputs without a sample axis: one array for all samples."""
    held: frozenset[str] = frozenset()
    """Weights that stay as they are, because the teacher reads them elsewhere too."""
    further: tuple[Mapping[str, np.ndarray], ...] = ()
    """More samples, of other sizes: what the slice reads at other places where its student stands too."""

    def first(self, count: int) -> TeacherSlice:
        """The same slice with at most so many samples, all of one size."""
        few = {name: rows if name in self.constants else rows[:count] for name, rows in self.samples.items()}
        return replace(self, samples=few, further=())

    def few(self) -> TeacherSlice:
        """The same slice with as many samples as tell whether something else answers like it."""
        varying = (rows for name, rows in self.samples.items() if name not in self.constants)
        return self.first(probe_samples(2 * sum(4 * math.prod(rows.shape[1:]) for rows in varying)))

    def run(self, model: ir.Model, values: Sequence[str]) -> dict[str, np.ndarray]:
        """Values inside `model` (the slice or a candidate of it) on all samples of the first size, by onnxruntime.

        For few samples, or values as small as the slice's own ends: everything is in memory together.

        Raises:
            ShrinkError: onnxruntime does not run it.
        """
        return self.probe(model, values)(self.samples) if values else {}

    def batches(self, *wanted: tuple[ir.Model, Sequence[str]]) -> Iterator[tuple[range, list[dict[str, np.ndarray]]]]:
        """Values inside models, batch after batch, of as many samples as a bounded number of bytes holds.

        Args:
            wanted: models (the slice or candidates of it), and values of each.

        Yields:
            The samples of the batch, and the values of each model by name.

        Raises:
            ShrinkError: onnxruntime does not run a model.
        """
        probes = [self.probe(model, values) for model, values in wanted]
        fixed = slice_batch(self.model)
        before = 0
        for samples in (self.samples, *self.further):
            for rows, found in run_batches([(probe, samples) for probe in probes], self.constants, size=fixed):
                yield range(before + rows.start, before + rows.stop), found
            before += sample_count(samples, self.constants)

    @property
    def count(self) -> int:
        """How many samples there are, of all sizes."""
        return sum(sample_count(samples, self.constants) for samples in (self.samples, *self.further))

    def probe(self, model: ir.Model, values: Sequence[str]) -> Callable[[Arrays], dict[str, np.ndarray]]:
        """What gives values inside a model, from its inputs by name; it raises `ShrinkError` where they do not fit.

        Raises:
            ShrinkError: onnxruntime does not open it.
        """
        try:
            probe = Probe(model, values, threads=self.threads)
        except REFUSALS as error:
            raise self._refused(error) from error

        def run(feeds: Arrays) -> dict[str, np.ndarray]:
            try:
                return probe.run(feeds)
            except REFUSALS as error:
                raise self._refused(error) from error

        return run

    def _refused(self, error: Exception) -> ShrinkError:
        return ShrinkError(f"{self.name}: onnxruntime does not run the slice: {first_line(error)}")


@dataclass(frozen=True)
class Candidate:
    """One way to shrink a slice, before it is trained."""

    spec: str
    """In words, as the report prints it: `width k=0.5`."""
    model: ir.Model
    """Same inputs and output as the slice; starting weights."""
    constraint: Constraint | None = None
    """What its weights have to fulfil while and after they are trained; None: nothing."""


class Constraint(ABC):
    """Something that weights must fulfil in the end, such as zeros: imposed after every optimiser step."""

    settled: float
    """Part of the training, 0 to 1, after which it is in force as a whole; only then is a state good to keep."""

    @abstractmethod
    def held(self) -> Collection[str]:
        """Names of the weights of which it holds a good part, so that they do not move freely."""

    @abstractmethod
    def impose(self, weights: Mapping[str, Tensor], done: float) -> None:
        """Change the weights in place.

        Args:
            weights: float tensors by the name of the candidate's initializers, on any device.
            done: part of the training that is over, above 0 to 1.
        """


REGISTERED: dict[str, type[StudentMethod]] = {}
"""Classes of student methods by name, as far as they were imported; see `ndonnx.students.registry`."""


@dataclass(frozen=True)
class Spelled:
    """A candidate of a search, as its method reads it from words such as `width 0.50`."""

    spec: str
    """Name of the candidate, the same for all ways to write it: `width 0.5`."""
    settings: Mapping[str, Any]
    """The recipe keys that make it, beside `method`."""
    size: float
    """Nominal part of the weights that is left, 0 to 1: what is cheaper, before anything is built."""


class StudentMethod(ABC):
    """Turns slices into candidates. A subclass is a frozen dataclass that says what it is called: `name = "width"`."""

    name: ClassVar[str]
    """Name in recipes, on the command line and in candidates."""
    usage: ClassVar[str]
    """How a candidate of a search is written: `width K (K above 0 and at most 1)`."""
    around: ClassVar[frozenset[str]] = frozenset()
    """Operators around whose weights the method wants regions, even where no width is inside."""
    may_grow: ClassVar[bool] = False
    """Whether a student may have more weights than its slice; of all others the model never gets larger."""

    def __init_subclass__(cls) -> None:
        """Register the method under its name; a class without a name of its own is a step in between."""
        super().__init_subclass__()
        if "name" in cls.__dict__:
            REGISTERED[cls.name] = cls

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """The method with a recipe's settings: fields that the recipe has by the same name.

        Raises:
            RecipeError: the settings do not fit together.
        """
        return cls(**{each.name: recipe.setting(each.name) for each in fields(cls)})  # type: ignore[arg-type]

    @classmethod
    def spelled(cls, words: Sequence[str]) -> Spelled | None:
        """The candidate of a search that these words behind the method's name mean; None where it is the teacher.

        Raises:
            ValueError: they mean none.
        """
        if words:
            raise ValueError("takes no words")
        return Spelled(cls.name, {}, 1.0)

    @abstractmethod
    def _build(self, teacher: TeacherSlice, rng: np.random.Generator) -> Candidate:
        """Make the candidate; the base class checks its boundary."""

    def shape_key(self, groups: ChannelGroups) -> Hashable | None:
        """What a student of a slice with these groups comes down to, as far as that is known before it is built.

        Two methods of one class with equal keys make the same student, bit for bit, and a search trains one of them.
        None: it takes the samples to tell. `WHOLE`: everything is kept.
        """
        return None

    def needs_more(self, groups: ChannelGroups) -> str | None:
        """Why no student of a slice with these groups can be had, as far as that is known before it is built."""
        return None

    def build(self, teacher: TeacherSlice, rng: np.random.Generator) -> Candidate:
        """A candidate for the slice.

        Raises:
            ShrinkError: there is nothing to shrink, or the candidate is not a drop-in for the slice.
        """
        candidate = self._build(teacher, rng)
        for side in ("inputs", "outputs"):
            old, new = (_boundary(getattr(model.graph, side)) for model in (teacher.model, candidate.model))
            if old != new:
                raise ShrinkError(f"{teacher.name}: {candidate.spec} changed the slice's {side} from {old} to {new}")
        for name in sorted(teacher.held & candidate.model.graph.initializers.keys()):
            tensors = [model.graph.initializers[name].const_value for model in (teacher.model, candidate.model)]
            before, after = (None if tensor is None else tensor.numpy() for tensor in tensors)
            if before is None or after is None or not np.array_equal(before, after):
                raise ShrinkError(f"{teacher.name}: {candidate.spec} changed '{name}', which is read elsewhere too")
        return candidate


def spelled_number(name: str, words: Sequence[str]) -> Spelled | None:
    """The candidate of a method whose one setting is `keep`, a multiplier above 0; 1 is the teacher.

    Raises:
        ValueError: the words are no such number.
    """
    (text,) = words
    keep = float(text)
    if not 0 < keep <= 1:
        raise ValueError("expected a number above 0 and at most 1")
    return None if keep == 1 else Spelled(f"{name} {keep}", {"keep": keep}, keep)


def _boundary(values: Sequence[ir.Value]) -> list[tuple[str | None, ir.DataType | None]]:
    return [(value.name, value.dtype) for value in values]
