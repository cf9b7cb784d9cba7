"""Which samples of a source do what: the one draw from which every stage takes its rows.

Training learns from some rows, choices are made on others (the best state of a training, a candidate of a search),
a promise is tested on rows that no choice has seen, and what is shown at the end comes from rows that nothing has
seen. All are drawn at random by number, so that a source sorted by class gives every set all classes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ndonnx.data.source import DataSource
from ndonnx.data.subset import Subset
from ndonnx.errors import DataError

Rows = NDArray[np.int64]
"""Numbers of samples, from 0 in the order of the source."""

MOST_COMPARED = 2000
"""Most samples of the comparison at the end: its standard error is then about a point at worst."""
_COMPARED, _CONFIRMED, _CHOSEN_ON = 0.1, 0.2, 0.1
"""Parts of the rows that the comparison, a promise and the choices of a search get where rows are scarce."""
_COUNTING_BATCH = 64


@dataclass(frozen=True)
class Split:
    """Disjoint rows of one source, in the order in which they were drawn."""

    source: DataSource
    holdout: float
    """Part of the samples of a training that chooses its best state."""
    training: Rows
    """Gradient steps and closed forms."""
    validation: Rows
    """Everything that is chosen by measuring: first the rows by which trainings choose their best states, then those
    that only a search has."""
    confirmation: Rows
    """A promised drop is tested on these alone; empty where none is promised."""
    comparison: Rows
    """What is told of a finished student without other data; nothing else reads them."""
    available: int
    """Most samples that a training can have, those that choose its best state among them."""

    def held(self, samples: int) -> int:
        """How many of the samples of a training choose its best state: at least one, and one is left to train on."""
        return min(held_out(samples, self.holdout), len(self.validation))

    def to_train(self, samples: int, held: int | None = None) -> Subset:
        """The samples of a training, at most so many: first those that choose its best state, then those it learns
        from. A smaller training has the first of each.

        Args:
            samples: in all.
            held: how many of them choose the best state, as far as there are. None: `held(samples)`.
        """
        samples = min(samples, self.available)
        choosing = self.validation[: self.held(samples) if held is None else held]
        return self._subset(choosing, self.training[: samples - len(choosing)])

    def to_fit(self, samples: int) -> Subset:
        """Samples of the training alone, for closed forms that choose nothing."""
        return self._subset(self.training[:samples])

    def to_choose(self) -> Subset:
        """The samples on which a search measures candidates and students to choose among them."""
        return self._subset(self.validation)

    def to_confirm(self) -> Subset:
        """The samples on which a promised drop is tested."""
        return self._subset(self.confirmation)

    def to_compare(self) -> Subset:
        """The samples of the comparison at the end."""
        return self._subset(self.comparison)

    def key(self) -> str:
        """What depends on any of the rows depends on this."""
        digest = hashlib.blake2b(self.source.fingerprint().encode(), digest_size=16)
        for rows in (self.training, self.validation, self.confirmation, self.comparison):
            digest.update(f"{len(rows)}:".encode() + rows.astype("<i8").tobytes())
        return digest.hexdigest()

    def _subset(self, *blocks: Rows) -> Subset:
        # A source that only runs from its start would be passed through once for every row out of order.
        in_order = self.source.length is None
        return Subset(self.source, np.concatenate([np.sort(rows) if in_order else rows for rows in blocks]))


def held_out(samples: int, part: float) -> int:
    """How many of a training's samples choose its best state, were there no other limit."""
    return min(max(1, round(part * samples)), samples - 1)


def draw(
    source: DataSource,
    samples: int,
    *,
    seed: int,
    holdout: float,
    choosing: int = 0,
    confirming: int = 0,
    made_up: int | None = None,
) -> Split:
    """Draw the rows of every stage.

    Where there are rows enough, a training of `samples` has the same rows whatever else is held out. Where there
    are not, a tenth of them is compared on, up to a fifth confirms, up to a tenth more chooses, and training has the
    rest. A source that cannot tell its length is counted, as far as rows are wanted; its rows are numbered as they
    arrive.

    Args:
        source: all the data there are.
        samples: as many as a training is to have, at most.
        seed: of the draw.
        holdout: part of a training's samples that chooses its best state.
        choosing: samples that a search wants to choose by, beyond those of the trainings.
        confirming: samples on which a promise is to be tested.
        made_up: the first so many samples of `source` are for training; the others, which are as good as drawn,
            are for what is held out. None: drawn at random.

    Raises:
        DataError: there are fewer rows than stages.
    """
    length = source.length
    if length is None:
        wanted = samples + choosing + confirming + MOST_COMPARED
        length = sum(len(batch) for batch in source.batches(_COUNTING_BATCH, samples=wanted))
    compared = compared_of(length if made_up is None else made_up)
    if length < 3 + bool(confirming):
        raise DataError(_too_few(source.spec, length, bool(confirming)))
    if made_up is None:
        order = np.random.default_rng(seed).permutation(length).astype(np.int64)
        choosing, confirming = _sizes(length, samples, compared, choosing, confirming)
    else:
        order = np.arange(length, dtype=np.int64)
    ends = np.cumsum([length - compared - confirming - choosing, choosing, confirming])
    rest, chosen_on, confirmation, comparison = np.split(order, ends)
    held = held_out(min(samples, len(rest)), holdout)
    validation = np.concatenate([rest[:held], chosen_on])
    return Split(source, holdout, rest[held:], validation, confirmation, comparison, len(rest))


def compared_of(length: int) -> int:
    """How many of so many samples are for the comparison at the end."""
    return min(MOST_COMPARED, max(1, int(_COMPARED * length)))


def _sizes(length: int, samples: int, compared: int, choosing: int, confirming: int) -> tuple[int, int]:
    """How many rows choose and confirm: what is wanted where training leaves that over, else as near as can be."""
    least = min(choosing, int(_CHOSEN_ON * length)), min(confirming, max(1, int(_CONFIRMED * length)))
    lacking = choosing - least[0], confirming - least[1]
    spare = max(0, length - samples - compared - sum(least))
    part = min(1.0, spare / sum(lacking)) if sum(lacking) else 0.0
    return least[0] + int(part * lacking[0]), least[1] + int(part * lacking[1])


def _too_few(spec: str, length: int, confirming: bool) -> str:
    stages = "one to train on, one to choose the best state by, one to compare on"
    promise = ", one to test the promised drop on" if confirming else ""
    return (
        f"{spec}: holds {length} samples; at least {3 + confirming} are needed: {stages}{promise}; better some hundreds"
    )
