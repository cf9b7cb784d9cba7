"""Which weights are zero: patterns of zeros, and what holds weights to them while they are trained."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from ndonnx.graph.costs import constant_of
from ndonnx.graph.storage.sparse import is_sparse
from ndonnx.partition.layers import weight_slot
from ndonnx.students.base import Constraint

Mask = npt.NDArray[np.bool_]
"""In the shape of a weight: True where it may differ from zero."""

_MANY = 0.1
"""Part of a weight's elements that are zero in a sparse one: a few may be so by chance."""
_GROUPED = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True)
class Pattern:
    """So many zeros in a weight: a part of all, or `zeros` in every `group` along the axis that is summed over."""

    part: float = 0.0
    """Part of a weight's elements that is zero, where there is no group."""
    zeros: int = 0
    group: int = 0
    """Consecutive weights of a group (NVIDIA's 2:4 has 4); 0: zeros lie anywhere."""

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read `0.7` or `2:4`, as `Recipe.sparsity` has checked it."""
        found = _GROUPED.fullmatch(text)
        return cls(zeros=int(found[1]), group=int(found[2])) if found else cls(part=float(text))

    def count(self, weight: LinearWeight) -> int:
        """Zeros that a weight gets; weights left over at the end of an axis, too few for a group, get none."""
        if not self.group:
            return round(self.part * weight.size)
        summed = weight.shape[weight.axis] // weight.blocks
        return self.zeros * (summed // self.group) * (weight.size // summed)

    def mask(self, magnitude: Tensor, weight: LinearWeight, zeros: int | None = None) -> Tensor:
        """Mark what stays: all but the smallest.

        Args:
            magnitude: what elements are compared by, in the shape of the weight.
            weight: its layout.
            zeros: how many go, of those that the pattern lets go; None: `count`.
        """
        zeros = self.count(weight) if zeros is None else zeros
        if self.group:
            magnitude = torch.where(self._may_go(magnitude, weight), magnitude, torch.inf)
        mask = torch.ones(magnitude.numel(), dtype=torch.bool, device=magnitude.device)
        mask[magnitude.reshape(-1).topk(zeros, largest=False, sorted=False).indices] = False
        return mask.reshape(magnitude.shape)

    def _may_go(self, magnitude: Tensor, weight: LinearWeight) -> Tensor:
        """The smallest of every whole group."""
        rows = magnitude.movedim(weight.axis, -1)
        summed = rows.shape[-1] // weight.blocks
        whole = summed // self.group * self.group
        blocks = rows.reshape(*rows.shape[:-1], weight.blocks, summed)
        groups = blocks[..., :whole].reshape(*blocks.shape[:-1], whole // self.group, self.group)
        chosen = torch.zeros_like(groups, dtype=torch.bool)
        chosen.scatter_(-1, groups.topk(self.zeros, dim=-1, largest=False, sorted=False).indices, True)
        goes = torch.zeros_like(blocks, dtype=torch.bool)
        goes[..., :whole] = chosen.reshape(*blocks.shape[:-1], whole)
        return goes.reshape(rows.shape).movedim(-1, weight.axis)

    def __str__(self) -> str:
        return f"{self.zeros}:{self.group}" if self.group else f"{self.part:g}"


@dataclass(frozen=True)
class LinearWeight:
    """The constant weight of a linear operator."""

    name: str
    shape: tuple[int, ...]
    axis: int
    """The axis that is summed over; of a convolution the input channels."""
    blocks: int = 1
    """Parts of that axis that are summed over on their own: the groups of a `ConvTranspose`."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))


def linear_weights(nodes: Sequence[ir.Node] | ir.Graph) -> list[LinearWeight]:
    """Weights of the linear operators in order, each once; of one that is read along two axes, the first counts."""
    found: dict[str, LinearWeight] = {}
    for node in nodes:
        slot = weight_slot(node)
        if slot is not None:
            weight = _layout(node, slot)
            found.setdefault(weight.name, weight)
    return list(found.values())


