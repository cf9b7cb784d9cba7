"""One neighbourhood and one candidate, from slice to trained student: picklable, alone in its folder."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from ndonnx.convert import to_torch, write_back
from ndonnx.distil.gate import check_answer, free_batch, pass_gate
from ndonnx.distil.losses import Head, LookAheadLoss, NeighbourhoodLoss, Objective, target_variance
from ndonnx.distil.samples import SliceSamples, Source
from ndonnx.distil.trainer import OnStep, Plan, train
from ndonnx.errors import ConversionError
from ndonnx.graph import load, save, slice_cost
from ndonnx.partition import ChannelGroups
from ndonnx.rundir import Entry
from ndonnx.students import StudentMethod, TeacherSlice
from ndonnx.teacher import ActivationStore

_PROBE = 16
"""Samples on which torch and onnxruntime are compared."""
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


@dataclass(frozen=True)
class HeadSlice:
    """A teacher slice through which a job looks ahead."""

    path: Path
    context: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class DistilJob:
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

    def __call__(self, on_step: OnStep) -> DistilResult:
        """Shrink, convert, check, train, write back; the student and its result are on disk afterwards.

        Raises:
            SliceError: why this neighbourhood stays as the teacher has it.
        """
        began = time.perf_counter()
        torch.set_num_threads(self.threads)
        folder = self.entry.begin()
        samples = self._samples()
        model = free_batch(load(self.slice_path), [name for name in self.inputs if not samples.is_constant(name)])
        captured = samples.arrays(0, _PROBE)
        probe = {name: captured[name] for name in self.inputs}
        pass_gate(model, probe, self.parity, self.threads, captured[self.target].shape)
        seed = zlib.crc32(self._slice_name.encode(), self.plan.seed)
        candidate = self.method.build(self._teacher(model, samples), np.random.default_rng(seed))
        module, _ = pass_gate(candidate.model, probe, self.parity, self.threads)
        heads = self._heads()
        objective = self._objective(samples, heads)
        cost = slice_cost(candidate.model, samples.shapes(self.inputs))
        training = train(
            module,
            samples,
            objective,
            self.plan,
            on_step,
            candidate.constraint,
            threads=self.threads,
            macs=cost.macs or 0,
        )
        student = write_back(candidate.model, module.trained_weights())
        check_answer(module, student, probe, self.parity, self.threads)
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
        )
        self.entry.commit(asdict(result))
        return result

    @property
    def _slice_name(self) -> str:
        return self.neighbourhood or self.name

    def _samples(self) -> SliceSamples:
        stores = {path: ActivationStore.open(path) for path in dict.fromkeys(self.stores.values())}
        sources = {name: Source(stores[path], name) for name, path in self.stores.items()}
        return SliceSamples(sources, self.inputs, self.holdout)

    def _heads(self) -> list[Head]:
        """What it looks through: the slices up to the first that does not convert."""
        found: list[Head] = []
        for head in self.heads:
            try:
                module = to_torch(load(head.path))
            except ConversionError:
                break  # the spec of the student tells how far it looked
            found.append(Head(module, head.context, head.output))
        return found

    def _objective(self, samples: SliceSamples, heads: Sequence[Head]) -> Objective:
        if not heads:
            return NeighbourhoodLoss(self.target)
        loss = LookAheadLoss(self.target, heads, self.head_weights[: len(heads)])
        rows = samples.training_rows(_PROBE)
        loss.scales = {name: target_variance(torch.from_numpy(rows[name])) for name in loss.values}
        return loss

    def _teacher(self, model: ir.Model, samples: SliceSamples) -> TeacherSlice:
        count = min(_SHAPING_SAMPLES, max(_PROBE, _SHAPING_BYTES // max(1, samples.bytes_per_sample())))
        rows = samples.training_rows(count)
        constants = frozenset(name for name in self.inputs if samples.is_constant(name))
        given = {name: rows[name] for name in self.inputs}
        return TeacherSlice(self._slice_name, model, self.groups, given, self.threads, constants)


def read_result(entry: Entry) -> DistilResult:
    """The result of a job that is done."""
    return DistilResult(**entry.meta())


def load_student(entry: Entry) -> ir.Model:
    """The student slice of a job that is done."""
    return load(entry.path / STUDENT_FILE)
