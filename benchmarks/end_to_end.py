"""End-to-end training of a whole student, by knowledge distillation (KD) or by labels: what ND is measured against."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common
from benchmarks.common import Notes, Slice, Stopwatch, Subject
from ndonnx.assemble.splice import splice
from ndonnx.config.recipe import Recipe
from ndonnx.convert import TorchSlice, check_parity, to_torch, write_back
from ndonnx.distill.losses import LABEL
from ndonnx.distill.samples import SliceSamples, Source
from ndonnx.errors import ConversionError, ModelError, ParityError, ShrinkError, UsageError
from ndonnx.graph import fold_constants, load
from ndonnx.graph.dataflow import real_inputs
from ndonnx.partition import Partition
from ndonnx.runtime.machine import pick_device, usable_cores
from ndonnx.teacher import ActivationStore, CaptureSettings, capture, make_session

Loss = Literal["kd", "ce"]
"""KL divergence from the teacher's softened logits, or cross-entropy with the labels."""

TEMPERATURE = 4.0
WARMUP = 0.05
"""Part of a KD budget over which the learning rate rises."""
HELD_OUT = 2000
"""Most held-out training samples that judge a learning rate."""
_PROBE = 16


class Images:
    """Inputs of the teacher and its logits, swept once by onnxruntime and read from the disk thereafter."""

    def __init__(self, subject: Subject, spec: str, folder: Path, samples: int | None) -> None:
        """Capture `samples` of the source at random as `compress` does; all of them in order where it is None."""
        model = load(subject.model)
        self.inputs = [value.name or "" for value in real_inputs(model.graph)]
        self.logits = _logits(subject.model, model)
        source = subject.open(spec)
        count = common.count_samples(source, sys.maxsize)
        if samples is not None:
            source = common.training_data(source, samples, subject.recipe)
            count = source.length
        self.labels = np.empty(count, dtype=np.int64) if source.has_labels else None

        def batches() -> Iterator[dict[str, Any]]:
            done = 0
            for batch in source.batches(common.capture_batch(model), samples=count):
                if self.labels is not None and batch.labels is not None:
                    self.labels[done : done + len(batch)] = batch.labels
                done += len(batch)
                yield batch.inputs

        device = pick_device(subject.recipe.device)
        names = [*self.inputs, self.logits]
        self.store = capture(
            model, names, batches, folder, samples=count, settings=CaptureSettings(device=device, half=False)
        )
        self.batch = common.capture_batch(model)

    def training(self, holdout: float) -> SliceSamples:
        """Images and logits to train on, and the labels where there are any."""
        sources = {name: Source(self.store, name) for name in (*self.inputs, self.logits)}
        return SliceSamples(sources, self.inputs, holdout, {} if self.labels is None else {LABEL: self.labels})

    def feeds(self, first: int, last: int) -> Iterator[dict[str, Any]]:
        """The model's inputs of these samples, a batch at a time."""
        for start in range(first, last, self.batch):
            yield {name: self.store.read(name, start, min(last, start + self.batch)) for name in self.inputs}