def _layout(node: ir.Node, slot: int) -> LinearWeight:
    value = node.inputs[slot]
    tensor = constant_of(value)
    assert value is not None and tensor is not None
    shape = tuple(int(size) for size in tensor.shape.numpy())
    match node.op_type:
        case "Conv":
            axis = 1
        case "ConvTranspose":
            return LinearWeight(value.name or "", shape, 0, _integer(node, "group", 1))
        case "Gemm":
            axis = 1 - slot if not _integer(node, "transB" if slot else "transA", 0) else slot
        case _:
            axis = len(shape) - (2 if slot else 1)
    return LinearWeight(value.name or "", shape, axis)


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else default


def ramp(done: float, final: float, *, first: float = 0.0, begin: float = 0.0, end: float = 1.0) -> float:
    """Sparsity along a training: s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3 (Zhu & Gupta 2017, equation 1).

    Args:
        done: t, the part of the training that is over.
        final: s_f, reached at `end` and held from there on.
        first: s_i, until `begin`.
        begin: t0.
        end: t0 + n dt.
    """
    passed = min(1.0, max(0.0, (done - begin) / (end - begin)))
    return final + (first - final) * (1.0 - passed) ** 3


@dataclass
class GrowingZeros(Constraint):
    """The smallest weights become zero, more and more of them along the polynomial ramp, then no more change.

    From `settled` on the same weights are zero; a `done` smaller than the one before begins anew.
    """

    pattern: Pattern
    weights: tuple[LinearWeight, ...]
    settled: float
    first: float = 0.0
    """Part of the zeros that are there from the first step."""
    _held: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _done: float = field(default=0.0, init=False, repr=False)

    def held(self) -> Collection[str]:
        return [weight.name for weight in self.weights]

    def impose(self, weights: Mapping[str, Tensor], done: float) -> None:
        if done < self._done:
            self._held.clear()
        self._done = done
        if not self._held:
            masks = self._masks(weights, ramp(done, 1.0, first=self.first, end=self.settled))
            if done >= self.settled:
                self._held = masks
        else:
            masks = self._held
        for name, mask in masks.items():
            weights[name].mul_(mask)

    def _masks(self, weights: Mapping[str, Tensor], part: float) -> dict[str, Tensor]:
        return {
            layout.name: self.pattern.mask(weights[layout.name].abs(), layout, round(part * self.pattern.count(layout)))
            for layout in self.weights
        }


@dataclass
class FixedZeros(Constraint):
    """The same weights are zero from the first step to the last."""

    masks: Mapping[str, Mask]
    settled: float = 0.0
    _moved: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def held(self) -> Collection[str]:
        return [name for name, mask in self.masks.items() if mask.mean() <= 1 - _MANY]

    def impose(self, weights: Mapping[str, Tensor], done: float) -> None:
        del done
        for name, mask in self.masks.items():
            held = self._moved.get(name)
            if held is None or held.device != weights[name].device:
                held = self._moved[name] = torch.from_numpy(mask).to(weights[name].device)
            weights[name].mul_(held)


def zeros_of(model: ir.Model) -> FixedZeros:
    """The zeros that the linear weights of a model have now, as something to hold them to.

    For whatever changes the weights of a sparse student later. Weights without a zero are left out.
    """
    masks = {weight.name: _array(model, weight.name) != 0 for weight in linear_weights(model.graph)}
    return FixedZeros({name: mask for name, mask in masks.items() if not mask.all()})


def zeros_of_sparse(model: ir.Model) -> FixedZeros | None:
    """The zeros of a slice's sparse weights as something to hold a student to; None where it has none.

    Zeros that a teacher's file leaves out would otherwise become weights that the student's file has to hold.
    """
    sparse = [w.name for w in linear_weights(model.graph) if is_sparse(model.graph.initializers[w.name])]
    return FixedZeros({name: _array(model, name) != 0 for name in sparse}) if sparse else None


def _array(model: ir.Model, name: str) -> npt.NDArray[np.generic]:
    tensor = constant_of(model.graph.initializers[name])
    assert tensor is not None
    return tensor.numpy()
