"""One neighbourhood and one candidate, from slice to trained student: picklable, alone in its folder."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from ndonnx.convert import TorchSlice, to_torch, write_back
from ndonnx.distill.cutting import cut_where_same
from ndonnx.distill.gate import Arrays, check_answer, free_sizes, open_slice, pass_gate
from ndonnx.distill.losses import Head, LookAheadLoss, NeighbourhoodLoss, Objective, target_variance
from ndonnx.distill.plan import Plan
from ndonnx.distill.samples import Samples, SharedSamples, SliceSamples, Source
from ndonnx.distill.steps import with_fitting_batch
from ndonnx.distill.trainer import OnStep, points, train
from ndonnx.errors import ConversionError
from ndonnx.graph import load, save, slice_cost
from ndonnx.graph.precision import in_float32, in_own_types, rounding_error
from ndonnx.graph.storage.files import model_files
from ndonnx.partition import ChannelGroups
from ndonnx.runtime.executor import Demands, MovableJob
from ndonnx.runtime.run_directory import Entry
from ndonnx.students import StudentMethod, TeacherSlice
from ndonnx.students.base import probe_samples
from ndonnx.students.masks import zeros_of_sparse
from ndonnx.teacher import ActivationStore

_LEAST_SAMPLES = 16
"""Fewest samples that a method sees, or that tell the size of an error, where there are so many."""
_SHAPING_SAMPLES = 1024
"""Most samples that a method sees when it shapes and initialises a candidate."""
_SHAPING_BYTES = 32 * 2**20
"""Most bytes of them, as float32, inputs and target together."""

STUDENT_FILE = "student.onnx"


@dataclass(frozen=True)
class DistilResult:
    """What a job leaves in its done-marker."""

    candidate: str
    nmse_start: float
    nmse: float
    steps: int
    best_step: int
    seconds: float
    parameters: int
    macs: int | None
    """Multiply-accumulates for one sample; None where they cannot be told."""
    may_grow: bool = False
    """Whether its method promises no smaller model: the user's own modules."""
    curve: Sequence[tuple[int, float]] = ()
    """Steps at which the training measured its held-out NMSE, with what it was."""
    lr: float | None = None
    """Peak learning rate of the training."""
    format: str | None = None
    """Number format and memory layout of the training."""


