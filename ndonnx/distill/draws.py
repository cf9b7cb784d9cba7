"""Random numbers of a training, which do not depend on which thread is faster.

Torch has one generator for all threads of a process. Where several work on parts of one batch, each
part has a seed of its own, and what draws for it (noise in the body of a module) reads it here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np

_SEED: ContextVar[int | None] = ContextVar("seed of a part", default=None)


@contextmanager
def seeded(seed: int, part: int) -> Iterator[None]:
    """Within it, `part_seed` of this thread is that of one part of one step.

    Args:
        seed: the training's, from 0.
        part: its number among all parts of all steps, from 0.
    """
    token = _SEED.set(int(np.random.SeedSequence((seed, part)).generate_state(1, np.uint64)[0] >> np.uint64(1)))
    try:
        yield
    finally:
        _SEED.reset(token)


def part_seed() -> int | None:
    """Seed for the part that this thread works on, from 0 to 2**63 - 1; None outside of a training's step."""
    return _SEED.get()
