"""End-to-end distillation of the spliced student: a short polish after the neighbourhoods (equation 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from ndonnx.convert import TorchSlice, write_back
from ndonnx.distill import Plan, Training, train
from ndonnx.distill.gate import Arrays, check_answer, open_slice, pass_gate
from ndonnx.distill.losses import LABEL, DistillationLoss, NeighbourhoodLoss, Objective
from ndonnx.distill.samples import SliceSamples, Source
from ndonnx.distill.steps import with_fitting_batch
from ndonnx.distill.trainer import OnStep
from ndonnx.errors import ConversionError
from ndonnx.graph import fold_constants, load, save
from ndonnx.graph.bound import bind
from ndonnx.graph.dataflow import real_inputs
from ndonnx.graph.interface import Interface
from ndonnx.graph.macs import sample_cost
from ndonnx.graph.precision import in_float32, rounding_error
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.graph.working_copy import hold_batch
from ndonnx.runtime.run_directory import Entry
from ndonnx.students.masks import zeros_of
from ndonnx.teacher import ActivationStore

STUDENT_FILE = "student.onnx"

_PROBE = 16
_PROBABILITIES = {"Softmax", "LogSoftmax", "Sigmoid", "HardSigmoid"}
"""Operators whose output is no longer class scores."""
_CLASS_RANK = 2
"""Rank of class scores: (samples, classes)."""


@dataclass(frozen=True)
class FinetuneJob:
    """Fine-tuning as an executor's job: everything by value or by path."""

    name: str
    student_path: Path
    store_path: Path
    """An activation store with the student's inputs and the teacher's output."""
    labels_path: Path | None
    """An `.npy` of class numbers, one per sample; None without labels."""
    entry: Entry
    plan: Plan
    temperature: float
    """Of the softened class scores."""
    label_weight: float
    """Of the labels' cross-entropy, 0 to 1."""
    holdout: float
    """Part of the samples that chooses the best state."""
    parity: float
    """Largest relative error of torch against onnxruntime."""
    threads: int
    kept: frozenset[str] = frozenset()
    """Names of weights that stay as they are: those outside the replaced neighbourhoods."""
    interface: Interface = field(default_factory=Interface)
    """How the student is fed."""

    def __call__(self, on_step: OnStep) -> Training:
        """Train the student as a whole; it is on disk afterwards, in the job's entry.

        Raises:
            SliceError: the whole does not convert or match onnxruntime, or the training broke down.
        """
        torch.set_num_threads(self.threads)
        folder = self.entry.begin()
        store = ActivationStore.open(self.store_path)
        labels = None if self.labels_path is None else np.load(self.labels_path, allow_pickle=False)
        tuned, training = finetune(
            load(self.student_path),
            store,
            self.plan,
            temperature=self.temperature,
            label_weight=self.label_weight,
            labels=labels,
            holdout=self.holdout,
            parity=self.parity,
            on_step=on_step,
            kept=self.kept,
            threads=self.threads,
            interface=self.interface,
        )
        save(tuned, folder / STUDENT_FILE)
        self.entry.commit(asdict(training))
        return training


