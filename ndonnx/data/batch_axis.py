"""Which axis of each input holds the samples, read off the shapes that a model declares."""

from __future__ import annotations

import re
from collections.abc import Sequence

Size = int | str | None
"""A size as a model declares it: fixed, open under a name, or open without one."""
Shape = Sequence[Size]

_BATCH, _SHORT, _NEUTRAL, _LENGTH = range(4)
_SAYS_BATCH = re.compile(r"[\w.-]*batch[\w.-]*", re.IGNORECASE)
_SHORT_NAMES = frozenset({"n", "b", "bs", "bsz"})
_LENGTHS = frozenset(
    {"t", "l", "h", "w", "height", "width", "time", "times", "frame", "frames", "step", "steps", "seq", "seqlen"}
    | {"sequence", "len", "length", "token", "tokens", "point", "points"}
)


def sample_axes(shapes: Sequence[Shape]) -> list[int]:
    """Axis of the samples in each input, as far as the shapes tell: the first where nothing speaks for another.

    It is another one where that alone bears the size that the batch has.
    """
    batch = _batch([shape for shape in shapes if shape])
    return [_axis(shape, batch) for shape in shapes]


def _axis(shape: Shape, batch: Size) -> int:
    sizes = list(shape)
    return sizes.index(batch) if sizes.count(batch) == 1 and sizes[0] != batch else 0


def _batch(shapes: Sequence[Shape]) -> Size:
    """The size that is the number of samples.

    An open one that is called so, wherever it stands; else 1 where the inputs have only that in common; else the
    open one that is the first axis of an input; else the fixed one that all inputs have.
    """
    names = [
        (_meaning(size), axis, size)
        for shape in shapes
        for axis, size in enumerate(shape)
        if isinstance(size, str) and _may_be_batch(size, axis, shape)
    ]
    meaning, _, name = min(names, key=lambda found: found[:2], default=(_LENGTH, 0, None))
    if meaning <= _SHORT:
        return name
    if _one_sample_at_a_time(shapes):
        return 1
    if name is not None or any(shape[0] is None for shape in shapes):
        return name
    return next((shape[0] for shape in shapes if all(shape[0] in other for other in shapes)), None)


def _meaning(name: str) -> int:
    """How clearly the name of an open size says that it is the number of samples; the smaller the clearer."""
    if _SAYS_BATCH.fullmatch(name):
        return _BATCH
    if name.lower() in _SHORT_NAMES:
        return _SHORT
    return _NEUTRAL if _LENGTHS.isdisjoint(re.findall("[a-z]+", name.lower())) else _LENGTH


def _may_be_batch(name: str, axis: int, shape: Shape) -> bool:
    """Behind the first axis only a name that is clear counts: `batch`, or `N` where the first size is open too."""
    meaning = _meaning(name)
    return axis == 0 or meaning == _BATCH or (meaning == _SHORT and not isinstance(shape[0], int))


def _one_sample_at_a_time(shapes: Sequence[Shape]) -> bool:
    """Whether a batch of 1 is fixed behind an open first axis: of a sequence, or beside an input without open sizes."""
    large = [shape for shape in shapes if len(shape) > 1]
    if not large or not all(list(shape).count(1) == 1 for shape in large):
        return False
    open_ = [shape[0] for shape in large if not isinstance(shape[0], int)]
    lengths = [size for size in open_ if size is not None and _meaning(size) == _LENGTH]
    return bool(open_) and (len(lengths) == len(open_) or any(_is_fixed(shape) for shape in large))


def _is_fixed(shape: Shape) -> bool:
    return all(isinstance(size, int) for size in shape)