@dataclass(frozen=True)
class HeadSlice:
    """A teacher slice through which a job looks ahead."""

    path: Path
    context: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class DistilJob(MovableJob):
    """Everything that a worker needs, by value or by path."""

    name: str
    slice_path: Path
    groups: ChannelGroups
    inputs: tuple[str, ...]
    target: str
    stores: Mapping[str, Path]
    """The activation store of each value: the inputs, the target, and what looking ahead reads."""
    entry: Entry
    method: StudentMethod
    plan: Plan
    holdout: float
    parity: float
    threads: int
    heads: tuple[HeadSlice, ...] = ()
    """Teacher slices after this one, each beginning where the one before ends."""
    head_weights: tuple[float, ...] = ()
    neighbourhood: str | None = None
    """What random numbers are drawn for: the same student whatever the job is called. None: its name."""
    further: tuple[Mapping[str, tuple[Path, str]], ...] = ()
    """Other places where the student stands: by the name of each value here, a store and the value's name in it."""
    held: frozenset[str] = frozenset()
    """Weights that stay as they are, because the teacher reads them elsewhere too."""
    padding: str | None = None
    """The value in the stores that says how many positions of a sample are filled; None where all are."""

    def __call__(self, on_step: OnStep) -> DistilResult:
        """Shrink, convert, check, train, write back; the student and its result are on disk afterwards.

        Raises:
            SliceError: why this neighbourhood stays as the teacher has it.
        """
        began = time.perf_counter()
        torch.set_num_threads(self.threads)
        folder = self.entry.begin()
        own = load(self.slice_path)
        samples = self._samples(in_float32(own))
        captured = [rows.arrays for rows in samples.heldout(probe_samples(samples.bytes_per_sample()))]
        probes = [{name: arrays[name] for name in self.inputs} for arrays in captured]
        varying = [name for name in self.inputs if not samples.is_constant(name)]
        slice_ = open_slice(in_float32(own), varying, probes[0], self.threads)
        model = free_sizes(slice_.clone(), probes)
        for arrays, probe in zip(captured, probes, strict=True):
            pass_gate(model, probe, self.parity, self.threads, arrays[self.target].shape, varying)
        seed = zlib.crc32(self._slice_name.encode(), self.plan.seed)
        candidate = self.method.build(self._teacher(model, samples), np.random.default_rng(seed))
        module = self._past_gate(candidate.model, probes)
        heads = self._heads()
        objective = self._objective(samples, heads)
        cost = slice_cost(candidate.model, samples.shapes(self.inputs))
        module.macs = cost.macs or 0
        training = train(
            module,
            samples,
            objective,
            with_fitting_batch(replace(self.plan, threads=self.threads), candidate.model, probes[0]),
            on_step,
            candidate.constraint or zeros_of_sparse(candidate.model),
        )
        student = in_own_types(write_back(candidate.model, module.trained_weights()), own)
        tolerance = max(self.parity, rounding_error(student))
        for probe in probes:
            check_answer(module, student, probe, tolerance, self.threads)
        save(student, folder / STUDENT_FILE)
        result = DistilResult(
            candidate.spec + (f", look-ahead {len(heads)}" if heads else ""),
            training.nmse_start,
            training.nmse,
            training.steps,
            training.best_step,
            time.perf_counter() - began,
            cost.parameters,
            cost.macs,
            self.method.may_grow,
            training.curve,
            training.lr,
            training.format,
        )
        self.entry.commit(asdict(result))
        return result

    @property
    def reads(self) -> list[Path]:
        """The slices, and of each store the values that the job looks at.

        Raises:
            RunDirError: a store is damaged.
        """
        models = [file for path in (self.slice_path, *(head.path for head in self.heads)) for file in model_files(path)]
        return [*models, *(file for path, names in self._read().items() for file in ActivationStore.files(path, names))]

    @property
    def writes(self) -> Path:
        """The entry."""
        return self.entry.path

    @property
    def demands(self) -> Demands:
        """As many threads as it was given, and the plan's device."""
        return Demands(self.threads, self.plan.device == "cuda")

    def _places(self) -> list[Mapping[str, tuple[Path, str]]]:
        """For each place of the student: by the name of a value here, its store, and its name in there."""
        names = (*self.inputs, self.target, *(name for head in self.heads for name in (*head.context, head.output)))
        return [{name: (self.stores[name], name) for name in names}, *self.further]

    def _read(self) -> dict[Path, set[str]]:
        """By store: names of the values that are read from it."""
        read: dict[Path, set[str]] = {}
        for path, name in (each for place in self._places() for each in place.values()):
            read.setdefault(path, set()).add(name)
        if self.padding is not None:
            read.setdefault(self.stores[self.padding], set()).add(self.padding)
        return read

    @property
    def _slice_name(self) -> str:
        return self.neighbourhood or self.name

    def _past_gate(self, model: ir.Model, probes: Sequence[Arrays]) -> TorchSlice:
        """A candidate in torch, where the weights that are held do not move."""
        module, _ = pass_gate(model, probes[0], self.parity, self.threads)
        for probe in probes[1:]:
            check_answer(module, model, probe, self.parity, self.threads)
        for name, weight in zip(module.weight_names, module.weights, strict=True):
            if name in self.held:
                weight.requires_grad_(False)
        return module

    def _samples(self, slice_: ir.Model) -> Samples:
        """The captured rows; without their padding where the slice answers the same then."""
        stores = {path: ActivationStore.open(path, names) for path, names in self._read().items()}
        sources = [
            {name: Source(stores[path], there) for name, (path, there) in place.items()} for place in self._places()
        ]
        opened = [SliceSamples(each, self.inputs, self.holdout) for each in sources]
        if len(opened) > 1:
            return SharedSamples(opened)
        if self.padding is None:
            return opened[0]
        mask = np.asarray(stores[self.stores[self.padding]].rows(self.padding)[:])
        return cut_where_same(slice_, opened[0], mask, self.threads)

    def _heads(self) -> list[Head]:
        """What it looks through: the slices up to the first that does not convert."""
        found: list[Head] = []
        for head in self.heads:
            try:
                module = to_torch(in_float32(load(head.path)))
            except ConversionError:
                break  # the spec of the student tells how far it looked
            found.append(Head(module, head.context, head.output))
        return found

    def _objective(self, samples: Samples, heads: Sequence[Head]) -> Objective:
        if not heads:
            return NeighbourhoodLoss(self.target)
        loss = LookAheadLoss(self.target, heads, self.head_weights[: len(heads)])
        rows = samples.shaping(_LEAST_SAMPLES)[0].arrays
        loss.scales = {name: target_variance(torch.from_numpy(rows[name])) for name in loss.values}
        return loss

    def _teacher(self, model: ir.Model, samples: Samples) -> TeacherSlice:
        count = min(_SHAPING_SAMPLES, max(_LEAST_SAMPLES, _SHAPING_BYTES // max(1, samples.bytes_per_sample())))
        found = samples.shaping(count)
        given, *further = ({name: rows.arrays[name] for name in self.inputs} for rows in found)
        constants = found[0].constant & given.keys()
        return TeacherSlice(
            self._slice_name, model, self.groups, given, self.threads, constants, self.held, tuple(further)
        )


def read_result(entry: Entry) -> DistilResult:
    """The result of a job that is done."""
    found = entry.meta()
    return DistilResult(**found | {"curve": points(found.get("curve", ()))})


def load_student(entry: Entry) -> ir.Model:
    """The student slice of a job that is done."""
    return load(entry.path / STUDENT_FILE)
