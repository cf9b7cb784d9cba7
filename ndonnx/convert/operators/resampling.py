"""Converters of operators that read values between the grid points: `Resize`, `Upsample`, `GridSample`.

A resize is linear in the data and separable, so it is one small matrix for each axis that
changes. Coordinates are computed in float32 with onnxruntime's formulas, since a nearest
neighbour hangs on their last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ndonnx.convert.registry import OnnxNode, converts, opset_of
from ndonnx.convert.tables import Numbers, converts_table, from_front, integers

Coordinates = npt.NDArray[np.float32]
_HALF = np.float32(0.5)


def _symmetric(x: Coordinates, scale: np.float32, length: int, resized: int) -> Coordinates:
    adjustment = np.float32(resized) / (scale * np.float32(length))
    return np.float32(length) / 2 * (1 - adjustment) + (x + _HALF) / scale - _HALF


_COORDINATES: dict[str, Callable[[Coordinates, np.float32, int, int], Coordinates]] = {
    "align_corners": lambda x, scale, length, resized: x * np.float32(length - 1) / np.float32(max(resized - 1, 1)),
    "asymmetric": lambda x, scale, length, resized: x / scale,
    "half_pixel": lambda x, scale, length, resized: (x + _HALF) / scale - _HALF,
    "half_pixel_symmetric": _symmetric,
    "pytorch_half_pixel": lambda x, scale, length, resized: (x + _HALF) / scale - _HALF if resized > 1 else x * 0,
    "tf_half_pixel_for_nn": lambda x, scale, length, resized: (x + _HALF) / scale,
}
"""Where in the data each element of the output lies."""

_NEAREST: dict[str, Callable[[Coordinates], Coordinates]] = {
    "ceil": np.ceil,
    "floor": np.floor,
    "round_prefer_ceil": lambda x: np.floor(x + _HALF),
    "round_prefer_floor": lambda x: np.ceil(x - _HALF),
}

_SHAPES = {"linear": (1.0, ["linear", "bilinear", "trilinear"]), "cubic": (2.0, ["", "bicubic", ""])}
"""Reach of the kernel in elements, and torch's names for it in one, two and three dimensions."""


