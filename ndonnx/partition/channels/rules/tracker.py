"""What is known about the channels of a slice, and the helpers that rules share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

from ndonnx.graph.costs import constant_of, dims
from ndonnx.graph.dataflow import reads
from ndonnx.graph.ties import origin_of, transposed
from ndonnx.partition.channels.labels import FROZEN, Labels, LabelSets

FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}

Role = Literal["in", "out"]
"""Whether an axis of a weight is summed over (`in`) or carried on (`out`)."""


@dataclass(eq=False)
class WeightLabels:
    """Labelled axes of one constant, and the nodes whose rule labelled it."""

    axes: dict[int, Labels] = field(default_factory=dict)
    roles: dict[int, Role] = field(default_factory=dict)
    readers: set[ir.Node] = field(default_factory=set)


@dataclass(frozen=True, eq=False)
class Edit:
    """A number held by a node that follows from how many channels stay along an axis."""

    node: ir.Node
    slot: str | int
    """Name of an attribute, or position of an input."""
    position: int | None
    """Index of the number in a list; None for a single number."""
    labels: Labels
    axis: int
    """The number is the length of this axis of the labels ..."""
    stop: int | None = None
    """... or, where given, of its part before this position."""
    follows: tuple[Labels, int] | None = None
    """Labels, and the axis of them, whose length the graph computes the number from: it needs no edit if they are
    the same channels."""


@dataclass(frozen=True, eq=False)
class Folded:
    """A value some of whose neighbouring axes are joined in one that is dynamic."""

    labels: Labels
    """As they are with these axes apart."""
    first: int
    """The first of the joined axes, and where they are joined."""
    count: int
    before: tuple[Labels, tuple[int | str, ...]] | None = None
    """Labels and lengths of the axes of the value that was reshaped, where these are not the axes apart."""

    @property
    def rank(self) -> int:
        """Number of axes of the value itself."""
        return self.labels.ndim - self.count + 1

    def apart(self, axis: int) -> range:
        """Axes of the labels that an axis of the value stands for."""
        if axis == self.first:
            return range(axis, axis + self.count)
        return range(axis, axis + 1) if axis < self.first else range(axis + self.count - 1, axis + self.count)


@dataclass(frozen=True, eq=False)
class Statistic:
    """A node that takes a statistic over channels of its first input, and so feels it when some of them go."""

    node: ir.Node
    labels: Labels
    """Channels along the axis, one-dimensional."""
    axis: int
    """Axis of the input, counted from its end (negative)."""
    carries: bool
    """Whether the output has these channels on the same axis (a norm); else they end here (a mean)."""
    stretched: bool = False
    """Whether each channel has a stretch of the axis, of whatever length it has: joined with dynamic axes."""


@dataclass(frozen=True, eq=False)
class Grouping:
    """A node to which channels stand in blocks (heads, groups): whole blocks go, or the same part of each."""

    node: ir.Node
    labels: Labels
    is_coarse: bool = False
    """Whether there are more channels in a block than blocks, so that a part of each is the finer choice."""


@dataclass(eq=False)
class Tracker:
    """What is known so far of a slice's channels."""

    sets: LabelSets = field(default_factory=LabelSets)
    values: dict[ir.Value, Labels] = field(default_factory=dict)
    weights: dict[tuple[ir.Value, ir.Node | None], WeightLabels] = field(default_factory=dict)
    """By the constant. Vectors (biases, scales) by their reader, too: where its channels are not those of another
    reader, it gets a copy. A matrix has the same channels whatever reads it."""
    made: dict[str, Labels] = field(default_factory=dict)
    """Labels by the name of the value in which they were made."""
    folded: dict[ir.Value, Folded] = field(default_factory=dict)
    """Values in which axes with channels are joined with a dynamic one (batch and heads)."""
    edits: list[Edit] = field(default_factory=list)
    by_part: Collection[ir.Node] = frozenset()
    """Nodes to which channels stand in blocks and that lose a part of each; all others lose whole blocks."""
    groupings: list[Grouping] = field(default_factory=list)
    """Blocks of which whole ones go."""
    statistics: list[Statistic] = field(default_factory=list)
    lost: dict[ir.Value, ir.Node | None] = field(default_factory=dict)
    """Values whose channels are followed no longer, and the node that is to blame."""
    contracted: list[Labels] = field(default_factory=list)
    """Labels of axes that a product of two activations sums over: both lose them without another trace."""
    blocks: list[Labels] = field(default_factory=list)
    """Labels that vary along several axes at once: what stays of them must be a rectangle."""

    def labels(self, value: ir.Value | None) -> Labels | None:
        """Labels of an activation; None when it is not followed.

        A lone channel is not: beside other lengths it would be taken for an axis that broadcasts.
        """
        labels = self.values.get(value) if value is not None else None
        return labels if labels is not None and labels.size > 1 else None

    def rows(self, labels: Labels | None, axis: int) -> Labels | None:
        """Labels along an axis; None where they do not vary along it.

        Where they vary along others too, those keep all their positions: only whole rows go.
        """
        if labels is None or not -labels.ndim <= axis < labels.ndim or labels.shape[axis] == 1:
            return None
        return self.unite_across(labels, [other for other in labelled_axes(labels) if other != axis % labels.ndim])

    def unite_across(self, labels: Labels, axes: Iterable[int]) -> Labels:
        """Let channels that differ only in their places on these axes be one; what is left of the labels.

        Returns one-dimensional labels where one axis is left that they vary along.
        """
        left = labels
        for axis in axes:
            first = left.take([0], axis=axis)
            self.sets.unite(left, first)
            left = first
        return left.reshape(-1) if len(labelled_axes(left)) <= 1 else left

    def set(self, value: ir.Value, labels: Labels | None) -> bool:
        """Let a value carry labels (None: it is not followed); always True, as rules return it."""
        if labels is not None:
            self.values[value] = labels
            if sum(size > 1 for size in labels.shape) > 1:
                self.blocks.append(labels)
        return True

    def freeze(self, value: ir.Value | None) -> None:
        """Let all channels of an activation stay."""
        self.sets.freeze(self.labels(value))
        self.freeze_folded(value)

    def freeze_folded(self, value: ir.Value | None) -> None:
        """Let all channels of an activation with joined axes stay."""
        if value is not None and value in self.folded:
            self.sets.freeze(self.folded[value].labels)

    def freeze_reads(self, node: ir.Node) -> None:
        """Let all channels that a node reads stay."""
        for value in reads(node):
            self.freeze(value)

    def freeze_weights(self, node: ir.Node) -> None:
        """Let all labelled axes of the constants that a node reads stay."""
        for value in node.inputs:
            if value is not None:
                self.freeze_weight(origin_of(value), node)

    def freeze_weight(self, weight: ir.Value, reader: ir.Node | None = None) -> None:
        """Let all labelled axes of a matrix stay, or of a vector for one reader; nothing is done where none are."""
        found = self.weights.get((weight, reader if is_vector(weight) else None))
        for labels in found.axes.values() if found is not None else ():
            self.sets.freeze(labels)

    def fits(self, value: ir.Value) -> bool:
        """Whether a value's labels, if it has any, have its rank and the lengths of its axes."""
        labels = self.values.get(value)
        if labels is None or value.shape is None:
            return True
        if labels.ndim != len(value.shape):
            return False
        lengths = zip(labels.shape, value.shape, strict=True)
        return all(length in (1, size) or not isinstance(size, int) for length, size in lengths)

    def not_followed(self, node: ir.Node) -> list[ir.Value]:
        """Activations that a node reads and whose channels are not known, those that were lost first."""
        computed = (v for v in reads(node) if constant_of(v) is None and (v.dtype is None or v.dtype in FLOATS))
        found = [value for value in computed if self.labels(value) is None and value not in self.folded]
        return sorted(found, key=lambda value: value not in self.lost)

    def hand_on_lost(self, node: ir.Node) -> None:
        """Remember of outputs that are not followed which node is to blame, if an input was lost by one."""
        before = next((value for value in reads(node) if value in self.lost), None)
        if before is not None:
            self.lost.update((v, self.lost[before]) for v in node.outputs if self.labels(v) is None)

    def forget(self, value: ir.Value) -> None:
        """Follow a value no longer; the channels that it may have been given stay."""
        self.lost[value] = self.sets.cause  # type: ignore[assignment]
        for labels in (self.values.pop(value, None), self.made.get(value.name or "")):
            self.sets.freeze(labels)
        if (folded := self.folded.pop(value, None)) is not None:
            self.sets.freeze(folded.labels)

    def make(self, value: ir.Value, count: int) -> Labels:
        """New channels that `value` is the first to carry."""
        labels = self.sets.fresh(count)
        self.made[value.name or ""] = labels
        return labels

    def label_weight(self, node: ir.Node, value: ir.Value | None, axis: int, labels: Labels | None, role: Role) -> None:
        """Say that along `axis` of a constant stand these channels (None: channels that stay)."""
        if value is None or (shape := dims(value)) is None:
            return
        axis %= len(shape)
        if (found := transposed(value)) is not None:
            value, axis = found[0], found[1][axis]
            shape = dims(value) or shape
        weight = self.weights.setdefault((value, node if is_vector(value) else None), WeightLabels())
        weight.readers.add(node)
        if labels is None:
            labels = np.full(shape[axis], FROZEN, dtype=np.int64)
        if axis in weight.axes:
            self.sets.unite(weight.axes[axis], labels)
            weight.roles[axis] = "in" if "in" in (role, weight.roles[axis]) else "out"
        else:
            weight.axes[axis], weight.roles[axis] = labels, role


