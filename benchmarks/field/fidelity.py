"""What a model is for, as a number: how near a student's outputs are to the teacher's in the task's own measure.

Each measure takes the outputs of both on the same rows of the test set and gives one value a row, of which the mean
(or, where said, the worst clip) is told. Higher is better, but for silero's error of the speech probability.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Outputs = Mapping[str, NDArray[np.floating]]
Rows = NDArray[np.floating]

_INK = 0.3
"""Probability above which a detector takes a pixel for text, as its users do."""


def same_class(ours: Rows, theirs: Rows) -> Rows:
    """1 where both have the same largest score, else 0; scores are (n, classes)."""
    return np.asarray(ours.argmax(-1) == theirs.argmax(-1), dtype=float)


def cosine(ours: Rows, theirs: Rows) -> Rows:
    """Cosine of the angle between embeddings (n, d)."""
    product = (ours * theirs).sum(-1)
    return np.asarray(product / (np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1) + 1e-12))


def overlap(ours: Rows, theirs: Rows) -> Rows:
    """Intersection over union of the thresholded maps (n, 1, height, width); 1 where both are empty."""
    a, b = (maps.reshape(len(maps), -1) > _INK for maps in (ours, theirs))
    both, either = (a & b).sum(1), (a | b).sum(1)
    return np.where(either, both / np.maximum(either, 1), 1.0)


def read(probabilities: Rows, characters: Sequence[str]) -> list[str]:
    """Lines of text in probabilities (n, positions, characters): the best path, repeats joined, blanks (0) left out."""
    best = probabilities.argmax(-1)
    first = np.ones_like(best, dtype=bool)
    first[:, 1:] = best[:, 1:] != best[:, :-1]
    kept = first & (best > 0)
    return ["".join(characters[c] for c in row[keep]) for row, keep in zip(best, kept, strict=True)]


def same_lines(ours: Sequence[str], theirs: Sequence[str]) -> Rows:
    """1 where both read the same line, else 0."""
    return np.array([a == b for a, b in zip(ours, theirs, strict=True)], dtype=float)
