"""Captured activations as training batches: a memory map in, tensors out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
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


@dataclass(frozen=True)
class Source:
    """Where a value of the training is read: a store and the value's name in it."""

    store: ActivationStore
    name: str


class SliceSamples:
    """Inputs of a module and the values that its answers are compared with, read in batches."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        inputs: Sequence[str],
        holdout: float,
        arrays: Mapping[str, npt.NDArray[np.generic]] | None = None,
    ) -> None:
        """Open the values.

        Args:
            sources: where each value is stored, by the name it goes by here.
            inputs: those that the module reads, in its order.
            holdout: part of the samples set aside.
            arrays: further values that are not in a store (labels), with as many rows.

        Raises:
            TrainingError: a value cannot be trained on.
        """
        for name, source in sources.items():
            _check(source, is_context=name in inputs[1:], is_entry=name == inputs[0])
        self._stores = {id(source.store): source.store for source in sources.values()}
        self._constant = {name for name, source in sources.items() if source.store.is_constant(source.name)}
        self.inputs = tuple(inputs)
        self._maps: dict[str, npt.NDArray[np.generic]] = {
            name: source.store.array(source.name) for name, source in sources.items()
        }
        self._maps.update(arrays or {})
        self.blocks = Blocks.split(min(store.samples for store in self._stores.values()), holdout)
        self._read = 0

    @classmethod
    def of(cls, store: ActivationStore, inputs: Sequence[str], values: Sequence[str], holdout: float) -> SliceSamples:
        """All from one store."""
        return cls({name: Source(store, name) for name in (*inputs, *values)}, inputs, holdout)

    @property
    def names(self) -> tuple[str, ...]:
        """All values."""
        return tuple(self._maps)

    def arrays(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows of all values, floats as float32."""
        return {name: _float32(self._rows(name, slice(start, stop))) for name in self._maps}

    def training_rows(self, count: int) -> dict[str, np.ndarray]:
        """The first `count` training rows (fewer if there are fewer), floats as float32."""
        start = self.blocks.holdout
        return self.arrays(start, min(self.blocks.samples, start + count))

    def is_constant(self, name: str) -> bool:
        """Whether one array serves all samples."""
        return name in self._constant

    def shapes(self, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """The shapes that values have for one sample."""
        whole = {name: self._maps[name].shape for name in names}
        return {name: shape if self.is_constant(name) else (1, *shape[1:]) for name, shape in whole.items()}

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        """All values of these rows, in the types in which they are stored."""
        tensors = {name: torch.from_numpy(np.ascontiguousarray(self._rows(name, rows))) for name in self._maps}
        self._read += sum(tensor.nbytes for tensor in tensors.values())
        if self._read > _RELEASE_EVERY:
            for store in self._stores.values():
                store.release()
            self._read = 0
        return tensors

    def bytes_per_sample(self) -> int:
        """Bytes of one sample of all values as float32."""
        return sum(int(np.prod(values.shape[1:])) * 4 for values in self._maps.values())

    def _rows(self, name: str, rows: slice | np.ndarray) -> np.ndarray:
        if self.is_constant(name):
            return np.array(self._maps[name])  # torch warns of arrays that cannot be written
        return np.asarray(self._maps[name][rows])


def _check(source: Source, *, is_context: bool, is_entry: bool) -> None:
    name, store = source.name, source.store
    if name in store.unstorable:
        raise TrainingError(f"value '{name}' cannot be captured: {store.unstorable[name]}")
    if is_entry and store.is_constant(name):
        raise TrainingError(f"value '{name}' cannot be captured: the samples do not lie along its first axis")
    # An attention mask may well hold -Inf; should NaN come of it, the gate refuses the slice's answer.
    if name in store.nonfinite and not is_context:
        raise TrainingError(f"the teacher's activation '{name}' holds NaN or Inf on this data")


def _float32(array: np.ndarray) -> np.ndarray:
    return np.array(array, dtype=np.float32) if array.dtype.kind == "f" else np.array(array)
