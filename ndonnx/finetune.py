"""End-to-end distillation of the spliced student: a short polish after the neighbourhoods (equation 3)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from ndonnx.convert import TorchSlice, check_parity, to_torch, write_back
from ndonnx.distil import Plan, Training, train
from ndonnx.distil.losses import Loss, distillation_loss, neighbourhood_loss
from ndonnx.distil.samples import SliceSamples
from ndonnx.distil.trainer import OnStep
from ndonnx.errors import ConversionError
from ndonnx.graph import fold_constants
from ndonnx.graph.dataflow import real_inputs
from ndonnx.teacher import ActivationStore, make_session

_PROBE = 16
_CLASS_RANK = 2
"""Rank of class scores: (samples, classes)."""


def finetune(
    student: ir.Model,
    store_path: Path,
    plan: Plan,
    *,
    temperature: float,
    holdout: float,
    parity: float,
    on_step: OnStep,
) -> tuple[ir.Model, Training]:
    """A copy of the student, trained as a whole against the teacher's captured outputs.

    Class scores, (samples, classes) that are not yet probabilities, are matched by the softened
    cross-entropy; any other output by the squared error. No labels are used. Only weights that
    are initializers of the student are trained, so that everything is written back by name.

    Args:
        student: the spliced student, one output.
        store_path: an activation store with the student's inputs and the teacher's output.

    Raises:
        SliceError: the whole does not convert or match onnxruntime, or the training broke down.
    """
    if len(student.graph.outputs) != 1:
        raise ConversionError(f"the model has {len(student.graph.outputs)} outputs; only one can be fine-tuned")
    inputs = [value.name or "" for value in real_inputs(student.graph)]
    output = student.graph.outputs[0]
    samples = SliceSamples(ActivationStore.open(store_path), inputs, output.name or "", holdout)
    module = to_torch(fold_constants(student.clone()))
    _train_only(module, student)
    captured = samples.arrays(0, _PROBE)
    _gate(module, student, [captured[name] for name in inputs], parity)
    training = train(module, samples, plan, on_step, _loss_for(output, temperature))
    trained = {name: array for name, array in module.trained_weights().items() if _holds(student, name, array)}
    return write_back(student, trained), training


def _loss_for(output: ir.Value, temperature: float) -> Loss:
    producer = output.producer()
    is_probability = producer is not None and producer.op_type in ("Softmax", "LogSoftmax", "Sigmoid")
    is_scores = output.shape is not None and len(output.shape) == _CLASS_RANK and output.shape[1] != 1
    return distillation_loss(temperature) if is_scores and not is_probability else neighbourhood_loss


def _train_only(module: TorchSlice, student: ir.Model) -> None:
    """Hold what could not be written back: constants that the student computes from others."""
    for name, weight in zip(module.weight_names, module.weights, strict=True):
        if not _holds(student, name, weight.detach().numpy()):
            weight.requires_grad_(False)


def _holds(student: ir.Model, name: str, array: np.ndarray) -> bool:
    value = student.graph.initializers.get(name)
    return (
        value is not None
        and value.const_value is not None
        and tuple(int(d) for d in value.const_value.shape.numpy()) == array.shape
    )


def _gate(module: TorchSlice, student: ir.Model, probe: list[np.ndarray], parity: float) -> None:
    names = [value.name or "" for value in real_inputs(student.graph)]
    expected = make_session(student).run(None, dict(zip(names, probe, strict=True)))[0]
    check_parity(module, probe, expected, parity)
