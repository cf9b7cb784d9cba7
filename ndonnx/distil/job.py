"""One neighbourhood and one candidate, from slice to trained student: picklable, alone in its folder."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from ndonnx.convert import TorchSlice, check_parity, to_torch, write_back
from ndonnx.distil.samples import SliceSamples
from ndonnx.distil.trainer import OnStep, Plan, train
from ndonnx.errors import ParityError
from ndonnx.graph import load, save, slice_cost
from ndonnx.graph.load import infer_shapes
from ndonnx.partition import ChannelGroups
from ndonnx.rundir import Entry
from ndonnx.students import StudentMethod, TeacherSlice
from ndonnx.teacher import ActivationStore, make_session
from ndonnx.teacher.sessions import REFUSALS, first_line

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
    macs: int


@dataclass(frozen=True)
class DistilJob:
    """Everything that a worker needs, by value or by path."""

    name: str
    slice_path: Path
    groups: ChannelGroups
    inputs: tuple[str, ...]
    target: str
    store_path: Path
    entry: Entry
    method: StudentMethod
    plan: Plan
    holdout: float
    parity: float
    threads: int

    def __call__(self, on_step: OnStep) -> DistilResult:
        """Shrink, convert, check, train, write back; the student and its result are on disk afterwards.

        Raises:
            SliceError: why this neighbourhood stays as the teacher has it.
        """
        began = time.perf_counter()
        torch.set_num_threads(self.threads)
        folder = self.entry.begin()
        samples = SliceSamples(ActivationStore.open(self.store_path), self.inputs, self.target, self.holdout)
        model = free_batch(load(self.slice_path), [name for name in self.inputs if not samples.is_constant(name)])
        captured = samples.arrays(0, _PROBE)
        probe = [captured[name] for name in self.inputs]
        self._gate(model, probe)
        self._check_rows(model, probe, captured[self.target].shape)
        seed = zlib.crc32(self.name.encode(), self.plan.seed)
        candidate = self.method.build(self._teacher(model, samples), np.random.default_rng(seed))
        module = self._gate(candidate.model, probe)
        training = train(module, samples, self.plan, on_step)
        student = write_back(candidate.model, module.trained_weights())
        check_parity(module, probe, self._answer(student, probe), self.parity)
        save(student, folder / STUDENT_FILE)
        cost = slice_cost(student)
        result = DistilResult(
            candidate.spec,
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

    def _teacher(self, model: ir.Model, samples: SliceSamples) -> TeacherSlice:
        count = min(_SHAPING_SAMPLES, max(_PROBE, _SHAPING_BYTES // max(1, samples.bytes_per_sample())))
        rows = samples.training_rows(count)
        constants = frozenset(name for name in self.inputs if samples.is_constant(name))
        given = {name: rows[name] for name in self.inputs}
        return TeacherSlice(self.name, model, self.groups, given, self.threads, constants)

    def _gate(self, model: ir.Model, probe: list[np.ndarray]) -> TorchSlice:
        module = to_torch(model)
        check_parity(module, probe, self._answer(model, probe), self.parity)
        return module

    def _check_rows(self, model: ir.Model, probe: list[np.ndarray], expected: tuple[int, ...]) -> None:
        found = self._answer(model, probe).shape
        if found != expected:
            raise ParityError(
                f"several samples at once give '{self.target}' the shape {found} instead of {expected}; "
                "export the teacher with a dynamic batch dimension"
            )

    def _answer(self, model: ir.Model, probe: list[np.ndarray]) -> np.ndarray:
        try:
            session = make_session(model, threads=self.threads)
            answer: np.ndarray = session.run([self.target], dict(zip(self.inputs, probe, strict=True)))[0]
        except REFUSALS as error:
            raise ParityError(f"onnxruntime does not run the slice: {first_line(error)}") from error
        return answer


def free_batch(model: ir.Model, inputs: Sequence[str]) -> ir.Model:
    """Let a slice take any number of samples along the first axis of these inputs, whatever the teacher takes.

    Works in place and returns the slice.
    """
    fixed = [v for v in model.graph.inputs if v.name in inputs and v.shape and isinstance(v.shape[0], int)]
    if not fixed:
        return model
    for value in fixed:
        assert value.shape is not None
        value.shape = ir.Shape(["samples", *value.shape[1:]])
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    return infer_shapes(model)


def read_result(entry: Entry) -> DistilResult:
    """The result of a job that is done."""
    return DistilResult(**entry.meta())


def load_student(entry: Entry) -> ir.Model:
    """The student slice of a job that is done."""
    return load(entry.path / STUDENT_FILE)
