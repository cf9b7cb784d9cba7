"""How long a training step takes here, measured on the whole teacher before anything is trained."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from ndonnx.convert import TorchSlice, to_torch
from ndonnx.distill.finetune import whole_slice
from ndonnx.distill.formats import usual
from ndonnx.distill.gradients import ThreadPool
from ndonnx.distill.plan import Plan
from ndonnx.distill.steps import with_fitting_batch
from ndonnx.errors import SliceError
from ndonnx.graph.interface import Interface
from ndonnx.runtime.machine import usable_cores

_ROUNDS = 3
"""Gradients that are timed; the first is there to warm up, the least of the others counts."""


def seconds_a_step(
    model: ir.Model, interface: Interface, outputs: Sequence[str], rows: Mapping[str, NDArray[Any]], plan: Plan
) -> float | None:
    """Time of a gradient of a whole model by a batch of a plan, on all cores; None where it does not convert.

    Args:
        model: a teacher; not changed.
        interface: how it is fed.
        outputs: those that are trained.
        rows: samples of all inputs that have samples; a batch is as many of them, over and over.
        plan: for the size of a batch.
    """
    try:
        whole = whole_slice(model, interface, outputs, list(rows), rows)
        module = to_torch(whole)
    except SliceError:
        return None
    batch = with_fitting_batch(plan, whole, rows).batch_size
    count = min(batch, len(next(iter(rows.values()))))
    return _seconds(module, {name: array[:count] for name, array in rows.items()}) * batch / count


def _seconds(module: TorchSlice, rows: Mapping[str, NDArray[Any]]) -> float:
    """Time of one gradient, each core with a part of the rows."""
    before, count = torch.get_num_threads(), len(next(iter(rows.values())))
    pool = ThreadPool(min(usable_cores(), count))
    form, device = usual(bf16=False, device="cpu"), torch.device("cpu")
    weights = [weight for weight in module.parameters() if weight.requires_grad]

    def gradient(part: NDArray[np.int64]) -> None:
        answer = module(*(form.held(torch.from_numpy(np.ascontiguousarray(a[part])), device) for a in rows.values()))
        loss = answer.float().square().mean()
        if weights and loss.requires_grad:
            torch.autograd.grad(loss, weights, allow_unused=True)

    times = []
    try:
        for _ in range(_ROUNDS):
            began = time.perf_counter()
            pool.map(gradient, np.array_split(np.arange(count), pool.count))
            times.append(time.perf_counter() - began)
    finally:
        pool.close()
        torch.set_num_threads(before)
    return min(times[1:])
