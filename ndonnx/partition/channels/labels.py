"""Which channel is which: labels on the axes of every value of a slice.

A value carries an integer array of its own rank in which an axis is either 1 long (not
followed) or as long as the axis itself; equal labels mean the same channel. Moving operators
(Concat, Transpose, Flatten, ...) are applied to the labels as numpy would apply them to the
data, so that a channel is followed wherever it goes. Label 0 is a channel that must stay.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64]

FROZEN = 0
"""Label of every channel that must stay: on the entry, on the exit, or read in an unknown way."""
MOST_CHANNELS = 2**22
"""Channels of one axis that are followed: no vocabulary has so many, but a damaged model may say anything."""


def check_count(count: int) -> int:
    """The number of channels of an axis.

    Raises:
        ValueError: more than anybody means, and than there is memory to follow.
    """
    if count > MOST_CHANNELS:
        raise ValueError(f"{count} channels are too many to be followed")
    return count


@dataclass
class LabelSets:
    """Union-find over labels: labels in one set are removed together or not at all."""

    cause: Hashable | None = None
    """What the channels that are frozen now are frozen by; None: they reach an end of the slice."""
    _parent: list[int] = field(default_factory=lambda: [FROZEN])
    _frozen: dict[int, Hashable | None] = field(default_factory=lambda: {FROZEN: None})
    """Representatives of the sets that must stay, and why."""

    def fresh(self, count: int) -> Labels:
        """`count` new labels, each alone in its set.

        Raises:
            ValueError: more than `MOST_CHANNELS`.
        """
        start, count = len(self._parent), check_count(count)
        self._parent.extend(range(start, start + count))
        return np.arange(start, start + count, dtype=np.int64)

    def find(self, label: int) -> int:
        """The representative of a label's set; `FROZEN` for every set that must stay."""
        top = self._top(label)
        return FROZEN if top in self._frozen else top

    def roots(self, labels: Labels) -> Labels:
        """Representatives of an array of labels."""
        parent, frozen = self._parent, self._frozen
        tops = [up if parent[up := parent[label]] == up else self._top(label) for label in labels.ravel().tolist()]
        found = [FROZEN if top in frozen else top for top in tops]
        return np.array(found, dtype=np.int64).reshape(labels.shape)

    def unite(self, a: Labels, b: Labels) -> None:
        """Put labels that stand at the same (broadcast) place into one set."""
        if a.shape != b.shape:
            a, b = np.broadcast_arrays(a, b)
        for x, y in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True):
            low, high = sorted((self._top(x), self._top(y)))
            if low == FROZEN:
                self._frozen.setdefault(high, None)
            elif low != high:
                self._parent[high] = low
                if high in self._frozen:
                    self._frozen.setdefault(low, self._frozen.pop(high))

    def freeze(self, labels: Labels | None) -> None:
        """Let these channels stay, because of the present cause."""
        if labels is not None:
            for label in labels.ravel().tolist():
                self._frozen.setdefault(self._top(label), self.cause)

    def why_frozen(self, label: int) -> Hashable | None:
        """What a frozen label was frozen by first; None where it reaches an end of the slice."""
        return self._frozen.get(self._top(label))

    def _top(self, label: int) -> int:
        root = label
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[label] != root:
            self._parent[label], label = root, self._parent[label]
        return root


def axis_labels(labels: Labels | None, axis: int) -> Labels | None:
    """The labels along `axis` when they vary along no other axis, else None."""
    if labels is None or labels.ndim == 0:
        return None
    axis %= labels.ndim
    return labels.reshape(-1) if labels.size == labels.shape[axis] else None


def on_axis(labels: Labels, axis: int, rank: int) -> Labels:
    """One-dimensional labels laid along one axis of a value of this rank."""
    shape = [1] * rank
    shape[axis] = labels.size
    return labels.reshape(shape)