class Interpolation:
    """What `Resize` and `Upsample` do, in every mode but cropping (`tf_crop_and_resize`)."""

    def __init__(self, node: OnnxNode) -> None:
        attributes, opset = node.attributes, opset_of(node)
        old = opset < 11 or node.operation_type == "Upsample"
        self.mode = str(attributes.get("mode", "nearest"))
        self.coordinates = "asymmetric" if old else attributes.get("coordinate_transformation_mode", "half_pixel")
        self.nearest = "" if old else str(attributes.get("nearest_mode", "round_prefer_floor"))
        self.cubic = float(attributes.get("cubic_coeff_a", -0.75))
        self.exclude_outside = bool(attributes.get("exclude_outside", 0))
        self.antialias = bool(attributes.get("antialias", 0))
        self.policy = str(attributes.get("keep_aspect_ratio_policy", "stretch"))
        self.axes = integers(node, "axes")
        self.fixed_scales: list[float] | None = attributes.get("scales")
        self.scales, self.sizes = Numbers(), Numbers()
        self._matrices: dict[tuple[int, int, float], Tensor] = {}
        if self.coordinates not in _COORDINATES:
            raise NotImplementedError(f"{node.operation_type} with coordinates '{self.coordinates}'")

    def __call__(self, data: Tensor, scales: Tensor | None, sizes: Tensor | None) -> Tensor:
        """Resize every axis whose scale is not 1."""
        axes = [from_front(a, data.ndim) for a in self.axes] if self.axes else list(range(data.ndim))
        lengths = [data.shape[axis] for axis in axes]
        targets, factors = self._targets(lengths, scales, sizes)
        changed = [i for i, factor in enumerate(factors) if factor != 1.0 or targets[i] != lengths[i]]
        if all(math.isclose(factors[i] * lengths[i], targets[i], rel_tol=1e-6) for i in changed):
            size = list(data.shape)
            for i in changed:
                size[axes[i]] = targets[i]
            if self._is_torch(data.shape, size):
                return self._fused(data, size[2:])
        for i in changed:
            data = self._along(data, axes[i], targets[i], np.float32(factors[i]))
        return data

    def _targets(
        self, lengths: list[int], scales: Tensor | None, sizes: Tensor | None
    ) -> tuple[list[int], list[float]]:
        """New lengths, and the factors to compute coordinates with."""
        factors = self.fixed_scales or (self.scales(scales) if scales is not None else [])
        if factors:
            return [int(np.float32(n) * np.float32(f)) for n, f in zip(lengths, factors, strict=True)], factors
        assert sizes is not None
        targets = [int(n) for n in self.sizes(sizes)]
        factors = [target / length for target, length in zip(targets, lengths, strict=True)]
        if self.policy != "stretch":
            factor = min(factors) if self.policy == "not_larger" else max(factors)
            return [int(factor * length + 0.5) for length in lengths], [factor] * len(lengths)
        return targets, factors

    def _is_torch(self, old: Sequence[int], new: list[int]) -> bool:
        """Whether torch has a kernel for just this; it is several times faster."""
        if old[:2] != tuple(new[:2]) or not 3 <= len(new) <= 5 or self.antialias or self.exclude_outside:
            return False
        if self.mode == "nearest":
            whole = all(target % length == 0 for length, target in zip(old, new, strict=True))
            return whole and self.coordinates == "asymmetric" and self.nearest in ("floor", "")
        half = self.coordinates == "half_pixel" or (self.coordinates == "pytorch_half_pixel" and min(new[2:]) > 1)
        known = (half or self.coordinates == "align_corners") and bool(_SHAPES[self.mode][1][len(new) - 3])
        return known and (self.mode == "linear" or self.cubic == -0.75)

    def _fused(self, data: Tensor, size: list[int]) -> Tensor:
        if self.mode == "nearest":
            return F.interpolate(data, size, mode="nearest")
        mode = _SHAPES[self.mode][1][data.ndim - 3]
        return F.interpolate(data, size, mode=mode, align_corners=self.coordinates == "align_corners")

    def _along(self, data: Tensor, axis: int, resized: int, scale: np.float32) -> Tensor:
        length = data.shape[axis]
        x = _COORDINATES[self.coordinates](np.arange(resized, dtype=np.float32), scale, length, resized)
        key = (length, resized, float(scale))
        if key not in self._matrices:
            self._matrices[key] = torch.from_numpy(self._matrix(x, float(scale), length))
        matrix = self._matrices[key] = self._matrices[key].to(data.device)
        if self.mode == "nearest":
            return data.index_select(axis, matrix)
        mixed: Tensor = torch.tensordot(data, matrix.to(data.dtype), dims=([axis], [1]))
        return mixed.movedim(-1, axis)

    def _matrix(self, x: Coordinates, scale: float, length: int) -> npt.NDArray[Any]:
        """For nearest neighbours the index, else the weight, of each element of the data (out, in)."""
        if self.mode == "nearest":
            # Before opset 11 elements were cut off going up and, in onnxruntime, rounded up going down.
            mode = self.nearest or ("ceil" if scale < 1 else "floor")
            return _NEAREST[mode](x).clip(0, length - 1).astype(np.int64)
        stretch = min(scale, 1.0) if self.antialias else 1.0
        margin = int(np.ceil(_SHAPES[self.mode][0] / stretch)) + 1
        at = x.astype(np.float64)
        if self.mode == "linear" and not self.antialias:
            at = at.clip(0, length - 1)
        places = np.arange(-margin, length + margin)
        weights = self._kernel((places - at[:, None]) * stretch)
        if self.exclude_outside:
            weights[:, (places < 0) | (places >= length)] = 0
        weights /= weights.sum(1, keepdims=True)
        matrix = np.zeros((len(at), length))
        np.add.at(matrix.T, places.clip(0, length - 1), weights.T)
        return matrix.astype(np.float32)

    def _kernel(self, distance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        d = np.abs(distance)
        a = self.cubic
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        cubic: npt.NDArray[np.float64] = np.where(d <= 1, near, np.where(d < 2, far, 0.0))
        return cubic if self.mode == "cubic" else (1 - d).clip(min=0)


@converts("Resize")
class Resize(nn.Module):
    """`Resize`: inputs (data, scales) in opset 10, (data, roi, scales, sizes) since."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.interpolate = Interpolation(node)
        self.old = opset_of(node) < 11

    def forward(
        self, data: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:
        return self.interpolate(data, roi if self.old else scales, sizes)


@converts("Upsample")
class Upsample(nn.Module):
    """`Upsample`: scales as an attribute (opset 7) or an input (opset 9)."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.interpolate = Interpolation(node)

    def forward(self, data: Tensor, scales: Tensor | None = None) -> Tensor:
        return self.interpolate(data, scales, None)


_GRID_MODES = {"linear": "bilinear", "cubic": "bicubic"}


def _grid_sample(data: Tensor, grid: Tensor, *, mode: str, padding_mode: str, align_corners: int) -> Tensor:
    return F.grid_sample(data, grid, _GRID_MODES.get(mode, mode), padding_mode, bool(align_corners))


@converts("AffineGrid")
class AffineGrid(nn.Module):
    """`AffineGrid` for images and volumes."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.align_corners = bool(node.attributes.get("align_corners", 0))
        self.numbers = Numbers()

    def forward(self, theta: Tensor, size: Tensor) -> Tensor:
        return F.affine_grid(theta, self.numbers(size), self.align_corners)


converts_table(
    {"GridSample": (_grid_sample, {"mode": "linear", "padding_mode": "zeros", "align_corners": 0})},
)
