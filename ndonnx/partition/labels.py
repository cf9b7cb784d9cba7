"""Which channel is which: labels on the axes of every value of a slice.

A value carries an integer array of its own rank in which an axis is either 1 long (not
followed) or as long as the axis itself; equal labels mean the same channel. Moving operators
(Concat, Transpose, Flatten, ...) are applied to the labels as numpy would apply them to the
data, so that a channel is followed wherever it goes. Label 0 is a channel that must stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64]

FROZEN = 0
"""Label of every channel that must stay: on the entry, on the exit, or read in an unknown way."""


@dataclass
class LabelSets:
    """Union-find over labels: labels in one set are removed together or not at all."""

    _parent: list[int] = field(default_factory=lambda: [FROZEN])

    def fresh(self, count: int) -> Labels:
        """`count` new labels, each alone in its set."""
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return np.arange(start, start + count, dtype=np.int64)

    def find(self, label: int) -> int:
        """The representative of a label's set; `FROZEN` represents its own."""
        root = label
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[label] != root:
            self._parent[label], label = root, self._parent[label]
        return root

    def roots(self, labels: Labels) -> Labels:
        """Representatives of an array of labels."""
        parent = self._parent
        found = [up if parent[up := parent[label]] == up else self.find(label) for label in labels.ravel().tolist()]
        return np.array(found, dtype=np.int64).reshape(labels.shape)

    def unite(self, a: Labels, b: Labels) -> None:
        """Put labels that stand at the same (broadcast) place into one set."""
        if a.shape != b.shape:
            a, b = np.broadcast_arrays(a, b)
        for x, y in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True):
            one, other = self.find(x), self.find(y)
            self._parent[max(one, other)] = min(one, other)

    def freeze(self, labels: Labels | None) -> None:
        """Let these channels stay."""
        if labels is not None:
            for label in labels.ravel().tolist():
                self._parent[self.find(label)] = FROZEN


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
