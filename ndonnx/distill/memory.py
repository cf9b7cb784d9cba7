"""How many jobs a run may train at a time, and how much each may hold, within its memory budget.

An estimate from the recipe, the machine and the partition alone, so that a continued run decides the same. What a job
takes besides its weights is bounded by constants, whatever the model; the budget decides how many jobs there are at a
time, and where one alone is too much, how many samples a step holds at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from ndonnx.config.recipe import Recipe
from ndonnx.distill.steps import THREAD_BYTES
from ndonnx.graph.costs import constant_of
from ndonnx.partition import Partition
from ndonnx.runtime.machine import memory_bytes
from ndonnx.students.least_squares import MOST_FEATURES, features_of, shape_of

_MEGABYTE = 10**6
_PROCESS = 600 * _MEGABYTE
"""What a process takes with its libraries; 500 MB were measured with torch 2.13 and onnxruntime 1.31."""
_ROWS = 300 * _MEGABYTE
"""Samples that a student is shaped on and compared on, and rows of its closed forms."""
_TIMES_WEIGHTS = 12
"""Copies of a slice's weights: as a model, in torch, in sessions, gradients, moments, the best state."""
_TIMES_MOMENTS = 5
"""Matrices of features by features in a closed form."""
_LEAST_THREAD = 32 * _MEGABYTE
"""Bytes of activations with which a thread can still train."""
_PART = 4
"""One part of so many of the machine's memory is the budget by default."""


@dataclass(frozen=True)
class MemoryPlan:
    """Estimates in bytes."""

    budget: int
    main: int
    """Bytes of the main process."""
    slice: int
    """Bytes of the largest job of a neighbourhood, but for what its steps hold."""
    whole: int
    """Bytes of a training of the whole model, but for what its steps hold."""
    cores: int

    @classmethod
    def of(cls, recipe: Recipe, parts: Partition, cores: int) -> MemoryPlan:
        """Estimate a run.

        Args:
            recipe: its `memory_budget`; None takes a quarter of the machine's memory.
            parts: the teacher.
            cores: that the run may use.
        """
        budget = recipe.memory_budget if recipe.memory_budget is not None else memory_bytes() // _PART
        weights = _weight_bytes(parts.model.graph)
        slices = max((_slice_bytes(n.nodes) for n in parts.distillable), default=0)
        base = _PROCESS + _ROWS
        return cls(budget, _PROCESS + 2 * weights, base + slices, base + _TIMES_WEIGHTS * weights, cores)

    def workers(self, wanted: int) -> int:
        """Jobs of neighbourhoods at a time: as many as wanted, or fewer where memory is scarce."""
        fitting = (n for n in range(wanted, 1, -1) if self.main + n * (self.slice + self._least(n)) <= self.budget)
        return next(fitting, 1)

    def step(self, workers: int) -> int | None:
        """Bytes that the steps of one of so many jobs may hold; None where the usual ones fit."""
        return self._step((self.budget - self.main) // workers - self.slice, self._threads(workers))

    def whole_step(self) -> int | None:
        """Bytes that the steps of a training of the whole model may hold; None where the usual ones fit."""
        return self._step(self.budget - self.main - self.whole, self.cores)

    @property
    def least(self) -> int:
        """What a run takes at least: one job at a time."""
        return self.main + max(self.slice + self._least(1), self.whole + _LEAST_THREAD * self.cores)

    def _step(self, left: int, threads: int) -> int | None:
        usual = THREAD_BYTES * threads
        return None if left >= usual else max(left, _LEAST_THREAD * threads)

    def _least(self, workers: int) -> int:
        return _LEAST_THREAD * self._threads(workers)

    def _threads(self, workers: int) -> int:
        return max(1, self.cores // workers)


def _weight_bytes(graph: ir.Graph) -> int:
    tensors = (value.const_value for value in graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _slice_bytes(nodes: Iterable[ir.Node]) -> int:
    nodes = list(nodes)
    tensors = {value: constant_of(value) for node in nodes for value in node.inputs if value is not None}
    weights = sum(tensor.nbytes for tensor in tensors.values() if tensor is not None)
    widths = [features_of(node, shape_of(node)) for node in nodes if _is_linear(node)]
    features = max((width for width in widths if width <= MOST_FEATURES), default=0)
    return _TIMES_WEIGHTS * weights + _TIMES_MOMENTS * 8 * features**2


def _is_linear(node: ir.Node) -> bool:
    if node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.inputs) < 2:
        return False
    tensor = constant_of(node.inputs[1])
    return tensor is not None and len(tensor.shape) >= 2
