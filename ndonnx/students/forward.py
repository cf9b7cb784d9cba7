"""Values of a slice in topological order, each computed from earlier ones, so that together they cost one pass."""

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
"""Bytes of values, at most, that are kept for the next ones; the oldest go first."""


class Forward:
    """A slice, or a candidate of it, on its samples. What was asked for may be changed behind the last value only.

    Earlier values are kept too: behind a residual block, the next value is computed from the block's own parts, not
    from the inputs all over again.
    """

    def __init__(self, teacher: TeacherSlice, model: ir.Model) -> None:
        self.teacher, self.model = teacher, model
        self._kept: dict[str, Array] = {}

    def next(self, name: str) -> tuple[Callable[[Arrays], dict[str, Array]], Arrays]:
        """What computes a value, and what that is fed with: earlier values, and inputs.

        Raises:
            ShrinkError: onnxruntime does not open it.
        """
        teacher, samples = self.teacher, self.teacher.samples
        if name in self._kept:
            return dict, {name: self._kept[name]}
        values = ir.convenience.create_value_mapping(self.model.graph, include_subgraphs=False)
        known = {**samples, **self._kept}
        nodes, read = nodes_between([values[name]], set(known))
        feeds = {value.name or "": known[value.name or ""] for value in read}
        alone = not self._kept or slice_batch(self.model) is not None or not nodes or feeds.keys() <= teacher.constants
        if alone:
            return teacher.probe(self.model, [name]), samples
        return teacher.probe(extract(self.model, nodes, read, [values[name]]), [name]), feeds

    def forget(self) -> None:
        """Compute the next value from the inputs: the model was changed before the last one."""
        self._kept = {}

    def keep(self, name: str, pieces: list[Array], counts: list[int]) -> None:
        """Remember a value, given batch by batch, for the next ones."""
        rows = [len(piece) if piece.ndim else -1 for piece in pieces]
        self._kept.pop(name, None)
        if rows == counts and sum(piece.nbytes for piece in pieces) <= _KEPT_BYTES:
            self._kept[name] = np.concatenate(pieces)
        while sum(array.nbytes for array in self._kept.values()) > _KEPT_BYTES:
            del self._kept[next(iter(self._kept))]


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
