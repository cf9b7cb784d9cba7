"""Width reduction: a part `k` of each channel group is kept, the rest is cut out of the weights."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from ndonnx.errors import ShrinkError
from ndonnx.partition import ChannelGroups
from ndonnx.partition.removable import kept_width
from ndonnx.students.base import WHOLE, Candidate, Spelled, StudentMethod, TeacherSlice, spelled_number
from ndonnx.students.cutting import choose_units, shrink
from ndonnx.students.importance import measure_readers
from ndonnx.students.reconstruction import refit_consumers
from ndonnx.students.starting import Init, randomise
from ndonnx.students.zeroing import check_by_zeroing


@dataclass(frozen=True)
class Width(StudentMethod):
    """Keep the part `keep` of every group's units; see `Recipe` for the fields."""

    name = "width"
    usage = "width K (K above 0 and at most 1)"

    keep: float
    round_to: int | None = None
    init: Init = "least-squares"

    @classmethod
    def spelled(cls, words: Sequence[str]) -> Spelled | None:
        """Words that are one multiplier."""
        return spelled_number(cls.name, words)

    def _build(self, teacher: TeacherSlice, rng: np.random.Generator) -> Candidate:
        spec = f"width k={self.keep:g}"
        if (reason := self.needs_more(teacher.groups)) is not None:
            raise ShrinkError(f"{teacher.name}: {reason}")
        if self.keep == 1:
            return Candidate(spec, teacher.model.clone())
        measured = measure_readers(teacher) if teacher.groups.groups else None
        kept = choose_units(teacher, self.keep, self.round_to, measured)
        shrunk = shrink(teacher.model, teacher.groups, kept)
        check_by_zeroing(teacher, shrunk, kept)
        if self.init == "least-squares":
            shrunk = refit_consumers(teacher, shrunk, kept, measured)
        elif self.init == "random":
            shrunk = randomise(shrunk, rng, teacher.held)
        return Candidate(spec, shrunk)

    def needs_more(self, groups: ChannelGroups) -> str | None:
        """A width inside."""
        return None if groups.groups else "no width to shrink inside"

    def shape_key(self, groups: ChannelGroups) -> Hashable | None:
        """The kept widths: how many units stay decides which do, and all that is drawn and fitted."""
        if not groups.groups:
            return None
        kept = tuple(kept_width(group.width, self.keep, self.round_to) for group in groups.groups)
        return WHOLE if kept == tuple(group.width for group in groups.groups) else (self.init, kept)