Rule = Callable[[Tracker, ir.Node], bool]
"""Returns False when the case is not understood; nothing may have been labelled by then."""


def is_vector(value: ir.Value) -> bool:
    """Whether at most one axis of a constant is longer than 1."""
    return sum(size > 1 for size in dims(value) or ()) <= 1


def labelled_axes(labels: Labels) -> list[int]:
    """Axes along which labels vary."""
    return [axis for axis, size in enumerate(labels.shape) if size > 1]


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute, or its default."""
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else default


def numbers(node: ir.Node, name: str, position: int | None) -> list[int] | None:
    """Integers that stand in an attribute (older opsets) or in a constant input (newer ones)."""
    attribute = node.attributes.get(name)
    if attribute is not None:
        return [int(number) for number in attribute.as_ints()]
    tensor = constant_of(value) if position is not None and (value := input_at(node, position)) is not None else None
    return [int(number) for number in tensor.numpy().reshape(-1)] if tensor is not None else None


def input_at(node: ir.Node, position: int) -> ir.Value | None:
    """An input by position; None where it is left out."""
    return node.inputs[position] if position < len(node.inputs) else None


def extent(value: ir.Value, axis: int) -> int | None:
    """Length of an axis counted from the end: 1 where broadcasting adds it, None where it is unknown."""
    shape = dims(value)
    if shape is None or -axis > len(shape):
        return 1 if shape is not None else None
    length = value.shape[axis] if value.shape is not None else shape[axis]
    return length if isinstance(length, int) else None


def are_constant(values: Iterable[ir.Value | None]) -> bool:
    """Whether none of the values is computed, but for transposes of weights; an input that is left out is not."""
    return all(value is None or is_constant(value) for value in values)


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is a constant, or a weight transposed, along whose axes channels can be followed."""
    return value is not None and (constant_of(value) is not None or transposed(value) is not None)


def rank_of(value: ir.Value | None) -> int | None:
    """Number of axes; None where it is unknown."""
    shape = dims(value)
    return len(shape) if shape is not None else None
