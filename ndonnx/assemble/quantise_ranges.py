"""The ranges of a model's values, from one sweep over calibration samples, by any of several rules.

Nothing but a histogram of each value stays in memory. Its bins lie evenly around zero and are joined in pairs whenever
a value beyond them is met, so that one pass is enough and the smallest and the largest number are exact.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ndonnx.teacher.probe import BATCH_BYTES, Probe

Rule: TypeAlias = Literal["minmax", "percentile 99.99", "percentile 99.999", "mse"]
"""How the range of a value follows from its histogram: its ends; the part of its numbers that lie inside; or the least
squared error of rounding and clipping together."""
RULES: tuple[Rule, ...] = ("minmax", "percentile 99.999", "percentile 99.99", "mse")
Range: TypeAlias = tuple[float, float]

_BINS = 4096
"""On each side of zero."""
_MOST_COUNTED = 2**20
"""Numbers of a value in one batch that are counted; of more, every so many."""
_MASKS = 1e30
"""Numbers from here on stand for infinity, as masks of attention have them: they are in no range."""
_STEPS = 255
"""Steps between the ends of a range of 8 bits."""
_SHRUNK = np.linspace(1.0, 0.05, 39)
"""Parts of its ends among which the range with the least error is sought."""


class Histogram:
    """How the numbers of one value are distributed."""

    def __init__(self) -> None:
        self.low = math.inf
        """Smallest number; inf where there was none."""
        self.high = -math.inf
        self.counts: NDArray[np.int64] = np.zeros(2 * _BINS, np.int64)
        """Numbers in equal bins from `-reach` to `reach`; those that are exactly 0 are not among them."""
        self.zeros = 0
        self.reach = 0.0
        self._ranges: dict[Rule, Range] = {}

    def add(self, values: NDArray[Any]) -> None:
        """Take in floating-point numbers of any shape; those that are not finite are passed over."""
        flat = values.reshape(-1).astype(np.float64, copy=False)
        flat = flat[np.abs(flat) < _MASKS]
        if not flat.size:
            return
        self._ranges.clear()
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        self._widen(max(abs(self.low), abs(self.high)))
        counted = flat[:: -(-flat.size // _MOST_COUNTED)]
        inside = counted[counted != 0]
        self.zeros += counted.size - inside.size
        if inside.size:
            bins = np.minimum(((inside + self.reach) * (_BINS / self.reach)).astype(np.int64), 2 * _BINS - 1)
            self.counts += np.bincount(bins, minlength=2 * _BINS)

    def _widen(self, largest: float) -> None:
        """Let the bins reach as far as a number, by a power of two."""
        if largest == 0 or largest <= self.reach:
            return
        if not self.reach:
            self.reach = 2.0 ** math.ceil(math.log2(largest))
        while self.reach < largest:
            joined = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.pad(joined, _BINS // 2)
            self.reach *= 2

    def range_by(self, rule: Rule) -> Range:
        """Ends of the range that a rule gives; (0, 0) where nothing was counted."""
        if rule not in self._ranges:
            self._ranges[rule] = self._range_by(rule)
        return self._ranges[rule]

    def _range_by(self, rule: Rule) -> Range:
        if self.low > self.high:
            return 0.0, 0.0
        if rule == "minmax" or not self.counts.any():
            return self.low, self.high
        if rule == "mse":
            return self._least_error()
        return self._percentile(float(rule.split()[1]))

    def _percentile(self, percent: float) -> Range:
        """The range without the outermost numbers, half of them on each side."""
        counts = self.counts.copy()
        counts[_BINS] += self.zeros
        below = np.cumsum(counts) / counts.sum()
        cut = (100 - percent) / 200
        edges = np.linspace(-self.reach, self.reach, 2 * _BINS + 1)
        low = edges[int(np.searchsorted(below, cut, side="right"))]
        high = edges[min(2 * _BINS, int(np.searchsorted(below, 1 - cut)) + 1)]
        return max(self.low, float(low)), min(self.high, float(high))

    def _least_error(self) -> Range:
        """The range with the least sum of squared errors, of numbers inside it (rounded) and outside it (clipped)."""
        centres = (np.arange(2 * _BINS) + 0.5 - _BINS) * (self.reach / _BINS)
        lows, highs = min(self.low, 0.0) * _SHRUNK, max(self.high, 0.0) * _SHRUNK
        below = np.array([float(np.sum(self.counts * np.minimum(centres - low, 0.0) ** 2)) for low in lows])
        above = np.array([float(np.sum(self.counts * np.maximum(centres - high, 0.0) ** 2)) for high in highs])
        steps = (highs[None, :] - lows[:, None]) / _STEPS
        errors = below[:, None] + above[None, :] + self.counts.sum() * steps**2 / 12
        row, column = np.unravel_index(int(np.argmin(errors)), errors.shape)
        return float(lows[row]), float(highs[column])


Histograms: TypeAlias = Mapping[str, Histogram]
"""By the name of the value."""


def float_values(model: ir.Model) -> list[str]:
    """Names of all floating-point values of the main graph that are fed or computed."""
    computed = (value for node in model.graph for value in node.outputs if value.uses() or value.is_graph_output())
    fed = (value for value in model.graph.inputs if not value.is_initializer())
    return [value.name or "" for value in (*fed, *computed) if value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)]


def measure_ranges(
    model: ir.Model,
    batches: Iterable[Mapping[str, NDArray[Any]]],
    *,
    threads: int,
    names: Sequence[str] | None = None,
    constants: Collection[str] = (),
) -> dict[str, Histogram]:
    """Run a model over calibration samples, a bounded number of bytes at a time.

    Args:
        model: takes arrays with the samples first; not changed.
        batches: what it is fed, one sample at a time or as many as it takes; cut into smaller ones here.
        threads: for onnxruntime.
        names: of the values. None: all that are floats.
        constants: names of inputs without a sample axis, which are fed as they are.

    Raises:
        ModelError: onnxruntime refuses the model.
        OrtError: onnxruntime fails.
    """
    names = float_values(model) if names is None else names
    found = {name: Histogram() for name in names}
    probe, fixed, size = Probe(model, names, threads=threads), _is_fixed(model, constants), 1
    for batch in batches:
        rows, start = max(len(array) for name, array in batch.items() if name not in constants), 0
        while start < rows:
            part = slice(start, start + (rows if fixed else size))
            values = probe.run({name: array if name in constants else array[part] for name, array in batch.items()})
            for name, histogram in found.items():
                histogram.add(values[name])
            held = sum(array.nbytes for array in values.values()) // min(size, rows - start)
            start, size = part.stop, max(1, BATCH_BYTES // max(1, held))
    return found


def _is_fixed(model: ir.Model, constants: Collection[str]) -> bool:
    """Whether the model says how many samples it takes at a time."""
    varying = (value for value in _fed(model) if value.name not in constants)
    return any(value.shape is not None and len(value.shape) and isinstance(value.shape[0], int) for value in varying)


def _fed(model: ir.Model) -> list[ir.Value]:
    return [value for value in model.graph.inputs if not value.is_initializer()]
