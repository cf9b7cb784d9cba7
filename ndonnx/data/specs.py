"""What a model wants to be fed, what it is fed, and the checks between the two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ndonnx.errors import DataError, ModelError
from ndonnx.graph.dataflow import real_inputs

ELEMENT_TYPES: dict[str, type[np.generic]] = {
    "tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(double)": np.float64,
    "tensor(int8)": np.int8, "tensor(int16)": np.int16, "tensor(int32)": np.int32, "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8, "tensor(uint16)": np.uint16, "tensor(uint32)": np.uint32, "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
}  # fmt: skip
"""onnxruntime's names of the element types that numpy can feed."""

_FAMILIES = {"f": "float", "i": "integer", "u": "integer"}


@dataclass(frozen=True)
class InputSpec:
    """An input of the model, with the samples along the first axis, wherever the model has them."""

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int | str | None, ...]
    """Sizes with the samples first: an int is fixed, a str or None dynamic."""
    axis: int = 0
    """Axis along which the model has the samples."""
    sampled: bool = False
    """Whether the user says that there are samples along that axis."""
    sizes: tuple[int, ...] | None = None
    """Sizes of made-up values with the samples first, where the user binds them."""
    low: float | None = None
    """Smallest made-up value."""
    high: float | None = None
    """Largest made-up value."""

    @property
    def is_float(self) -> bool:
        return self.dtype.kind == "f"

    @property
    def native(self) -> tuple[int | str | None, ...]:
        """Sizes as the model declares them."""
        return (*self.shape[1 : self.axis + 1], *self.shape[:1], *self.shape[self.axis + 1 :])

    def along(self, axis: int) -> InputSpec:
        """This input as the model declares it, with the samples along this axis."""

        def first(sizes: tuple[Any, ...]) -> tuple[Any, ...]:
            return (*sizes[axis : axis + 1], *sizes[:axis], *sizes[axis + 1 :])

        bound = None if self.sizes is None else first(self.sizes)
        return replace(self, shape=first(self.shape), axis=axis, sizes=bound)

    def __str__(self) -> str:
        where = f" (samples along axis {self.axis})" if self.axis else ""
        return f"'{self.name}' {describe(self.dtype, self.native)}{where}"


@dataclass(frozen=True)
class Batch:
    """Samples ready for the model: every input has shape (n, ...); labels are int64 (n,)."""

    inputs: dict[str, NDArray[Any]]
    labels: NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))


class Session(Protocol):
    """What is used of an onnxruntime session here; this room does not need onnxruntime itself."""

    def get_inputs(self) -> Sequence[Any]:
        """The inputs to feed, each with a name, a type and a shape."""


def input_specs(session: Session) -> list[InputSpec]:
    """The inputs that have to be fed; initializers listed as inputs are not among them.

    Raises:
        ModelError: an input is no tensor that numpy can hold.
    """
    specs = []
    for entry in session.get_inputs():
        if entry.type not in ELEMENT_TYPES:
            raise ModelError(
                f"input '{entry.name}': {entry.type} cannot be fed; expected one of {', '.join(ELEMENT_TYPES)}"
            )
        # Exporters write 0 or -1 for a dimension they do not know.
        shape = tuple(size if not isinstance(size, int) or size > 0 else None for size in entry.shape)
        specs.append(InputSpec(entry.name, np.dtype(ELEMENT_TYPES[entry.type]), shape))
    return specs


def declared_specs(graph: ir.Graph) -> list[InputSpec]:
    """The inputs of a loaded model, but for those that hold no numbers."""
    specs = []
    for value in real_inputs(graph):
        if value.shape is None or value.dtype is None or value.dtype is ir.DataType.STRING:
            continue
        sizes = (size if isinstance(size, int) else size.value for size in value.shape)
        shape = tuple(size if not isinstance(size, int) or size > 0 else None for size in sizes)
        specs.append(InputSpec(value.name or "", np.dtype(value.dtype.numpy()), shape))
    return specs


def describe(dtype: np.dtype[np.generic], shape: tuple[int | str | None, ...]) -> str:
    """`float32 [N, 3, 32, 32]`; a dynamic dimension without a name is `?`."""
    return f"{dtype.name} [{', '.join('?' if size is None else str(size) for size in shape)}]"


def fits(shape: tuple[int, ...], spec: InputSpec) -> bool:
    """Whether an array (n, ...) has the model's rank and fixed dimensions; the sample axis is free."""
    pairs = list(zip(shape, spec.shape, strict=False))[1:]
    return len(shape) == len(spec.shape) and all(found == want for found, want in pairs if isinstance(want, int))


def castable(found: np.dtype[np.generic], spec: InputSpec) -> bool:
    """Whether the element type changes in width only: float to float, integer to integer."""
    family = _FAMILIES.get(found.kind)
    return found == spec.dtype or (family is not None and family == _FAMILIES.get(spec.dtype.kind))


def cast(array: NDArray[np.generic], spec: InputSpec, where: str, rows: NDArray[np.int64]) -> NDArray[np.generic]:
    """The samples `rows` of a source in the model's element type, contiguous.

    Raises:
        DataError: an integer does not fit, or a float is NaN or Inf; names the sample.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is reported by sample below
        result = np.ascontiguousarray(array, dtype=spec.dtype)
    if result.dtype.kind in "iu" and not np.can_cast(array.dtype, result.dtype):
        _refuse_samples(result != array, rows, where, f"a value does not fit into {spec.dtype.name}")
    if spec.is_float:
        _refuse_samples(~np.isfinite(result), rows, where, "NaN or Inf, expected finite values")
    return result


def check_labels(labels: NDArray[np.generic], count: int, where: str) -> NDArray[np.int64]:
    """Labels as int64 (n,), one for each of `count` samples.

    Raises:
        DataError: they are not integers, not a vector, or not as many as the samples.
    """
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError(f"{where}: expected integer labels [n], found {describe(labels.dtype, labels.shape)}")
    if len(labels) != count:
        raise DataError(f"{where}: expected a label for each of {count} samples, found {len(labels)} labels")
    return labels.astype(np.int64)


def _refuse_samples(wrong: NDArray[np.bool_], rows: NDArray[np.int64], where: str, what: str) -> None:
    if wrong.any():
        first = rows[wrong.reshape(len(wrong), -1).any(axis=1)].min()
        raise DataError(f"{where}: sample {first}: {what}; mend or drop that sample")
