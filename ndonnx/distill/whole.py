"""What trainings of a whole model share: their settings, their samples, and the job that runs them in a worker."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from ndonnx.convert import TorchSlice
from ndonnx.distill.losses import LABEL, DistillationLoss, NeighbourhoodLoss, Objective
from ndonnx.distill.plan import Plan
from ndonnx.distill.samples import SliceSamples, Source
from ndonnx.distill.trainer import OnStep, Training
from ndonnx.graph import fold_constants, load, save
from ndonnx.graph.bound import bind
from ndonnx.graph.dataflow import real_inputs
from ndonnx.graph.interface import Interface
from ndonnx.graph.macs import sample_cost
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.runtime.run_directory import Entry
from ndonnx.teacher import ActivationStore

Labels = npt.NDArray[np.int64]
"""Class numbers, int64 (samples,), one for each sample of a store."""

_PROBABILITIES = {"Softmax", "LogSoftmax", "Sigmoid", "HardSigmoid"}
"""Operators whose output is no longer class scores."""
_CLASS_RANK = 2
"""Rank of class scores: (samples, classes)."""


@dataclass(frozen=True)
class WholeSettings:
    """How a whole model is trained against captured answers."""

    plan: Plan
    temperature: float
    """Softmax temperature of the distillation loss."""
    label_weight: float
    """Weight of the labels' cross-entropy, 0 to 1; the captured answers have the rest."""
    holdout: float
    """Fraction of the samples that chooses the best state."""
    parity: float
    """Maximum relative error of torch against onnxruntime."""
    interface: Interface = field(default_factory=Interface)
    """How the model is fed."""

    def inputs_of(self, model: ir.Model) -> list[str]:
        """Names of the model's inputs that have samples."""
        return [value.name or "" for value in real_inputs(model.graph) if value.name not in self.interface.fixed]

    def samples_of(self, model: ir.Model, store: ActivationStore, labels: Labels | None) -> SliceSamples:
        """The model's inputs and its one output, from a store, with labels where there are some."""
        inputs, output = self.inputs_of(model), model.graph.outputs[0].name or ""
        sources = {name: Source(store, name) for name in (*inputs, output)}
        return SliceSamples(sources, inputs, self.holdout, {} if labels is None else {LABEL: labels})

    def objective_of(self, output: ir.Value, labels: Labels | None) -> Objective:
        """The loss: softened cross-entropy for class scores, squared error for any other output."""
        name, weight = output.name or "", self.label_weight if labels is not None else 0.0
        return DistillationLoss(name, self.temperature, weight) if is_class_scores(output) else NeighbourhoodLoss(name)


@dataclass(frozen=True)
class WholeJob(ABC):
    """The training of a whole model as an executor's job: everything by value or by path."""

    name: str
    model_path: Path
    store_path: Path
    """An activation store with the model's inputs and the answers to learn."""
    labels_path: Path | None
    """An `.npy` of class numbers, one per sample; None without labels."""
    entry: Entry
    settings: WholeSettings

    def __call__(self, on_step: OnStep) -> Training:
        """Train the model; it is on disk afterwards, in the job's entry.

        Raises:
            SliceError: the whole does not convert or match onnxruntime, or the training broke down.
        """
        torch.set_num_threads(self.settings.plan.threads)
        folder = self.entry.begin()
        labels = None if self.labels_path is None else np.load(self.labels_path, allow_pickle=False)
        trained, training = self.trained(load(self.model_path), ActivationStore.open(self.store_path), labels, on_step)
        save(trained, folder / MODEL_FILE)
        self.entry.commit(asdict(training))
        return training

    @abstractmethod
    def trained(
        self, model: ir.Model, store: ActivationStore, labels: Labels | None, on_step: OnStep
    ) -> tuple[ir.Model, Training]:
        """A trained copy of the model, and how its training went."""


MODEL_FILE = "student.onnx"
"""Name of the trained model's file in the job's entry."""


def is_class_scores(output: ir.Value) -> bool:
    """Whether an output holds class scores, (samples, classes), before any softmax."""
    producer = output.producer()
    is_probability = producer is not None and producer.op_type in _PROBABILITIES
    return output.shape is not None and len(output.shape) == _CLASS_RANK and output.shape[1] != 1 and not is_probability


def macs_of(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> int:
    """Multiplications of a whole model for one sample, by which the optimiser judges what is cheap; 0 if unknown.

    Args:
        model: as it is trained.
        shapes: of its inputs, for one sample.
    """
    working = fold_constants(infer_shapes(model.clone()))
    return sample_cost(working.graph, bind(working, shapes)).macs or 0


def train_only(module: TorchSlice, model: ir.Model, kept: frozenset[str] = frozenset()) -> None:
    """Hold the kept weights, and what could not be written back: constants that the model computes from others."""
    for name, weight in zip(module.weight_names, module.weights, strict=True):
        if name in kept or not holds(model, name, weight.detach().numpy()):
            weight.requires_grad_(False)


def trained_weights(module: TorchSlice, model: ir.Model) -> dict[str, npt.NDArray[np.float32]]:
    """The weights of a trained module that the model itself holds, by name."""
    return {name: array for name, array in module.trained_weights().items() if holds(model, name, array)}


def holds(model: ir.Model, name: str, array: npt.NDArray[np.float32]) -> bool:
    """Whether a model has an initializer of this name and shape, into which the array can be written back."""
    value = model.graph.initializers.get(name)
    if value is None or value.const_value is None:
        return False
    return tuple(int(d) for d in value.const_value.shape.numpy()) == array.shape
