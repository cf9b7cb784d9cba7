"""The training of a whole teacher under noise, as a function and as an executor's job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from ndonnx.convert import TorchSlice, check_parity, write_back
from ndonnx.distill import Plan, Training, train
from ndonnx.distill.finetune import holds, macs_of, objective_of, train_only
from ndonnx.distill.gate import answer, free_batch, open_slice, pass_gate
from ndonnx.distill.losses import LABEL
from ndonnx.distill.noisy_body import NoisyBody
from ndonnx.distill.samples import SliceSamples, Source
from ndonnx.distill.trainer import OnStep
from ndonnx.graph import load, save
from ndonnx.graph.dataflow import real_inputs
from ndonnx.graph.interface import Interface, samples_first
from ndonnx.graph.passes.branches import open_branches
from ndonnx.graph.precision import in_float32, rounding_error
from ndonnx.graph.working_copy import hold_batch, slice_batch, working_copy
from ndonnx.runtime.run_directory import Entry
from ndonnx.students.masks import zeros_of
from ndonnx.teacher import ActivationStore
from ndonnx.teacher.noise_inputs import Noise, add_noise_inputs

MODEL_FILE = "model.onnx"

_PROBE = 16


def harden_whole(
    teacher: ir.Model,
    store: ActivationStore,
    noises: Sequence[Noise],
    plan: Plan,
    *,
    temperature: float,
    label_weight: float = 0.0,
    labels: npt.NDArray[np.int64] | None = None,
    holdout: float,
    parity: float,
    on_step: OnStep,
    interface: Interface | None = None,
) -> tuple[ir.Model, Training]:
    """A copy of the teacher, trained under noise against its own captured answers.

    Args:
        teacher: as loaded; one output.
        store: its inputs and its output.
        noises: what is added where.
        plan: how long and how fast.
        temperature: of the softened class scores.
        label_weight: of the labels' cross-entropy, 0 to 1; 0 without labels.
        labels: class numbers, one per sample of the store.
        holdout: part of the samples that chooses the best state.
        parity: largest relative error of torch against onnxruntime.
        on_step: told the step, the steps and the held-out NMSE of the output.
        interface: how the teacher is fed; None: samples along the first axis of every input.

    Raises:
        SliceError: the whole does not convert or match onnxruntime, or the training broke down.
    """
    interface = Interface() if interface is None else interface
    inputs = [value.name or "" for value in real_inputs(teacher.graph) if value.name not in interface.fixed]
    output = teacher.graph.outputs[0]
    sources = {name: Source(store, name) for name in (*inputs, output.name or "")}
    samples = SliceSamples(sources, inputs, holdout, {} if labels is None else {LABEL: labels})
    rows = {name: array for name, array in samples.arrays(0, _PROBE).items() if name in inputs}
    noisy = samples_first(add_noise_inputs(working_copy(teacher, interface), noises))
    drawn = _drawn(noises, len(next(iter(rows.values()))), plan.seed)
    held = slice_batch(noisy)
    if held is not None:
        noisy = hold_batch(noisy, list(drawn), held)
    whole = open_slice(in_float32(noisy), [*inputs, *drawn], rows | drawn)
    module, _ = pass_gate(whole, rows | drawn, parity, sampled=[*inputs, *drawn])
    module.input_names = tuple(inputs)
    module.body = body = NoisyBody(module.body, len(inputs), noises, plan.seed)
    train_only(module, teacher)
    objective = objective_of(output, temperature, label_weight if labels is not None else 0.0)
    macs = macs_of(interface.applied(teacher), samples.shapes(inputs))
    training = train(module, samples, objective, plan, on_step, zeros_of(whole), macs=macs)
    hardened = write_back(teacher, _trained(module, teacher))
    body.quiet = True
    quiet = interface.applied(hardened).clone()
    quiet = free_batch(quiet, inputs) if module.batch is None else hold_batch(quiet, inputs, module.batch)
    clean = answer(quiet, rows)
    check_parity(module, [rows[name] for name in inputs], clean, max(parity, rounding_error(quiet)))
    return hardened, training


def _drawn(noises: Sequence[Noise], count: int, seed: int) -> dict[str, npt.NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return {
        noise.input: rng.standard_normal((count, *noise.shape), dtype=np.float32) * np.float32(noise.std)
        for noise in noises
    }


def _trained(module: TorchSlice, teacher: ir.Model) -> Mapping[str, npt.NDArray[np.float32]]:
    """The weights that the teacher itself holds."""
    return {name: array for name, array in module.trained_weights().items() if holds(teacher, name, array)}


@dataclass(frozen=True)
class HardenJob:
    """Hardening as an executor's job: everything by value or by path."""

    name: str
    teacher_path: Path
    store_path: Path
    """An activation store with the teacher's inputs and output."""
    labels_path: Path | None
    """An `.npy` of class numbers, one per sample; None without labels."""
    noises: tuple[Noise, ...]
    entry: Entry
    plan: Plan
    temperature: float
    label_weight: float
    holdout: float
    parity: float
    threads: int
    interface: Interface = field(default_factory=Interface)
    """How the teacher is fed."""

    def __call__(self, on_step: OnStep) -> Training:
        """Train; the hardened model is on disk afterwards, in the job's entry.

        Raises:
            SliceError: as `harden_whole`.
        """
        torch.set_num_threads(self.threads)
        folder = self.entry.begin()
        hardened, training = harden_whole(
            open_branches(load(self.teacher_path), self.interface.fixed),
            ActivationStore.open(self.store_path),
            self.noises,
            self.plan,
            temperature=self.temperature,
            label_weight=self.label_weight,
            labels=None if self.labels_path is None else np.load(self.labels_path, allow_pickle=False),
            holdout=self.holdout,
            parity=self.parity,
            on_step=on_step,
            interface=self.interface,
        )
        save(hardened, folder / MODEL_FILE)
        self.entry.commit(asdict(training))
        return training