def finetune(
    student: ir.Model,
    store: ActivationStore,
    plan: Plan,
    *,
    temperature: float,
    label_weight: float = 0.0,
    labels: npt.NDArray[np.int64] | None = None,
    holdout: float,
    parity: float,
    on_step: OnStep,
    kept: frozenset[str] = frozenset(),
    threads: int = 1,
    interface: Interface | None = None,
) -> tuple[ir.Model, Training]:
    """A copy of the student, trained as a whole against the teacher's captured outputs.

    Class scores, (samples, classes) that are not yet probabilities, are matched by the softened
    cross-entropy; any other output by the squared error. Only weights that are initializers of the
    student are trained, so that everything is written back by name; patterns of zeros stay.

    Args:
        student: the spliced student, one output.
        store: the student's inputs and the teacher's output.
        plan: how long and how fast.
        temperature: of the softened class scores.
        label_weight: of the labels' cross-entropy, 0 to 1; 0 without labels.
        labels: class numbers, one per sample of the store.
        holdout: part of the samples that chooses the best state.
        parity: largest relative error of torch against onnxruntime.
        on_step: told the step, the steps and the held-out NMSE of the output.
        kept: names of weights that stay as they are.
        threads: that share every batch.
        interface: how the student is fed; None: samples along the first axis of every input.

    Raises:
        SliceError: the whole does not convert or match onnxruntime, or the training broke down.
    """
    if (reason := why_not_finetuned(student)) is not None:
        raise ConversionError(reason)
    interface = Interface() if interface is None else interface
    inputs = [value.name or "" for value in real_inputs(student.graph) if value.name not in interface.fixed]
    output = student.graph.outputs[0]
    sources = {name: Source(store, name) for name in (*inputs, output.name or "")}
    samples = SliceSamples(sources, inputs, holdout, {} if labels is None else {LABEL: labels})
    probe = {name: rows for name, rows in samples.arrays(0, _PROBE).items() if name in inputs}
    own = _as_slice(student, interface, inputs, probe)
    whole = in_float32(own)
    module, _ = pass_gate(whole, probe, parity, sampled=inputs)
    train_only(module, student, kept)
    objective = objective_of(output, temperature, label_weight if labels is not None else 0.0)
    constraint = zeros_of(whole)
    macs = macs_of(interface.applied(student), samples.shapes(inputs))
    plan = with_fitting_batch(plan, whole, probe)
    training = train(module, samples, objective, plan, on_step, constraint, threads=threads, macs=macs)
    trained = {name: array for name, array in module.trained_weights().items() if holds(student, name, array)}
    tuned = write_back(student, trained)
    check_answer(module, _as_slice(tuned, interface, inputs, probe), probe, max(parity, rounding_error(own)))
    return tuned, training


def why_not_finetuned(student: ir.Model) -> str | None:
    """Why a whole student cannot be fine-tuned, as far as its outputs tell; None where nothing speaks against it."""
    outputs = student.graph.outputs
    if len(outputs) != 1:
        return f"the model has {len(outputs)} outputs; only one can be fine-tuned"
    type_ = outputs[0].type
    if isinstance(type_, ir.TensorType) and type_.dtype.is_floating_point() and outputs[0].producer() is not None:
        return None
    return f"its output '{outputs[0].name}' is no tensor of floating-point numbers that the model computes"


def _as_slice(student: ir.Model, interface: Interface, inputs: list[str], probe: Arrays) -> ir.Model:
    """A student that is trained as a slice is: constants folded, samples first, as many at once as keep apart."""
    whole = fold_constants(interface.applied(student).clone())
    if interface.batch is not None:
        whole = hold_batch(whole, inputs, interface.batch)
    return open_slice(whole, inputs, probe)


def macs_of(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> int:
    """Multiplications of a whole model for one sample, by which the optimiser judges what is cheap; 0 if unknown.

    Args:
        model: as it is trained.
        shapes: of its inputs, for one sample.
    """
    working = fold_constants(infer_shapes(model.clone()))
    return sample_cost(working.graph, bind(working, shapes)).macs or 0


def is_class_scores(output: ir.Value) -> bool:
    """Whether an output holds class scores, (samples, classes), before any softmax."""
    producer = output.producer()
    is_probability = producer is not None and producer.op_type in _PROBABILITIES
    return output.shape is not None and len(output.shape) == _CLASS_RANK and output.shape[1] != 1 and not is_probability


def objective_of(output: ir.Value, temperature: float, label_weight: float) -> Objective:
    """What a whole model is trained on: softened cross-entropy for class scores, squared error otherwise."""
    name = output.name or ""
    return DistillationLoss(name, temperature, label_weight) if is_class_scores(output) else NeighbourhoodLoss(name)


def train_only(module: TorchSlice, student: ir.Model, kept: frozenset[str] = frozenset()) -> None:
    """Hold the kept weights, and what could not be written back: constants that the student computes from others."""
    for name, weight in zip(module.weight_names, module.weights, strict=True):
        if name in kept or not holds(student, name, weight.detach().numpy()):
            weight.requires_grad_(False)


def holds(student: ir.Model, name: str, array: npt.NDArray[np.float32]) -> bool:
    """Whether the student has an initializer of this name and shape, into which the array can be written back."""
    value = student.graph.initializers.get(name)
    if value is None or value.const_value is None:
        return False
    return tuple(int(d) for d in value.const_value.shape.numpy()) == array.shape
