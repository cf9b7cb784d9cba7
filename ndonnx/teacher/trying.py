"""How many samples a model takes at a time, found by trying: a graph may hold its batch in its own numbers.

A `Reshape` to a fixed size behind a batch that the inputs leave open makes a run of several samples fail, or, worse,
makes each answer depend on the others. Two samples together must be answered as each of them alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ndonnx.data import DataSource, InputSpec
from ndonnx.data.inputs import interface_of
from ndonnx.graph.interface import Interface
from ndonnx.teacher.sessions import OrtError

Array = NDArray[Any]

_SAME = 1e-2
"""Largest difference, relative to the answer's scale, that other samples may make: what quantisation by the range of a
whole batch makes is less. Where there is more, one sample at a time is right, only slower."""


def hold_if_mixed(session: ort.InferenceSession, source: DataSource) -> bool:
    """Let a source give one sample at a time where the model does not keep several apart; whether it is so.

    Args:
        session: of the model as its file has it.
        source: whose inputs leave the batch open; of others nothing is tried.
    """
    pair = next(iter(source.batches(2, samples=2)), None)
    if source.fixed_batch is not None or pair is None or len(pair) != 2:
        return False
    if not mixes(session, interface_of(source.inputs, source.fixed), pair.inputs):
        return False
    source.inputs = held(source.inputs)
    return True


def held(inputs: Sequence[InputSpec]) -> tuple[InputSpec, ...]:
    """The inputs with one sample at a time."""
    return tuple(replace(spec, shape=(1, *spec.shape[1:])) for spec in inputs)


def mixes(session: ort.InferenceSession, interface: Interface, pair: Mapping[str, Array]) -> bool:
    """Whether a model fails on two samples at once, or answers them otherwise than each alone, where that works.

    Outputs whose sizes depend on the contents, and those that compare the samples of a batch with each other, say
    nothing; nor does a model that answers differently each time.

    Args:
        session: of the model as its file has it.
        interface: how it is fed.
        pair: two samples of each input, samples first.
    """
    one, other = (_answers(session, interface, pair, slice(row, row + 1)) for row in (0, 1))
    both = _answers(session, interface, pair, slice(0, 2))
    if one is None or other is None:
        return False
    if both is None:
        return True
    if not any(_differs(*arrays) for arrays in zip(both, one, other, strict=True)):
        return False
    again = _answers(session, interface, pair, slice(0, 2))
    return again is not None and all(_same(a, b) for a, b in zip(both, again, strict=True))


def _answers(
    session: ort.InferenceSession, interface: Interface, pair: Mapping[str, Array], rows: slice
) -> list[Array] | None:
    """The float outputs, or all arrays where there are none; None where onnxruntime fails."""
    try:
        found = session.run(None, interface.feeds({name: array[rows] for name, array in pair.items()}))
    except OrtError:
        return None
    arrays = [value for value in found if isinstance(value, np.ndarray)]
    return [value for value in arrays if value.dtype.kind == "f"] or arrays


def _differs(both: Array, one: Array, other: Array) -> bool:
    """Whether the answer to two samples is not made of the answers to each."""
    if one.shape != other.shape or both.ndim != one.ndim:
        return both.ndim != one.ndim
    grown = [axis for axis in range(both.ndim) if both.shape[axis] != one.shape[axis]]
    if not grown:  # the same for all samples, or a mixture of them
        return not _same(both, one)
    if len(grown) > 1 or both.shape[grown[0]] != 2 * one.shape[grown[0]]:
        return False
    return not all(_same(*arrays) for arrays in zip(np.split(both, 2, grown[0]), (one, other), strict=True))


def _same(found: Array, expected: Array) -> bool:
    if found.shape != expected.shape:
        return False
    if found.dtype.kind != "f":
        return bool(np.array_equal(found, expected))
    known = np.isfinite(expected)
    if not np.array_equal(known, np.isfinite(found)):
        return False
    scale = float(np.abs(expected[known], dtype=np.float64).max(initial=0.0))
    difference = np.abs(found[known].astype(np.float64) - expected[known])
    return float(difference.max(initial=0.0)) <= _SAME * scale
