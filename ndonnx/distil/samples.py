"""Captured activations of one slice as training batches: a memory map in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ndonnx.errors import TrainingError
from ndonnx.teacher import ActivationStore

_RELEASE_EVERY = 64 * 2**20
"""Bytes read from the memory map after which its pages are given back."""


@dataclass(frozen=True)
class Blocks:
    """Rows of the store: the first `holdout` choose the best state, the others train."""

    samples: int
    holdout: int

    @classmethod
    def split(cls, samples: int, part: float) -> Blocks:
        """Set at least one sample aside, and leave at least one to train on."""
        return cls(samples, min(max(1, round(part * samples)), samples - 1))


class SliceSamples:
    """Inputs and target of one slice, read from the store in batches."""

    def __init__(self, store: ActivationStore, inputs: Sequence[str], target: str, holdout: float) -> None:
        for name in (*inputs, target):
            if name in store.unstorable:
                raise TrainingError(f"value '{name}' cannot be captured: {store.unstorable[name]}")
            if name in store.nonfinite:
                raise TrainingError(f"the teacher's activation '{name}' holds NaN or Inf on this data")
        self._store = store
        self.inputs = tuple(inputs)
        self.target = target
        self._maps = {name: store.array(name) for name in (*inputs, target)}
        self.blocks = Blocks.split(store.samples, holdout)
        self._read = 0

    def arrays(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows of all values, floats as float32."""
        return {name: _float32(self._rows(name, slice(start, stop))) for name in self._maps}

    def training_rows(self, count: int) -> dict[str, np.ndarray]:
        """The first `count` training rows (fewer if there are fewer), floats as float32."""
        start = self.blocks.holdout
        return self.arrays(start, min(self.blocks.samples, start + count))

    def is_constant(self, name: str) -> bool:
        """Whether one array serves all samples."""
        return self._store.is_constant(name)

    def batch(self, rows: np.ndarray) -> tuple[list[Tensor], Tensor]:
        """Inputs and target of these rows, in the type in which they are stored."""
        tensors = [torch.from_numpy(np.ascontiguousarray(self._rows(name, rows))) for name in self._maps]
        self._read += sum(tensor.nbytes for tensor in tensors)
        if self._read > _RELEASE_EVERY:
            self._store.release()
            self._read = 0
        return tensors[:-1], tensors[-1]

    def bytes_per_sample(self) -> int:
        """Bytes of one sample of all values as float32."""
        return sum(int(np.prod(self._maps[name].shape[1:])) * 4 for name in self._maps)

    def _rows(self, name: str, rows: slice | np.ndarray) -> np.ndarray:
        if self._store.is_constant(name):
            return np.array(self._maps[name])  # torch warns of arrays that cannot be written
        return np.asarray(self._maps[name][rows])


def _float32(array: np.ndarray) -> np.ndarray:
    return np.array(array, dtype=np.float32) if array.dtype.kind == "f" else np.array(array)
