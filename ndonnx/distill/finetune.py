"""End-to-end distillation of the spliced student: a short polish after the neighbourhoods (equation 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ndonnx.convert import Grid, TorchSlice, to_torch, write_back
from ndonnx.distill.cutting import cut_where_same
from ndonnx.distill.gate import Arrays, check_answer, of_sizes, open_slice, pass_gate
from ndonnx.distill.steps import with_fitting_batch
from ndonnx.distill.trainer import OnStep, Training, train
from ndonnx.distill.whole import Labels, WholeJob, WholeSettings, macs_of, train_only, trained_weights
from ndonnx.errors import ConversionError, SliceError
from ndonnx.graph import fold_constants
from ndonnx.graph.dataflow import float_outputs
from ndonnx.graph.interface import Interface
from ndonnx.graph.passes.branches import open_branches
from ndonnx.graph.passes.packed_outputs import pack_outputs
from ndonnx.graph.precision import in_float32, rounding_error
from ndonnx.graph.working_copy import hold_batch
from ndonnx.students.masks import zeros_of
from ndonnx.teacher import ActivationStore

_PROBE = 16
_WHOLE_PARITY = 1e-2
"""Relative error of torch against onnxruntime that a whole model may have. Rounding adds up over its depth, and what
counts is decided later: the fine-tuned student is measured in onnxruntime, and kept only where it is better."""


@dataclass(frozen=True)
class FinetuneJob(WholeJob):
    """Fine-tuning as an executor's job; its store holds the student's inputs and the teacher's output."""

    kept: frozenset[str] = frozenset()
    """Names of weights that stay as they are: those outside the replaced neighbourhoods."""
    grid: Grid | None = None
    """What weights are rounded to in every step, where the model rounds its values too; None: it is in float."""

    def trained(
        self, model: ir.Model, store: ActivationStore, labels: Labels | None, on_step: OnStep
    ) -> tuple[ir.Model, Training]:
        """The fine-tuned student; see `finetune`."""
        return finetune(model, store, self.settings, on_step, labels=labels, kept=self.kept, grid=self.grid)


def finetune(
    student: ir.Model,
    store: ActivationStore,
    settings: WholeSettings,
    on_step: OnStep,
    *,
    labels: Labels | None = None,
    kept: frozenset[str] = frozenset(),
    grid: Grid | None = None,
) -> tuple[ir.Model, Training]:
    """A copy of the student, trained as a whole against the teacher's captured outputs.

    Each output that the settings name has the loss of its task: class scores the softened cross-entropy, embeddings
    the cosine and the squared error, numbers the squared error over their variance; several are trained together.
    Only weights that are initializers of the student are trained, so that everything is written back by name;
    patterns of zeros stay.

    Args:
        student: the spliced student.
        store: the student's inputs and the teacher's outputs.
        settings: how it is trained, on which outputs.
        on_step: told the step, the steps and the held-out NMSE of the outputs.
        labels: class numbers, one per sample of the store.
        kept: names of weights that stay as they are.
        grid: what weights are rounded to in every step, with gradients that pass the rounding by (the
            straight-through estimator); they come back as floats. None: they are not rounded.

    Raises:
        SliceError: the whole does not convert or match onnxruntime, or the training broke down.
    """
    if (reason := why_not_finetuned(student)) is not None:
        raise ConversionError(reason)
    interface, inputs, tolerance = settings.interface, settings.inputs_of(student), settings.parity
    samples = settings.samples_of(student, store, labels)
    probe = {name: rows for name, rows in samples.arrays(0, _PROBE).items() if name in inputs}
    own = _as_slice(student, settings, inputs, probe)
    whole = in_float32(own)
    tolerance = max(tolerance, _WHOLE_PARITY)
    if grid is None:
        module, _ = pass_gate(whole, probe, tolerance, sampled=inputs)
    else:
        module = _on_grid(whole, grid)
    if settings.padding is not None:
        mask = np.asarray(store.rows(settings.padding)[:])
        samples = cut_where_same(whole, samples, mask)
    train_only(module, student, kept)
    module.macs = macs_of(interface.applied(student), samples.shapes(inputs))
    objective = settings.objective_of(samples, labels)
    plan = with_fitting_batch(settings.plan, whole, probe)
    training = train(module, samples, objective, plan, on_step, zeros_of(whole))
    tuned = write_back(student, trained_weights(module, student))
    if grid is None:
        tuned_slice = _as_slice(tuned, settings, inputs, probe)
        check_answer(module, tuned_slice, probe, max(tolerance, rounding_error(own)))
    return tuned, training


def _on_grid(whole: ir.Model, grid: Grid) -> TorchSlice:
    """A model that rounds, in torch. No gate: a number beside the middle of two integers may go either way."""
    module = to_torch(whole)
    module.grid = grid
    return module


def why_not_finetuned(student: ir.Model) -> str | None:
    """Why a whole student cannot be fine-tuned, as far as its outputs tell; None where nothing speaks against it."""
    if float_outputs(student):
        return None
    names = ", ".join(f"'{value.name}'" for value in student.graph.outputs)
    return f"no output ({names}) is a tensor of floating-point numbers that the model computes"


def why_not_converted(model: ir.Model, interface: Interface, outputs: Sequence[str], probe: Arrays) -> str | None:
    """Why a whole model cannot be trained in torch, as far as its conversion tells; None where it can.

    Args:
        model: a teacher or a student; not changed.
        interface: how it is fed.
        outputs: those that would be trained.
        probe: a few samples of all inputs that have samples.
    """
    try:
        to_torch(whole_slice(model, interface, outputs, list(probe), probe))
    except SliceError as error:
        return str(error)
    return None


def _as_slice(student: ir.Model, settings: WholeSettings, inputs: list[str], probe: Arrays) -> ir.Model:
    return whole_slice(student, settings.interface, list(settings.tasks), inputs, probe)


def whole_slice(
    student: ir.Model, interface: Interface, outputs: Sequence[str], inputs: list[str], probe: Arrays
) -> ir.Model:
    """A whole model as one that is trained as a slice is: constants folded, one output, any number of samples at once.

    Args:
        student: a student or a teacher; not changed.
        interface: how it is fed.
        outputs: those that are trained, packed side by side where there are several.
        inputs: names of those that have samples.
        probe: a few samples of them.

    Raises:
        SliceError: it cannot be had.
    """
    whole = fold_constants(open_branches(of_sizes(interface.applied(student), probe)).clone())
    whole = pack_outputs(whole, outputs)
    if interface.batch is not None:
        whole = hold_batch(whole, inputs, interface.batch)
    return open_slice(whole, inputs, probe)
