"""Samples of a slice without their padding, where the slice answers the same then."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ndonnx.distill.gate import answer, free_sizes, open_slice
from ndonnx.distill.padding import is_mask, is_same, lengths_of
from ndonnx.distill.samples import SliceSamples
from ndonnx.errors import ParityError


def cut_where_same(
    slice_: ir.Model, samples: SliceSamples, mask: npt.NDArray[np.generic], threads: int = 1
) -> SliceSamples:
    """The samples without their padding; as they are where the slice needs it.

    Args:
        slice_: what is fed with the samples; not changed.
        samples: all its inputs, samples first.
        mask: ones where a position is filled, (samples, positions); where a row has zeros before ones, nothing is cut.
        threads: for onnxruntime.
    """
    if not is_mask(mask):  # it was one on the rows by which it was found
        return samples
    lengths, full = lengths_of(mask), mask.shape[1]
    whole, short, few = samples.tried(lengths, full)
    if not len(few):
        return samples
    probes = [{name: arrays[name] for name in samples.inputs} for arrays in (whole, short)]
    varying = [name for name in samples.inputs if not samples.is_constant(name)]
    try:
        opened = free_sizes(open_slice(slice_.clone(), varying, probes[0], threads), probes)
        expected, found = (answer(opened, probe, threads) for probe in probes)
    except ParityError:  # the gate tells why, of the whole samples
        return samples
    return samples.without_padding(lengths, full) if is_same(expected, found, few, full) else samples
