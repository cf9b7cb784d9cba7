"""What trainings of a whole model share: their settings, their samples, and the job that runs them in a worker."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from ndonnx.config.recipe import Recipe
from ndonnx.convert import TorchSlice
from ndonnx.data.user_code import import_function
from ndonnx.distill.losses import (
    LABEL,
    FunctionLoss,
    Objective,
    SeveralLosses,
    target_variance,
)
from ndonnx.distill.plan import Plan
from ndonnx.distill.samples import SliceSamples, Source
from ndonnx.distill.tasks.base import OutputTask, TrainedOutput
from ndonnx.distill.tasks.kinds.classification import SCORES_RANK, Classification
from ndonnx.distill.tasks.outputs import tasks_of
from ndonnx.distill.trainer import OnStep, Training
from ndonnx.errors import RecipeError
from ndonnx.graph import fold_constants, load, save
from ndonnx.graph.bound import bind
from ndonnx.graph.dataflow import real_inputs
from ndonnx.graph.interface import Interface
from ndonnx.graph.macs import sample_cost
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.graph.storage.files import model_files
from ndonnx.runtime.executor import Demands, MovableJob
from ndonnx.runtime.run_directory import Entry
from ndonnx.teacher import ActivationStore

Labels = npt.NDArray[np.int64]
"""Class numbers, int64 (samples,), one for each sample of a store."""

_FLOAT = 4
_FEW, _SEEN = 16, 256
"""Samples by which an output is told, and its size: from the fewest to the most."""
_SEEN_BYTES = 32 * 2**20
"""Bytes of them, about."""


@dataclass(frozen=True)
class WholeSettings:
    """How a whole model is trained against captured answers."""

    plan: Plan
    temperature: float | None
    """Softmax temperature of the distillation loss; None: by the teacher's scores, see `fitting_temperature`."""
    label_weight: float
    """Weight of the labels' cross-entropy, 0 to 1; the captured answers have the rest."""
    holdout: float
    """Fraction of the samples that chooses the best state."""
    parity: float
    """Maximum relative error of torch against onnxruntime."""
    interface: Interface = field(default_factory=Interface)
    """How the model is fed."""
    tasks: Mapping[str, OutputTask] = field(default_factory=dict)
    """What each output that is trained means, by its name, in the model's order."""
    padding: str | None = None
    """The input that says how many positions of a sample are filled; None where all are."""

    @classmethod
    def of(
        cls, recipe: Recipe, plan: Plan, holdout: float, interface: Interface, tasks: Mapping[str, OutputTask]
    ) -> WholeSettings:
        """As a recipe says, with the fraction of the samples that was held out for it, and what the outputs mean."""
        return cls(plan, recipe.temperature, recipe.label_weight, holdout, recipe.parity, interface, tasks)

    def inputs_of(self, model: ir.Model) -> list[str]:
        """Names of the model's inputs that have samples."""
        return [value.name or "" for value in real_inputs(model.graph) if value.name not in self.interface.fixed]

    def samples_of(self, model: ir.Model, store: ActivationStore, labels: Labels | None) -> SliceSamples:
        """The model's inputs and the outputs that are trained, from a store, with labels where there are some."""
        inputs = self.inputs_of(model)
        sources = {name: Source(store, name) for name in (*inputs, *self.tasks)}
        return SliceSamples(sources, inputs, self.holdout, {} if labels is None else {LABEL: labels})

    def objective_of(self, samples: SliceSamples, labels: Labels | None) -> Objective:
        """The loss: of each output as its task asks, in all their sum."""
        few = max(_FEW, min(_SEEN, _SEEN_BYTES // max(1, samples.bytes_per_sample())))
        rows = samples.training_rows(few)
        labelled = next((n for n, task in self.tasks.items() if _of_whole_samples(task, rows[n])), None)
        weights = dict.fromkeys(self.tasks, 0.0)
        if labels is not None and labelled is not None:
            weights[labelled] = self.label_weight
        losses = [self._loss(name, rows[name], weights[name]) for name in self.tasks]
        if len(losses) == 1:
            return losses[0]
        return SeveralLosses(losses, [_variance(rows[name]) for name in self.tasks])

    def _loss(self, name: str, rows: npt.NDArray[np.generic], label_weight: float) -> Objective:
        task = self.tasks[name]
        if task.custom is not None:
            return FunctionLoss(name, loss_named(task.custom))
        return task.kind.objective(task, TrainedOutput(name, rows, _variance(rows), self.temperature, label_weight))


def _variance(rows: npt.NDArray[np.generic]) -> float:
    """Variance of an output; 1 where it is constant."""
    return target_variance(torch.from_numpy(rows)) or 1.0


def _of_whole_samples(task: OutputTask, rows: npt.NDArray[np.generic]) -> bool:
    """Whether an output holds one class for each sample, as labels do."""
    return task.kind is Classification and task.custom is None and rows.ndim == SCORES_RANK


def tasks_from(
    store: ActivationStore, outputs: Sequence[str], *, labelled: bool, told: Sequence[str]
) -> dict[str, OutputTask]:
    """What captured outputs mean, see `ndonnx.distill.tasks.outputs.tasks_of`.

    Raises:
        RecipeError: the user speaks of an output that there is not.
    """
    stored = [name for name in outputs if not store.is_constant(name)]
    each = sum(math.prod(store.rows(name).shape[1:]) * _FLOAT for name in stored)
    count = min(store.samples, max(_FEW, min(_SEEN, _SEEN_BYTES // max(1, each))))
    few = {name: np.asarray(store.rows(name)[:count]) for name in stored}
    return tasks_of(few, count, labelled=labelled, told=told)


def loss_named(path: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The user's own loss by `module:function`.

    Raises:
        RecipeError: there is no such function.
    """
    return import_function(path, os.getcwd(), RecipeError)


@dataclass(frozen=True)
class WholeJob(MovableJob, ABC):
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

    @property
    def reads(self) -> list[Path]:
        """The model, the store and the labels.

        Raises:
            RunDirError: the store is damaged.
        """
        labels = [] if self.labels_path is None else [self.labels_path]
        return [*model_files(self.model_path), *ActivationStore.files(self.store_path), *labels]

    @property
    def writes(self) -> Path:
        """The entry."""
        return self.entry.path

    @property
    def demands(self) -> Demands:
        """The plan's threads and device."""
        return Demands(self.settings.plan.threads, self.settings.plan.device == "cuda")

    @abstractmethod
    def trained(
        self, model: ir.Model, store: ActivationStore, labels: Labels | None, on_step: OnStep
    ) -> tuple[ir.Model, Training]:
        """A trained copy of the model, and how its training went."""


MODEL_FILE = "student.onnx"
"""Name of the trained model's file in the job's entry."""


def macs_of(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> int:
    """Multiplications of a whole model for one sample, by which the optimiser decides what is cheap; 0 if unknown.

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
