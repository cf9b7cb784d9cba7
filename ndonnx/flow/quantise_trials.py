"""Quantised students of one float student: made, and measured as a whole beside it."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from ndonnx.assemble.quantise import Mode, Scheme, prepared, quantised, rounded
from ndonnx.assemble.quantise_biases import Shifts, correctable, corrected, with_shifts
from ndonnx.assemble.quantise_numbers import LARGEST, Weights
from ndonnx.assemble.quantise_ranges import Histogram, measure_ranges
from ndonnx.convert import Grid, write_back
from ndonnx.data.subset import Subset
from ndonnx.errors import ModelError, SliceError
from ndonnx.flow.run import Run
from ndonnx.graph.costs import constant_of, is_weight
from ndonnx.graph.save import serialise
from ndonnx.metrics.evaluation import Evaluation
from ndonnx.metrics.latency import benchmark
from ndonnx.runtime.machine import usable_cores
from ndonnx.teacher.batches import read_batch, whole_batches
from ndonnx.teacher.sessions import OrtError

CALIBRATION_SAMPLES = 512
"""Most samples by which ranges are measured: what a percentile leaves out is then some thousands of numbers."""
FEW_SAMPLES = 256
"""Samples by which ranges are compared, and pieces put in order."""
_CORRECTED_AT_ONCE = 16
"""Samples of a batch by which biases are corrected: of all layers the outputs are in memory at once."""
_TIMED_SECONDS = 1.0
"""Of timed runs of one comparison, about."""
_MOST_ROUNDS, _LEAST_ROUNDS = 100, 10
_UNDISTURBED = 0.1
"""Quantile of the times of a student that counts: whatever else the machine does makes runs longer, none shorter."""
REFUSED: tuple[type[Exception], ...] = (SliceError, ModelError, *OrtError)
"""What ends one way to quantise a student, and no other."""


@dataclass
class Trials:
    """Makes and measures quantised students of one float student."""

    run: Run
    student: ir.Model
    evaluate: Callable[[ir.Model, int | None], Evaluation]
    """Measures a student on the rows that choose, or on so many of them."""
    float_found: Evaluation | None
    """What the float student came to on them; None where nothing can be measured."""
    deadline: float | None = None
    """Reading of `time.perf_counter` from which nothing more is tried."""
    _prepared: dict[Mode, ir.Model] = field(default_factory=dict)
    _weights: dict[Mode, Weights] = field(default_factory=lambda: defaultdict(Weights))
    _histograms: dict[Mode, dict[str, Histogram]] = field(default_factory=dict)

    @property
    def is_late(self) -> bool:
        """Whether there is no time for another trial."""
        return self.deadline is not None and time.perf_counter() > self.deadline

    @property
    def float_loss(self) -> float:
        """Loss of the float student; 0 where a metric of the user's own is what counts, of which it is the standard."""
        found = self.float_found
        return 0.0 if found is None or found.metric is not None else found.loss

    def base(self, mode: Mode) -> ir.Model:
        """The float student as this mode wants it.

        Raises:
            SliceError: it cannot be had.
        """
        if mode not in self._prepared:
            self._prepared[mode] = prepared(self.student, mode)
        return self._prepared[mode]

    def model(self, scheme: Scheme, kept: Collection[str] = (), shifts: Shifts = MappingProxyType({})) -> ir.Model:
        """The student quantised by a scheme, with these nodes in float, and these shifts of its biases.

        Raises:
            SliceError: it cannot be had.
            ModelError, OrtError: onnxruntime fails on the float student.
        """
        base = self.base(scheme.mode)
        ranges = None if scheme.mode == "dynamic" else self._ranges(scheme.mode, base)
        shifted = with_shifts(base, shifts) if shifts else base
        return quantised(shifted, scheme, ranges, kept, self._weights[scheme.mode])

    def rounded(self, scheme: Scheme, kept: Collection[str], shifts: Shifts) -> tuple[ir.Model, Grid]:
        """The student with floats that rounds its values as a static scheme does, and the grid of its weights.

        Raises:
            ModelError, OrtError: onnxruntime fails on the float student.
        """
        base = self.base(scheme.mode)
        model, axes = rounded(with_shifts(base, shifts), scheme, self._ranges(scheme.mode, base), kept)
        return model, Grid(axes, LARGEST[scheme.narrow])

    def with_weights(self, scheme: Scheme, kept: Collection[str], shifts: Shifts, trained: ir.Model) -> ir.Model:
        """The student quantised by a static scheme, with the weights that a model of `rounded` has come to."""
        base = self.base(scheme.mode)
        shifted, held = with_shifts(base, shifts), trained.graph.initializers
        weights = [name for name, value in shifted.graph.initializers.items() if is_weight(value)]
        found = {name: tensor.numpy() for name in weights if (tensor := constant_of(held[name])) is not None}
        return quantised(write_back(shifted, found), scheme, self._ranges(scheme.mode, base), kept)

    def correction(self, scheme: Scheme, kept: Collection[str], model: ir.Model) -> tuple[Shifts, float] | None:
        """Shifts of the biases of a student quantised so that lower its loss most, with that; None where none do.

        Each step of the correction is kept or not by the whole student on the rows that choose.

        Args:
            scheme: how it is quantised.
            kept: names of the nodes that are in float.
            model: the student without the correction.

        Raises:
            ModelError, OrtError: onnxruntime fails on a student.
        """
        base = self.base(scheme.mode)
        layers = correctable(base, kept) if scheme.mode == "static" and self.float_found is not None else []
        if not layers:
            return None
        best: Shifts | None = None
        least = self.loss(model)
        source = calibration(self.run)
        size = min(read_batch(source), _CORRECTED_AT_ONCE)
        for shifts in corrected(
            base,
            lambda shifts: self.model(scheme, kept, shifts),
            layers,
            lambda: whole_batches(source, size, samples=FEW_SAMPLES),
            interface=self.run.parts.interface,
            threads=usable_cores(),
        ):
            if self.is_late:
                break
            if (loss := self.loss(self.model(scheme, kept, shifts))) < least:
                best, least = shifts, loss
        return None if best is None else (best, least)

    def _ranges(self, mode: Mode, base: ir.Model) -> Mapping[str, Histogram]:
        if mode not in self._histograms:
            source = calibration(self.run)
            self.run.progress.stage("calibrate", source.length, "samples")
            batches = whole_batches(source, read_batch(source))
            fed = self.run.parts.interface.applied(base)
            self._histograms[mode] = measure_ranges(fed, batches, threads=usable_cores())
        return self._histograms[mode]

    def loss(self, model: ir.Model, samples: int | None = None) -> float:
        """How far a student's answers are from the teacher's on the rows that choose; inf where they are not finite.

        By a metric of the user's own, how much less it is than the float student's.

        Args:
            model: the student.
            samples: so many of the rows; None for all.
        """
        if self.float_found is None:
            return 0.0
        found = self.evaluate(model, samples)
        if found.metric is not None and self.float_found.metric is not None:
            return self.float_found.metric - found.metric
        return found.loss if math.isfinite(found.loss) else math.inf

    def times(self, models: Mapping[str, ir.Model]) -> dict[str, float]:
        """Latency of students for one sample, as parts of the float student's; all timed in turn."""
        batch = next(whole_batches(self.run.split.to_choose(), 1, samples=1))
        feeds = self.run.parts.interface.feeds(batch)
        entries = {"": self.student, **models}
        first = benchmark(entries, feeds, rounds=3, warmup=2)
        turn = sum(found.p50_ms for found in first.values()) / 1000
        rounds = max(_LEAST_ROUNDS, min(_MOST_ROUNDS, int(_TIMED_SECONDS / max(turn, 1e-6))))
        found = {name: each.times_ms for name, each in benchmark(entries, feeds, rounds=rounds).items()}
        fast = {name: float(np.quantile(times, _UNDISTURBED)) for name, times in found.items()}
        return {name: fast[name] / fast[""] for name in models}

    def size(self, model: ir.Model) -> float:
        """Bytes of a student's file, as a part of the float student's."""
        return len(serialise(model)) / self.bytes

    @cached_property
    def bytes(self) -> int:
        """Bytes of the float student's file."""
        return len(serialise(self.student))


def calibration(run: Run) -> Subset:
    """The samples by which ranges are measured: of the training, so that no choice is made on them."""
    return run.split.to_fit(run.schedule.stage_samples(CALIBRATION_SAMPLES))
