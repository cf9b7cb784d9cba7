"""Values of a slice in topological order, each computed from the last one, so that together they cost one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ndonnx.graph.working_copy import slice_batch
from ndonnx.partition import extract, nodes_between
from ndonnx.students.base import TeacherSlice
from ndonnx.teacher.probe import Arrays, run_batches

Array = npt.NDArray[np.float32]

_KEPT_BYTES = 128 * 2**20
"""Bytes of the last value, at most: what is larger is not kept, and the next one is computed from the inputs."""


class Forward:
    """A slice, or a candidate of it, on its samples. What was asked for may be changed behind the last value only."""

    def __init__(self, teacher: TeacherSlice, model: ir.Model) -> None:
        self.teacher, self.model = teacher, model
        self._last: dict[str, Array] = {}

    def next(self, name: str) -> tuple[Callable[[Arrays], dict[str, Array]], Arrays]:
        """What computes a value, and what that is fed with: the last value, and inputs.

        Raises:
            ShrinkError: onnxruntime does not open it.
        """
        teacher, samples = self.teacher, self.teacher.samples
        if name in self._last:
            return dict, self._last
        values = ir.convenience.create_value_mapping(self.model.graph, include_subgraphs=False)
        known = {**samples, **self._last}
        nodes, read = nodes_between([values[name]], set(known))
        feeds = {value.name or "": known[value.name or ""] for value in read}
        alone = not self._last or slice_batch(self.model) is not None or not nodes or feeds.keys() <= teacher.constants
        if alone:
            return teacher.probe(self.model, [name]), samples
        return teacher.probe(extract(self.model, nodes, read, [values[name]]), [name]), feeds

    def forget(self) -> None:
        """Compute the next value from the inputs: the model was changed before the last one."""
        self._last = {}

    def keep(self, name: str, pieces: list[Array], counts: list[int]) -> None:
        """Remember a value, given batch by batch, for the next one."""
        rows = [len(piece) if piece.ndim else -1 for piece in pieces]
        fits = rows == counts and sum(piece.nbytes for piece in pieces) <= _KEPT_BYTES
        self._last = {name: np.concatenate(pieces)} if fits else {}


def side_by_side(ours: tuple[Forward, str], theirs: tuple[Forward, str]) -> Iterator[tuple[range, Array, Array]]:
    """A value of each of two models on the same samples, batch after batch.

    Args:
        ours: a model, and the name of a value.
        theirs: the same of another one.

    Yields:
        The samples of the batch, and both values.

    Raises:
        ShrinkError: onnxruntime does not run a model.
    """
    teacher = ours[0].teacher
    runs = [forward.next(name) for forward, name in (ours, theirs)]
    kept: list[list[Array]] = [[], []]
    counts: list[int] = []
    for samples, found in run_batches(runs, teacher.constants, size=slice_batch(teacher.model)):
        values = [found[0][ours[1]], found[1][theirs[1]]]
        counts.append(len(samples))
        for pieces_, value in zip(kept, values, strict=True):
            pieces_.append(value)
        yield samples, values[0], values[1]
    for (forward, name), pieces_ in zip((ours, theirs), kept, strict=True):
        forward.keep(name, pieces_, counts)
