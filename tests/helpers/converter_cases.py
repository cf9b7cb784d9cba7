"""One node at a time: the operators that convert, in the opsets in which they changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

Array = npt.NDArray[Any]
N = "N"
"""The batch: 2 where a case is converted, then 3."""


@dataclass(frozen=True)
class Data:
    """An input that changes from run to run."""

    shape: tuple[int | str, ...]
    make: Callable[[np.random.Generator, tuple[int, ...]], Array]

    def draw(self, batch: int) -> Array:
        shape = tuple(batch if length == N else int(length) for length in self.shape)
        return self.make(np.random.default_rng(batch), shape)


def data(*shape: int | str, low: float = -2, high: float = 2) -> Data:
    return Data(shape, lambda rng, size: rng.uniform(low, high, size).astype(np.float32))


def counts(*shape: int | str, low: int = 0, high: int = 5, dtype: npt.DTypeLike = np.int64) -> Data:
    return Data(shape, lambda rng, size: rng.integers(low, high, size).astype(dtype))


def flags(*shape: int | str) -> Data:
    return Data(shape, lambda rng, size: rng.random(size) < 0.5)


def strange(*shape: int | str) -> Data:
    return Data(shape, lambda rng, size: rng.choice(np.array([np.nan, np.inf, -np.inf, 1, -1], np.float32), size))


def ints(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


def floats(*numbers: float) -> Array:
    return np.array(numbers, np.float32)


def scalar(number: float, dtype: npt.DTypeLike = np.float32) -> Array:
    return np.array(number, dtype)


def weight(*shape: int) -> Array:
    return np.random.default_rng(7).uniform(0.5, 1.5, shape).astype(np.float32)


@dataclass(frozen=True)
class Case:
    """One node; inputs that are arrays are constants, None is an input left out."""

    op: str
    inputs: Sequence[Data | Array | None]
    opsets: Sequence[int]
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    tolerance: float = 1e-5

    @property
    def name(self) -> str:
        told = ",".join(
            f"{key}={value}" for key, value in self.attributes.items() if not isinstance(value, onnx.TensorProto)
        )
        return f"{self.op}({','.join(_describe(entry) for entry in self.inputs)};{told})"


def _describe(entry: Data | Array | None) -> str:
    if entry is None:
        return "-"
    shape = entry.shape if isinstance(entry, Data) else (entry.tolist() if entry.size < 5 else entry.shape)
    return "x".join(map(str, shape)) if isinstance(shape, tuple) else str(shape)


def case(
    op: str,
    *inputs: Data | Array | None,
    opsets: Sequence[int],
    outputs: int = 1,
    tolerance: float = 1e-5,
    **attributes: Any,
) -> Case:
    return Case(op, inputs, opsets, attributes, outputs, tolerance)


IMAGE = data(N, 4, 6, 5)
ROWS = data(N, 3, 4)
POSITIVE = data(N, 3, 4, low=0.2)
OLD_AND_NEW = (9, 13, 18, 24)
REDUCTIONS = ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"]


def reduction_cases() -> Iterator[Case]:
    for name in REDUCTIONS:
        op, x = f"Reduce{name}", data(N, 3, 4, low=0.5)
        old, new = ((9, 11), (13, 24)) if name == "Sum" else ((9, 11, 13), (18, 24))
        yield case(op, x, opsets=old, axes=[1])
        yield case(op, x, opsets=old[-1:], axes=[-1, 1], keepdims=0)
        yield case(op, x, opsets=(*old, *new), keepdims=0)
        yield case(op, x, ints(-1), opsets=new)
        yield case(op, x, ints(2, 1), opsets=new, keepdims=0)
        yield case(op, x, None, opsets=new, noop_with_empty_axes=1)
        yield case(op, x, ints(), opsets=new, noop_with_empty_axes=1)
        yield case(op, x, ints(), opsets=new)
    yield case("ReduceSum", counts(N, 3, dtype=np.int32), ints(1), opsets=(13,))
    yield case("ReduceMax", flags(N, 3), ints(1), opsets=(20,))
    for op in ("ArgMax", "ArgMin"):
        yield case(op, ROWS, opsets=(9, 11, 13, 24), axis=1)
        yield case(op, ROWS, opsets=(9, 13), axis=2, keepdims=0)
        yield case(op, counts(N, 9, high=3, dtype=np.float32), opsets=(12, 13), axis=-1, select_last_index=1)
    yield case("TopK", ROWS, ints(2), opsets=(10, 11, 24), outputs=2)


def shape_cases() -> Iterator[Case]:
    yield case("Reshape", ROWS, ints(0, -1), opsets=(9, 13, 14, 19, 21, 24))
    yield case("Reshape", ROWS, ints(-1, 2, 2, 3), opsets=OLD_AND_NEW)
    yield case("Reshape", data(N, 0, 4), ints(0, 3, 7), opsets=(14, 24), allowzero=1)
    yield case("Squeeze", data(N, 1, 4, 1), opsets=(9, 11), axes=[1, 3])
    yield case("Squeeze", data(N, 1, 4, 1), opsets=(11,), axes=[-1, 1])
    yield case("Squeeze", data(N, 1, 4, 1), ints(-1, 1), opsets=(13, 21, 24))
    yield case("Squeeze", data(N, 1, 4, 1), opsets=OLD_AND_NEW)
    yield case("Unsqueeze", ROWS, opsets=(9, 11), axes=[4, 1])
    yield case("Unsqueeze", ROWS, opsets=(11,), axes=[-1, 1])
    yield case("Unsqueeze", ROWS, ints(-1, 0, 2), opsets=(13, 21, 24))
    for axis in (0, 1, 2, 3):
        yield case("Flatten", ROWS, opsets=(9, 11, 13, 24), axis=axis)
    yield case("Flatten", ROWS, opsets=(11, 24), axis=-1)
    yield case("Expand", data(N, 1, 4), ints(3, 1), opsets=OLD_AND_NEW)
    yield case("Expand", data(N, 1, 4), ints(5, 1, 1, 1), opsets=OLD_AND_NEW)
    yield case("Expand", flags(N, 1), ints(1, 4), opsets=(13,))
    yield case("Split", data(N, 6), opsets=(9, 11, 13), outputs=3, axis=1)
    yield case("Split", data(N, 6), opsets=(9, 11), outputs=2, axis=-1, split=[2, 4])
    yield case("Split", data(N, 6), ints(1, 5), opsets=(13, 18, 24), outputs=2, axis=-1)
    yield case("Split", data(N, 7), opsets=(18, 24), outputs=3, axis=1, num_outputs=3)
    yield case("Split", data(N, 7), ints(7), opsets=(13,), outputs=1, axis=1)
    yield case("Concat", ROWS, data(N, 2, 4), opsets=(9, 11, 13, 24), axis=-2)
    yield case("Transpose", ROWS, opsets=(9, 13, 24))
    yield case("Transpose", ROWS, opsets=(9, 13, 24), perm=[0, 2, 1])
    yield case("Identity", ROWS, opsets=OLD_AND_NEW)
    yield case("Tile", ROWS, ints(1, 2, 3), opsets=OLD_AND_NEW)
    yield case("Shape", ROWS, opsets=OLD_AND_NEW)
    yield case("Shape", ROWS, opsets=(15, 24), start=1, end=-1)
    yield case("Shape", ROWS, opsets=(15, 24), start=-9, end=9)
    yield case("Shape", ROWS, opsets=(15,), start=2, end=1)
    yield case("Size", ROWS, opsets=OLD_AND_NEW)
    yield case(
        "Range", scalar(2.5), Data((), lambda rng, size: scalar(rng.integers(5, 9))), scalar(0.5), opsets=(11, 24)
    )
    yield case("Range", *(scalar(n, np.int32) for n in (9, 0)), Data((), lambda *_: scalar(-2, np.int32)), opsets=(11,))
    yield case("ConstantOfShape", Data((2,), lambda rng, size: rng.integers(1, 5, 2)), opsets=(9, 20, 24))
    for value in (ints(3), floats(0.5), np.array([True])):
        tensor = numpy_helper.from_array(value)
        yield case("ConstantOfShape", Data((2,), lambda rng, size: rng.integers(1, 5, 2)), opsets=(9, 24), value=tensor)
    yield case("EyeLike", data(4, 3), opsets=(9, 22))
    yield case("EyeLike", data(3, 5), opsets=(9, 22), k=-1, dtype=TensorProto.INT64)
    yield case("DepthToSpace", data(N, 8, 3, 2), opsets=(9, 11, 13), blocksize=2)
    yield case("DepthToSpace", data(N, 8, 3, 2), opsets=(11, 13), blocksize=2, mode="CRD")
    yield case("SpaceToDepth", data(N, 3, 4, 6), opsets=(9, 13), blocksize=2)
    yield case("CenterCropPad", data(N, 5, 6), ints(3, 9), opsets=(18,), axes=[1, 2])
    yield case("CenterCropPad", data(N, 5, 6), ints(3, 8, 3), opsets=(18,))
    yield case("Pad", ROWS, opsets=(9,), pads=[0, 1, 0, 0, 0, 2])
    yield case("Pad", IMAGE, ints(0, 0, 1, 2, 0, 0, 0, 1), opsets=(11, 24), mode="edge")
    yield case("Pad", ROWS, ints(0, 1, 0, 0, 0, 2), scalar(0.5), opsets=(11, 13, 18, 24))
    yield case("Pad", ROWS, ints(1, 2), None, ints(-1), opsets=(18, 24), mode="reflect")
    yield case("Slice", data(N, 6), opsets=(9,), starts=[1], ends=[-1], axes=[1])
    yield case("Slice", data(N, 6), ints(-1), ints(-7), ints(1), ints(-2), opsets=(10, 11, 13))


def indexing_cases() -> Iterator[Case]:
    yield case("Gather", data(N, 5, 4), ints(0, -1, 3), opsets=(11, 13, 24), axis=1)
    yield case("Gather", data(N, 5, 4), ints(0, 2), opsets=(9,), axis=2)
    yield case("Gather", data(N, 5, 4), scalar(-2, np.int32), opsets=(11, 13), axis=-1)
    yield case("Gather", weight(5, 4), counts(N, 3), opsets=OLD_AND_NEW)
    yield case("Gather", counts(N, 5), ints(1, 0), opsets=(13,), axis=1)
    yield case("GatherElements", ROWS, counts(N, 3, 4, low=-4, high=4), opsets=(11, 13, 24), axis=2)
    yield case("GatherElements", ROWS, counts(N, 2, 4, high=3, dtype=np.int32), opsets=(13,), axis=-2)
    yield case("GatherND", ROWS, counts(N, 5, 2, low=-2, high=2), opsets=(11, 12, 13))
    yield case("GatherND", ROWS, counts(N, 6, 1, low=-3, high=3), opsets=(12, 13, 24), batch_dims=1)
    yield case("GatherND", data(N, 3, 4, 5), counts(N, 3, 1, high=4), opsets=(12,), batch_dims=2)
    distinct = Data((N, 2, 4), lambda rng, size: np.broadcast_to(np.array([[[2], [-3]]]), size).copy())
    for op, opsets in (("Scatter", (9,)), ("ScatterElements", (11, 13, 16, 18, 24))):
        yield case(op, ROWS, distinct, data(N, 2, 4), opsets=opsets, axis=1)
    yield case("ScatterND", ROWS, np.array([[1, 2], [0, -1]]), data(2, 4), opsets=(11, 13, 16, 18, 24))
    for reduction in ("add", "mul", "max", "min"):
        opsets = (16, 18) if reduction in ("add", "mul") else (18, 24)
        repeated = counts(N, 6, 4, low=-3, high=3)
        yield case("ScatterElements", ROWS, repeated, data(N, 6, 4), opsets=opsets, axis=1, reduction=reduction)
        for depth, rest in ((1, (3, 4)), (2, (4,)), (3, ())):
            index = counts(7, depth, low=-2, high=2)
            yield case("ScatterND", ROWS, index, data(7, *rest), opsets=opsets, reduction=reduction)
    yield case("OneHot", counts(N, 3, low=-7, high=8), scalar(6, np.int64), floats(0.5, 2), opsets=(9, 11, 24))
    yield case("OneHot", counts(N, 3), ints(5), ints(0, 1), opsets=(11,), axis=1)
    yield case("OneHot", counts(N, high=4, dtype=np.int32), scalar(4), floats(0, 1), opsets=(11,), axis=0)
    for upper in (0, 1):
        yield case("Trilu", ROWS, opsets=(14, 24), upper=upper)
        yield case("Trilu", ROWS, scalar(-1, np.int64), opsets=(14,), upper=upper)
    yield case("Compress", ROWS, np.array([True, False, True]), opsets=(9, 11), axis=1)
    yield case("Compress", ROWS, np.array([True, False, True]), opsets=(9, 11))
    yield case("NonZero", counts(N, 5, high=2), opsets=(9, 13))
    yield case("ReverseSequence", data(5, N, 2), counts(N, low=1, high=6), opsets=(10,))
    yield case("ReverseSequence", data(N, 5, 2), counts(N, low=1, high=6), opsets=(10,), batch_axis=0, time_axis=1)


def activation_cases() -> Iterator[Case]:
    wide = data(N, 3, 4, low=-5, high=5)
    table: dict[str, tuple[Sequence[int], dict[str, float]]] = {
        "Celu": ((12,), {"alpha": 0.5}),
        "Elu": ((9, 22), {"alpha": 0.5}),
        "Erf": ((9, 13), {}),
        "HardSigmoid": ((9, 22), {"alpha": 0.3, "beta": 0.4}),
        "HardSwish": ((14, 22), {}),
        "LeakyRelu": ((9, 16), {"alpha": 0.2}),
        "Mish": ((18, 22), {}),
        "Relu": ((9, 13, 14), {}),
        "Selu": ((9, 22), {"alpha": 1.2, "gamma": 0.9}),
        "Shrink": ((9,), {"lambd": 1.0, "bias": 0.3}),
        "Sigmoid": ((9, 13), {}),
        "Softplus": ((9, 22), {}),
        "Softsign": ((9, 22), {}),
        "Swish": ((24,), {"alpha": 1.5}),
        "Tanh": ((9, 13), {}),
        "ThresholdedRelu": ((10, 22), {"alpha": 0.7}),
    }
    for op, (opsets, attributes) in table.items():
        yield case(op, wide, opsets=opsets)
        if attributes:
            yield case(op, wide, opsets=opsets, **attributes)
    for approximate in ("none", "tanh"):
        yield case("Gelu", wide, opsets=(20,), approximate=approximate)
    yield case("PRelu", wide, weight(3, 1), opsets=(9, 16))
    yield case("Clip", wide, opsets=(9, 11, 13))
    yield case("Clip", wide, opsets=(9,), min=-1.0)
    yield case("Clip", wide, opsets=(9,), min=-1.0, max=2.0)
    yield case("Clip", wide, scalar(-1), opsets=(11, 12, 13))
    yield case("Clip", wide, None, scalar(2), opsets=(11, 13, 24))
    yield case("Clip", wide, scalar(0), Data((), lambda rng, size: scalar(rng.uniform(1, 6))), opsets=(11, 13, 24))
    yield case("Clip", counts(N, 5), scalar(1, np.int64), scalar(3, np.int64), opsets=(12, 13))
    for op in ("Softmax", "LogSoftmax", "Hardmax"):
        yield case(op, data(N, 3, 2, 2), opsets=OLD_AND_NEW)
        for axis in (1, 2):
            yield case(op, data(N, 3, 2, 2), opsets=(9, 11, 13), axis=axis)
        yield case(op, data(N, 3, 2, 2), opsets=(11, 13), axis=-2)


def elementwise_cases() -> Iterator[Case]:
    for op in ("Abs", "Atan", "Ceil", "Cos", "Exp", "Floor", "Neg", "Sign", "Sin", "Tan", "Asinh", "Cosh", "Sinh"):
        yield case(op, ROWS, opsets=(9, 24))
    yield case("Round", ROWS, opsets=(11, 24))
    for op in ("Acos", "Asin", "Atanh"):
        yield case(op, data(N, 3, low=-0.9, high=0.9), opsets=(9, 22))
    for op in ("Log", "Reciprocal", "Sqrt"):
        yield case(op, POSITIVE, opsets=(9, 13))
    yield case("Acosh", data(N, 3, low=1.1, high=3), opsets=(9, 22))


def several_inputs_cases() -> Iterator[Case]:
    for op in ("Add", "Div", "Mul", "Sub"):
        yield case(op, ROWS, weight(3, 1), opsets=(9, 13, 14))
        yield case(op, counts(N, 4, low=-9, high=9), counts(4, low=1), opsets=(13,))
    for op in ("Equal", "Greater", "Less"):
        yield case(op, counts(N, 4), counts(N, 1), opsets=(9, 11, 13, 24))
    for op in ("GreaterOrEqual", "LessOrEqual"):
        yield case(op, counts(N, 4), counts(N, 1), opsets=(12, 16))
    for op in ("And", "Or", "Xor"):
        yield case(op, flags(N, 4), flags(N, 1), opsets=(9,))
    yield case("Not", flags(N, 4), opsets=(9,))
    for op in ("Max", "Mean", "Min", "Sum"):
        yield case(op, ROWS, opsets=(9, 13))
        yield case(op, ROWS, data(N, 1, 4), weight(3, 1), opsets=(9, 13))
    yield case("Max", counts(N, 4), counts(1), opsets=(12, 13))
    for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor"):
        yield case(op, counts(N, 4, dtype=np.int32), counts(4, dtype=np.int32), opsets=(18,))
    yield case("BitwiseNot", counts(N, 4, dtype=np.int32), opsets=(18,))
    for direction in ("LEFT", "RIGHT"):
        eights = counts(N, 4, dtype=np.uint8)
        yield case("BitShift", eights, np.array([1, 2, 0, 3], np.uint8), opsets=(11,), direction=direction)
    yield case("IsInf", strange(N, 9), opsets=(10, 20))
    yield case("IsInf", strange(N, 9), opsets=(10, 20), detect_negative=0)
    yield case("IsInf", strange(N, 9), opsets=(10, 20), detect_positive=0)
    yield case("IsNaN", strange(N, 9), opsets=(9, 13, 20))
    yield case("Where", flags(N, 1, 4), ROWS, scalar(-1e4), opsets=(9, 16))
    yield case("Pow", POSITIVE, scalar(2.5), opsets=(9, 12, 15))
    yield case("Pow", ROWS, scalar(3, np.int64), opsets=(12, 13, 15))
    yield case("Pow", counts(N, 4), scalar(2), opsets=(12, 15))
    yield case("Mod", counts(N, 9, low=-9, high=9), ints(4), opsets=(10, 13))
    yield case("Mod", counts(N, 9, low=-9, high=9), ints(-4), opsets=(13,), fmod=1)
    yield case("Mod", ROWS, scalar(-0.7), opsets=(10, 13), fmod=1)


def other_elementwise_cases() -> Iterator[Case]:
    for exclusive in (0, 1):
        for reverse in (0, 1):
            yield case("CumSum", ROWS, scalar(1, np.int64), opsets=(11, 14), exclusive=exclusive, reverse=reverse)
    yield case("CumSum", counts(N, 4, dtype=np.int32), scalar(-1, np.int32), opsets=(14,))
    for equation in ("bij,bkj->bik", "bij,bkj", "...ij->...ji", " b i j , b k j -> k i "):
        yield case("Einsum", ROWS, *([data(N, 5, 4)] if "," in equation else []), opsets=(12,), equation=equation)
    yield case("Det", data(N, 3, 3), opsets=(11, 22), tolerance=1e-4)
    yield case("Dropout", ROWS, opsets=(9, 10), ratio=0.5)
    yield case("Dropout", ROWS, scalar(0.5), opsets=(12, 13, 22))
    names = ["FLOAT", "FLOAT16", "DOUBLE", "INT8", "INT16", "INT32", "INT64", "BOOL"]
    for to in (getattr(TensorProto, name) for name in names):
        yield case("Cast", data(N, 4, low=-9, high=9), opsets=(9, 13, 19, 21, 23, 24), to=to)
        yield case("Cast", counts(N, 4), opsets=(9, 24), to=to)
    yield case("CastLike", data(N, 4, low=-9, high=9), scalar(1, np.int32), opsets=(15, 19, 24))
    yield case("CastLike", counts(N, 4), ROWS, opsets=(15, 19, 24))


def resampling_cases() -> Iterator[Case]:
    for mode in ("nearest", "linear"):
        yield case("Upsample", IMAGE, floats(1, 1, 2, 3), opsets=(9,), mode=mode)
        yield case("Resize", IMAGE, floats(1, 1, 2, 3), opsets=(10,), mode=mode)
        yield case("Resize", IMAGE, floats(1, 1, 0.5, 0.6), opsets=(10,), mode=mode)
    coordinates = ["align_corners", "asymmetric", "half_pixel", "pytorch_half_pixel"]
    for scales in (floats(1, 1, 2, 2), floats(1, 1, 1.7, 0.55)):
        for place in (*coordinates, "half_pixel_symmetric"):
            opsets = (19,) if place == "half_pixel_symmetric" else (11, 18)
            where = {"coordinate_transformation_mode": place}
            for mode in ("linear", "cubic"):
                yield case("Resize", IMAGE, floats(), scales, opsets=opsets, mode=mode, **where)
            for rounding in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"):
                yield case(
                    "Resize", IMAGE, floats(), scales, opsets=opsets, mode="nearest", nearest_mode=rounding, **where
                )
    yield case("Resize", IMAGE, None, floats(1, 1, 2, 2), opsets=(13, 19, 24))
    old = {"coordinate_transformation_mode": "tf_half_pixel_for_nn", "nearest_mode": "floor"}
    yield case("Resize", IMAGE, floats(), floats(1, 1, 2, 0.6), opsets=(11,), **old)
    exact = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    for mode in ("linear", "cubic"):
        yield case("Resize", data(2, 4, 6, 5), floats(), floats(), ints(2, 4, 9, 7), opsets=(11, 13, 18), mode=mode)
        one = {"mode": mode, "coordinate_transformation_mode": "pytorch_half_pixel"}
        yield case("Resize", data(2, 4, 6, 5), floats(), floats(), ints(2, 4, 1, 7), opsets=(11, 13), **one)
        yield case("Resize", IMAGE, None, None, ints(3, 2), opsets=(18, 19), axes=[2, 3], antialias=1, mode=mode)
    yield case("Resize", IMAGE, None, None, ints(12, 15), opsets=(18, 19), axes=[2, 3])
    yield case("Resize", IMAGE, None, floats(2, 1.5), opsets=(18, 19), axes=[-1, 2], **exact)
    for policy in ("not_larger", "not_smaller"):
        keep = {"keep_aspect_ratio_policy": policy, "axes": [2, 3]}
        yield case("Resize", IMAGE, None, None, ints(9, 12), opsets=(18, 19), **keep, **exact)
    cubic = {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1}
    yield case("Resize", IMAGE, floats(), floats(1, 1, 1.5, 2), opsets=(11, 13), **cubic)
    yield case("Resize", data(N, 4, 5), floats(), floats(1, 1, 3), opsets=(11, 13), mode="linear")
    yield case("Resize", data(N, 2, 3, 4, 3), floats(), floats(1, 1, 2, 2, 2), opsets=(11, 13), mode="linear")
    computed = Data((4,), lambda rng, size: floats(1, 1, *rng.uniform(1, 3, 2)))
    yield case("Resize", IMAGE, floats(), computed, opsets=(13,), mode="linear")
    grid = data(N, 3, 5, 2, low=-1.2, high=1.2)
    for padding in ("zeros", "border", "reflection"):
        for corners in (0, 1):
            shared = {"padding_mode": padding, "align_corners": corners}
            for old_name, new_name in (("bilinear", "linear"), ("nearest", "nearest"), ("bicubic", "cubic")):
                yield case("GridSample", IMAGE, grid, opsets=(16,), mode=old_name, **shared)
                yield case("GridSample", IMAGE, grid, opsets=(20, 22), mode=new_name, **shared)
    yield case("AffineGrid", data(2, 2, 3), ints(2, 1, 4, 5), opsets=(20,), tolerance=1e-4)


def pooling_cases() -> Iterator[Case]:
    window = {"kernel_shape": [3, 2], "strides": [2, 2]}
    for op in ("MaxPool", "LpPool", "AveragePool"):
        opsets = {"MaxPool": (9, 10, 12, 22), "LpPool": (9, 11, 18, 22), "AveragePool": (9, 11, 19, 22)}[op]
        yield case(op, IMAGE, opsets=opsets, kernel_shape=[3, 2])
        yield case(op, IMAGE, opsets=opsets, **window, pads=[1, 0, 1, 1])
        yield case(op, IMAGE, opsets=opsets, **window, pads=[0, 1, 2, 0])
        for auto in ("SAME_UPPER", "SAME_LOWER", "VALID"):
            yield case(op, IMAGE, opsets=opsets, **window, auto_pad=auto)
        for shape in ((N, 2, 7), (N, 2, 5, 4, 6)):
            yield case(op, data(*shape), opsets=opsets[-2:], kernel_shape=[3] * (len(shape) - 2))
    for pads in ([0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]):
        for op, opsets in (("MaxPool", (10, 12, 22)), ("LpPool", (18, 22))):
            yield case(op, data(N, 2, 7, 8), opsets=opsets, kernel_shape=[2, 3], strides=[2, 3], pads=pads, ceil_mode=1)
            yield case(op, data(N, 2, 7, 8), opsets=opsets, kernel_shape=[2, 3], dilations=[2, 2], pads=pads)
    yield case("LpPool", IMAGE, opsets=(11, 18), kernel_shape=[2, 2], p=3)
    for op in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"):
        opsets = (9,) if op == "GlobalLpPool" else (9, 22)  # onnxruntime has no newer kernel
        yield case(op, IMAGE, opsets=opsets)
        yield case(op, ROWS, opsets=opsets)
    yield case("GlobalLpPool", IMAGE, opsets=(9,), p=3)
    yield case("LRN", IMAGE, opsets=(9, 13), size=3, alpha=0.1, beta=0.6, bias=1.5)


def norm_cases() -> Iterator[Case]:
    yield case("BatchNormalization", IMAGE, *(weight(4) for _ in range(4)), opsets=(9, 14, 15))
    yield case("InstanceNormalization", IMAGE, weight(4), weight(4), opsets=(9, 22))
    yield case("LayerNormalization", ROWS, weight(4), weight(4), opsets=(17,))
    yield case("GroupNormalization", IMAGE, weight(2), weight(2), opsets=(18,), num_groups=2)
    yield case("GroupNormalization", IMAGE, weight(4), weight(4), opsets=(21,), num_groups=2, epsilon=1e-3)
    yield case("RMSNormalization", ROWS, weight(4), opsets=(23, 24))
    yield case("RMSNormalization", ROWS, weight(3, 4), opsets=(23,), axis=1, epsilon=1e-2)
    yield case("SimplifiedLayerNormalization", ROWS, weight(4), opsets=(13,), epsilon=1e-4)
    yield case("LpNormalization", ROWS, opsets=(9, 22))
    yield case("LpNormalization", ROWS, opsets=(9, 22), axis=1, p=1)
    yield case("MeanVarianceNormalization", IMAGE, opsets=(9, 13))
    yield case("MeanVarianceNormalization", IMAGE, opsets=(9, 13), axes=[2, 3])


def linear_cases() -> Iterator[Case]:
    yield case("MatMul", ROWS, weight(4, 5), opsets=(9, 13))
    yield case("MatMul", data(N, 2, 3, 4), data(N, 1, 4, 5), opsets=(9, 13))
    yield case("MatMul", ROWS, weight(4), opsets=(9, 13))
    yield case("MatMul", weight(3), ROWS, opsets=(9, 13))
    yield case("Gemm", data(N, 4), weight(5, 4), weight(5), opsets=(9, 11, 13), transB=1)
    yield case("Gemm", data(4, N), weight(4, 5), weight(1, 5), opsets=(9, 13), transA=1, alpha=0.5, beta=2.0)
    yield case("Conv", IMAGE, weight(6, 2, 3, 3), weight(6), opsets=(9, 11, 22), group=2, strides=[2, 1])
    yield case("ConvTranspose", IMAGE, weight(4, 3, 2, 2), opsets=(9, 11, 22), strides=[2, 2], pads=[0, 1, 1, 0])
    yield case("ConvTranspose", IMAGE, weight(4, 1, 3, 3), weight(4), opsets=(11,), strides=[2, 2], group=4)
    for auto in ("SAME_UPPER", "SAME_LOWER", "VALID"):
        yield case("ConvTranspose", IMAGE, weight(4, 3, 3, 4), opsets=(11, 22), strides=[2, 1], auto_pad=auto)
        yield case("ConvTranspose", IMAGE, weight(4, 3, 3, 4), opsets=(11,), output_shape=[7, 7], auto_pad=auto)
    yield case("ConvTranspose", IMAGE, weight(4, 3, 2, 2), opsets=(11,), strides=[3, 3], auto_pad="SAME_UPPER")
    for sizes in ([12, 10], [11, 8], [14, 12]):  # as large as the whole, smaller, larger: bias alone fills what is over
        strided = {"strides": [2, 2], "output_shape": sizes}
        yield case("ConvTranspose", IMAGE, weight(4, 3, 3, 3), weight(3), opsets=(11, 22), **strided)


def attention_cases() -> Iterator[Case]:
    query, key, value = data(N, 4, 5, 6), data(N, 2, 7, 6), data(N, 2, 7, 3)
    yield case("Attention", query, data(N, 4, 7, 6), data(N, 4, 7, 3), opsets=(23, 24))
    yield case("Attention", query, key, value, opsets=(23, 24), scale=0.3)
    yield case("Attention", query, key, value, data(5, 7), opsets=(23, 24))
    yield case("Attention", query, key, value, np.tri(5, 7, dtype=np.bool_), opsets=(23, 24))
    yield case("Attention", query, key, value, opsets=(23, 24), is_causal=1)
    yield case("Attention", query, key, value, data(5, 7), opsets=(23,), is_causal=1)
    flat = {"q_num_heads": 4, "kv_num_heads": 2}
    yield case("Attention", data(N, 5, 24), data(N, 7, 12), data(N, 7, 6), opsets=(23, 24), **flat)
    heads, tables = data(N, 3, 5, 8), (data(N, 5, 4), data(N, 5, 4))
    for interleaved in (0, 1):
        yield case("RotaryEmbedding", heads, *tables, opsets=(23, 24), interleaved=interleaved)
        cache = (weight(9, 4), weight(9, 4), counts(N, 5, high=9))
        yield case("RotaryEmbedding", data(N, 5, 24), *cache, opsets=(23,), interleaved=interleaved, num_heads=3)
    part = {"rotary_embedding_dim": 4}
    yield case("RotaryEmbedding", heads, data(N, 5, 2), data(N, 5, 2), opsets=(23,), **part)


def recurrent_cases() -> Iterator[Case]:
    size, features = 3, 4
    steps = data(5, N, features)
    for op, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1)):
        for direction, ways in (("forward", 1), ("reverse", 1), ("bidirectional", 2)):
            shapes = (ways, gates * size, features), (ways, gates * size, size), (ways, 2 * gates * size)
            w, r, b = (weight(*shape) - 1 for shape in shapes)
            states = [data(ways, N, size)] * (2 if op == "LSTM" else 1)
            outputs = len(states) + 1
            shared = {"hidden_size": size, "direction": direction}
            yield case(op, steps, w, r, opsets=(9, 14), outputs=outputs, **shared)
            yield case(op, steps, w, r, b, None, *states, opsets=(14, 22), outputs=outputs, **shared)
            lengths = counts(N, low=1, high=6, dtype=np.int32)
            yield case(op, steps, w, r, b, lengths, *states, opsets=(14,), outputs=outputs, **shared)
            learned = [weight(ways, 2, size)] * len(states)
            yield case(op, data(5, 2, features), w, r, b, None, *learned, opsets=(14,), outputs=outputs, **shared)
            if op == "LSTM":
                peepholes = weight(ways, 3 * size) - 1
                yield case(op, steps, w, r, b, None, *states, peepholes, opsets=(14,), outputs=outputs, **shared)
            if op == "GRU":
                behind = {"linear_before_reset": 1}
                yield case(op, steps, w, r, b, None, *states, opsets=(9, 14, 22), outputs=2, **shared, **behind)
                yield case(op, steps, w, r, b, lengths, *states, opsets=(14,), outputs=2, **shared, **behind)
            others = {"LSTM": ["HardSigmoid", "Softsign", "Relu"], "GRU": ["HardSigmoid", "Softplus"], "RNN": ["Relu"]}
            yield case(op, steps, w, r, opsets=(14,), outputs=outputs, activations=others[op] * ways, **shared)


def spectra_cases() -> Iterator[Case]:
    real, pairs, length = data(N, 3, 8, 1), data(N, 3, 8, 2), scalar(6, np.int64)
    for x in (real, pairs):
        yield case("DFT", x, opsets=(17,), axis=2)
        yield case("DFT", x, None, scalar(-2, np.int64), opsets=(20,))
        yield case("DFT", x, length, scalar(1, np.int64), opsets=(20,))
        yield case("DFT", x, length, opsets=(17,), axis=2, inverse=1)
    yield case("DFT", real, opsets=(17,), axis=1, onesided=1)
    yield case("DFT", real, length, opsets=(20,), onesided=1)
    hop, size, window = scalar(4, np.int64), scalar(8, np.int64), weight(8)
    for onesided in (0, 1):
        yield case("STFT", data(N, 30, 1), hop, window, size, opsets=(17,), onesided=onesided)
        yield case("STFT", data(N, 30, 1), hop, None, size, opsets=(17,), onesided=onesided)
    yield case("STFT", data(N, 32, 1), hop, window, opsets=(17,))


FAMILIES = (
    reduction_cases,
    shape_cases,
    indexing_cases,
    activation_cases,
    elementwise_cases,
    several_inputs_cases,
    other_elementwise_cases,
    resampling_cases,
    pooling_cases,
    norm_cases,
    linear_cases,
    attention_cases,
    recurrent_cases,
    spectra_cases,
)
CASES = [(each, opset) for family in FAMILIES for each in family() for opset in each.opsets]