class EndToEnd:
    """Training of a whole student from one start; every training begins there anew."""

    def __init__(
        self, student: ir.Model, data: SliceSamples, target: str, recipe: Recipe, batch: int, loss: Loss = "kd"
    ) -> None:
        """Convert the whole student.

        Raises:
            UsageError: it does not convert to torch, or answers differently there, or there are no labels for `ce`.
        """
        if loss == "ce" and LABEL not in data.names:
            raise UsageError("cross-entropy needs labels, and the data hold none")
        self._kind = loss
        self._data = data
        self._target = target
        self._batch = min(batch, data.blocks.samples - data.blocks.holdout)
        self._seed = recipe.seed
        self._device = torch.device(pick_device(recipe.device))
        self._bf16 = common.in_bf16(recipe)
        self._model = fold_constants(student.clone())
        self._module = _convert(self._model, data, target, recipe.parity)
        self._start = [parameter.detach().clone() for parameter in self._module.parameters()]

    def model(self) -> ir.Model:
        """The student as ONNX, with the weights of this moment."""
        return write_back(self._model, self._module.trained_weights())

    def sweep(self, rates: Sequence[float], seconds: float) -> dict[float, float]:
        """Held-out loss after a short training with each learning rate; inf where it broke."""
        losses = {}
        for rate in rates:
            self.train(rate, seconds, Stopwatch(), [], lambda steps: None)
            losses[rate] = self._held_out_loss()
        return losses

    def train(
        self, rate: float, budget: float, clock: Stopwatch, stops: Sequence[float], visit: Callable[[int], None]
    ) -> None:
        """Train from the start for `budget` seconds of `clock`; pause it at each of `stops` seconds for `visit`."""
        self._restart()
        torch.set_num_threads(usable_cores())
        weights = [p for p in self._module.parameters() if p.requires_grad]
        optimiser = torch.optim.Adam(weights, lr=rate, fused=True)
        began, due = clock.seconds, list(stops)
        for steps, rows in enumerate(self._rows()):
            gone = clock.seconds - began
            if due and gone >= min(due[0], budget):
                due = [stop for stop in due if gone < min(stop, budget)]
                self._settle()
                with clock.paused():
                    visit(steps)
            if gone >= budget:
                break
            for group in optimiser.param_groups:
                group["lr"] = rate * _schedule(gone / budget)
            loss = self._loss(rows)
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimiser.step()

    def _loss(self, rows: np.ndarray) -> Tensor:
        batch = self._data.batch(rows)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            student = self._module(*(self._ready(tensor) for tensor in map(batch.__getitem__, self._data.inputs)))
        if self._kind == "ce":
            return F.cross_entropy(student.float(), batch[LABEL].to(self._device))
        return softened_kl(student, batch[self._target].to(self._device))

    def _ready(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to(self._device)
        return tensor.to(self._device, torch.bfloat16 if self._bf16 else torch.float32)

    def _held_out_loss(self) -> float:
        count = min(HELD_OUT, self._data.blocks.holdout)
        starts = range(0, count, self._batch)
        with torch.no_grad():
            parts = [np.arange(start, min(count, start + self._batch)) for start in starts]
            loss = sum(float(self._loss(rows)) * len(rows) for rows in parts) / count
        return loss if math.isfinite(loss) else math.inf

    def _rows(self) -> Iterator[np.ndarray]:
        """Training rows of each step, every epoch in a new order, as ND draws them."""
        rng = np.random.default_rng(self._seed)
        first, last = self._data.blocks.holdout, self._data.blocks.samples
        while True:
            order = first + rng.permutation(last - first)
            for position in range(0, len(order) - self._batch + 1, self._batch):
                yield np.sort(order[position : position + self._batch])

    def _restart(self) -> None:
        self._module.to(self._device)
        with torch.no_grad():
            for parameter, start in zip(self._module.parameters(), self._start, strict=True):
                parameter.copy_(start)

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def softened_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of softened logits (samples, classes), in float32, scaled back by the squared temperature."""
    ours = F.log_softmax(student.float() / TEMPERATURE, dim=1)
    theirs = F.log_softmax(teacher.float() / TEMPERATURE, dim=1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * TEMPERATURE**2


def starting_student(subject: Subject, recipe: Recipe, data: Images, folder: Path) -> ir.Model:
    """The teacher with untrained candidates in it, shaped on the same training images as ND's."""
    parts = subject.partition()
    first = data.training(recipe.holdout).blocks.holdout
    last = min(data.store.samples, first + common.shaping_samples())
    store = capture(
        parts.model,
        common.boundary(parts.distillable),
        lambda: data.feeds(first, last),
        folder,
        samples=last - first,
        settings=CaptureSettings(device=pick_device(recipe.device)),
    )
    students = _candidates(parts, store, recipe)
    store.remove()
    if not students:
        raise UsageError(f"{subject.model}: no neighbourhood could be shrunk, so there is no student to train")
    return splice(load(subject.model), students)


def _logits(path: Path, model: ir.Model) -> str:
    """Name of the one output, which must be class scores."""
    outputs = model.graph.outputs
    if len(outputs) != 1 or outputs[0].shape is None or len(outputs[0].shape) != 2:
        raise ModelError(f"{path}: expected one output of logits (samples, classes), found {list(map(str, outputs))}")
    producer = outputs[0].producer()
    if producer is not None and producer.op_type in {"Softmax", "LogSoftmax"}:
        raise ModelError(f"{path}: ends in {producer.op_type}; expected logits as output, export it without")
    return outputs[0].name or ""


def _candidates(parts: Partition, store: ActivationStore, recipe: Recipe) -> dict[str, ir.Model]:
    students = {}
    for neighbourhood in parts.distillable:
        try:
            part = Slice.of(parts, neighbourhood, store, recipe.holdout)
            students[neighbourhood.name] = part.candidate(recipe, 0).model
        except ShrinkError as error:
            Notes().note(f"{neighbourhood.name} is kept: {error}")
    return students


def _convert(model: ir.Model, data: SliceSamples, target: str, tolerance: float) -> TorchSlice:
    rows = data.arrays(0, _PROBE)
    inputs = [rows[name] for name in data.inputs]
    expected = make_session(model).run([target], dict(zip(data.inputs, inputs, strict=True)))[0]
    try:
        module = to_torch(model)
        check_parity(module, inputs, expected, tolerance)
    except (ConversionError, ParityError) as error:
        raise UsageError(f"KD cannot be measured: the whole student, in torch, {error}") from error
    return module


def _schedule(progress: float) -> float:
    """Linear warm-up, then half a cosine down to zero at progress 1, as a factor of the peak."""
    return min(1.0, (progress + 1e-3) / WARMUP) * 0.5 * (1.0 + math.cos(math.pi * progress))
