"""The training of a whole teacher under noise (appendix B.1), as a function and as an executor's job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ndonnx.convert import check_parity, write_back
from ndonnx.distill.gate import answer, free_batch, open_slice, pass_gate
from ndonnx.distill.noisy_body import NoisyBody
from ndonnx.distill.trainer import OnStep, Training, train
from ndonnx.distill.whole import Labels, WholeJob, WholeSettings, macs_of, train_only, trained_weights
from ndonnx.graph.interface import samples_first
from ndonnx.graph.passes.branches import open_branches
from ndonnx.graph.precision import in_float32, rounding_error
from ndonnx.graph.working_copy import hold_batch, slice_batch, working_copy
from ndonnx.students.masks import zeros_of
from ndonnx.teacher import ActivationStore
from ndonnx.teacher.noise_inputs import Noise, add_noise_inputs

_PROBE = 16


@dataclass(frozen=True)
class HardenJob(WholeJob):
    """Hardening as an executor's job; its store holds the teacher's inputs and its own clean output."""

    noises: tuple[Noise, ...] = ()

    def trained(
        self, model: ir.Model, store: ActivationStore, labels: Labels | None, on_step: OnStep
    ) -> tuple[ir.Model, Training]:
        """The hardened teacher; see `harden_whole`."""
        teacher = open_branches(model, self.settings.interface.fixed)
        return harden_whole(teacher, store, self.noises, self.settings, on_step, labels=labels)


def harden_whole(
    teacher: ir.Model,
    store: ActivationStore,
    noises: Sequence[Noise],
    settings: WholeSettings,
    on_step: OnStep,
    *,
    labels: Labels | None = None,
) -> tuple[ir.Model, Training]:
    """A copy of the teacher, trained under noise against its own captured answers.

    Args:
        teacher: as loaded; one output.
        store: its inputs and its output.
        noises: what is added where.
        settings: how it is trained.
        on_step: told the step, the steps and the held-out NMSE of the output.
        labels: class numbers, one per sample of the store.

    Raises:
        SliceError: the whole does not convert or match onnxruntime, or the training broke down.
    """
    interface, inputs, plan = settings.interface, settings.inputs_of(teacher), settings.plan
    samples = settings.samples_of(teacher, store, labels)
    rows = {name: array for name, array in samples.arrays(0, _PROBE).items() if name in inputs}
    noisy = samples_first(add_noise_inputs(working_copy(teacher, interface), noises))
    drawn = _drawn(noises, len(next(iter(rows.values()))), plan.seed)
    held = slice_batch(noisy)
    if held is not None:
        noisy = hold_batch(noisy, list(drawn), held)
    whole = open_slice(in_float32(noisy), [*inputs, *drawn], rows | drawn)
    module, _ = pass_gate(whole, rows | drawn, settings.parity, sampled=[*inputs, *drawn])
    module.input_names = tuple(inputs)
    module.body = body = NoisyBody(module.body, len(inputs), noises, plan.seed)
    train_only(module, teacher)
    module.macs = macs_of(interface.applied(teacher), samples.shapes(inputs))
    objective = settings.objective_of(samples, labels)
    training = train(module, samples, objective, plan, on_step, zeros_of(whole))
    hardened = write_back(teacher, trained_weights(module, teacher))
    body.quiet = True
    quiet = interface.applied(hardened).clone()
    quiet = free_batch(quiet, inputs) if module.batch is None else hold_batch(quiet, inputs, module.batch)
    clean = answer(quiet, rows)
    check_parity(module, [rows[name] for name in inputs], clean, max(settings.parity, rounding_error(quiet)))
    return hardened, training


def _drawn(noises: Sequence[Noise], count: int, seed: int) -> dict[str, npt.NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return {
        noise.input: rng.standard_normal((count, *noise.shape), dtype=np.float32) * np.float32(noise.std)
        for noise in noises
    }
