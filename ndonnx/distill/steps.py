"""How large a training step is: the positions that its gradient averages over, and the bytes that it keeps."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, nn

from ndonnx.distill.formats import Format
from ndonnx.distill.losses import Objective
from ndonnx.distill.plan import Plan
from ndonnx.distill.samples import Samples
from ndonnx.graph.costs import constant_of
from ndonnx.graph.working_copy import slice_batch
from ndonnx.teacher.probe import Arrays
from ndonnx.teacher.sizes import layouts_of

MOST_POSITIONS = 2**16
"""Positions of a step beyond which its batch shrinks: 64 feature maps of 32x32. More of them hardly change a gradient
that already averages over so many, and a step takes as much longer."""
_LEAST_BATCH = 16
"""Samples that a step has all the same: positions of one sample say much of the same."""
THREAD_BYTES = 256 * 2**20
"""Bytes of activations, about, that each thread of a training keeps for its gradient."""
_FEW = 2
_SEEN = 64
"""Samples among which a few of one shape are looked for."""
_BEHIND = 1.5
"""Bytes of a gradient on its way back, for each byte kept on the way there, the kept ones included."""
_CHANNELS_SECOND = ("Conv", "ConvTranspose")
_LINEAR = (*_CHANNELS_SECOND, "Gemm", "MatMul")
_PLAIN = Format()
"""What targets are held in: losses compare in float32, and lay nothing out anew."""


def with_fitting_batch(plan: Plan, model: ir.Model, rows: Arrays) -> Plan:
    """The plan with a batch of bounded positions.

    Args:
        plan: its batch is the most that is wanted.
        model: what is trained, samples first.
        rows: a few samples of its inputs.
    """
    batch = min(plan.batch_size, max(_LEAST_BATCH, MOST_POSITIONS // max(1, positions_of(model, rows))))
    return replace(plan, batch_size=batch)


def positions_of(model: ir.Model, rows: Arrays) -> int:
    """Positions of one sample at which the linear operator that is applied most often is applied."""
    count = slice_batch(model) or _FEW
    few = {name: array[: _length(model, name, count)] if array.ndim else array for name, array in rows.items()}
    channels = {node.outputs[0].name or "": _channel_axis(node) for node in model.graph if _is_linear(node)}
    layouts = layouts_of(model, list(channels), few) if channels else {}
    most = 1
    for name, layout in layouts.items():
        each = math.prod(layout.shape[1:] if layout.rows else layout.shape) // max(1, layout.shape[channels[name]])
        most = max(most, each if layout.rows else each // count)
    return most


def _length(model: ir.Model, name: str, count: int) -> int:
    """Length of an input's first axis in a run of so many samples: its own where that is fixed."""
    value = next((value for value in model.graph.inputs if value.name == name), None)
    if value is None or value.shape is None or not len(value.shape):
        return count
    size = value.shape[0]
    return size if isinstance(size, int) else count


def _is_linear(node: ir.Node) -> bool:
    return node.op_type in _LINEAR and len(node.inputs) > 1 and constant_of(node.inputs[1]) is not None


def _channel_axis(node: ir.Node) -> int:
    return 1 if node.op_type in _CHANNELS_SECOND else -1


def samples_in_memory(
    module: nn.Module, samples: Samples, objective: Objective, plan: Plan, pool: int, form: Format
) -> int:
    """Samples whose gradient a thread may compute at a time.

    What the forward pass keeps is weighed on a few samples, in the types that the training computes in.

    Args:
        module: what is trained, on a CPU.
        samples: where the few are taken.
        objective: what it is trained on.
        plan: holds the bytes for all threads together, where they are fewer than `THREAD_BYTES` for each.
        pool: threads.
        form: number format and layout of the training.
    """
    allowed = THREAD_BYTES if plan.memory is None else plan.memory // pool
    first, last = samples.blocks.holdout, samples.blocks.samples
    rows = samples.split(np.arange(first, min(last, first + _SEEN)), 1)[0][: 2 * _FEW]  # that can be a batch
    count = len(rows)
    fewer = max(1, count // 2)
    kept = [_kept_bytes(module, samples, objective, rows[:n], form) for n in (fewer, count)]
    each = (kept[1] - kept[0]) / (count - fewer) if count > fewer else kept[1] / count
    each = _BEHIND * max(0.0, each) + samples.bytes_per_sample()
    return max(1, int(allowed / max(1.0, each)))


def _kept_bytes(
    module: nn.Module, samples: Samples, objective: Objective, rows: npt.NDArray[np.int64], form: Format
) -> int:
    """Bytes that the forward pass of some samples keeps for the gradient, weights aside."""
    weights = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = samples.batch(rows)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(module, samples.inputs, objective, batch, torch.device("cpu"), form)
    del loss
    return sum(kept.values())


def loss_of(
    module: nn.Module,
    inputs: tuple[str, ...],
    objective: Objective,
    batch: dict[str, Tensor],
    device: torch.device,
    form: Format,
) -> Tensor:
    """The objective on a batch, its graph kept for the gradient.

    Args:
        module: what is trained.
        inputs: names of what it reads, in order.
        objective: what it is trained on.
        batch: all values by name, in the types in which they are stored.
        device: where it is computed.
        form: number format and layout of the forward pass.
    """
    with torch.autocast(device.type, torch.bfloat16, enabled=form.bf16):
        answer = module(*(form.held(batch[name], device) for name in inputs))
        captured = {name: _PLAIN.held(batch[name], device) for name in objective.values}
        return objective(answer.float(), captured)
