"""A model in 8 bits, by onnxruntime's own quantisation: in the QDQ format with given ranges, or with dynamic ranges.

Weights are int8, symmetric, one scale per output channel. With static ranges activations are uint8 with a zero point;
with dynamic ranges they are quantised anew in every run. Which nodes stay in float is the caller's to say.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from ndonnx.assemble.quantise_ranges import Histograms, Rule
from ndonnx.errors import SliceError, first_line
from ndonnx.graph.costs import constant_of, weights_of
from ndonnx.graph.passes.fold_scales import fold_scales
from ndonnx.graph.save import PROTOBUF_LIMIT, tensor_bytes, to_proto
from ndonnx.graph.shapes.declared import copy_of
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.graph.storage.external import external_tensors

Mode: TypeAlias = Literal["static", "dynamic"]
Operators: TypeAlias = Literal["linear", "all"]

_LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_REMOVABLE = frozenset({"Relu", "Clip"})
"""Activations that a range of the value behind them stands for."""
_FURTHER = frozenset({
    "Add", "AveragePool", "Concat", "Flatten", "Gather", "GlobalAveragePool", "LeakyRelu", "MaxPool", "Mul", "Pad",
    "Reshape", "Resize", "Sigmoid", "Slice", "Softmax", "Split", "Squeeze", "Transpose", "Unsqueeze", "Where",
})  # fmt: skip
"""Other operators that onnxruntime computes with integers, or hands integers on through."""
_DYNAMIC = frozenset({"MatMul", "Gemm", "Gather", "LSTM", "Attention"})
"""Convolutions are left out: with dynamic ranges they are slower than in float."""
_OPSETS: dict[Mode, int] = {"static": 13, "dynamic": 11}
"""Opset from which scales per channel, and quantisation in every run, can be written down."""
_IR_VERSIONS = {11: 6, 13: 7}
_INFERRED = ("onnx.infer", "onnxruntime.quant")
"""What tells onnxruntime's quantiser that the types of all values stand in the model."""


@dataclass(frozen=True)
class Scheme:
    """One way to quantise a model."""

    mode: Mode
    operators: Operators = "all"
    rule: Rule = "minmax"
    """How ranges follow from what was measured; of no account where they are dynamic."""
    narrow: bool = False
    """Weights in 7 bits: for processors that add up products of 8 bits in 16."""

    def __str__(self) -> str:
        """In words, for reports."""
        narrow = ", weights in 7 bits" if self.narrow else ""
        if self.mode == "dynamic":
            return f"dynamic{narrow}"
        operators = "linear operators" if self.operators == "linear" else "all operators"
        return f"static, {operators}, ranges by {self.rule}{narrow}"

    @property
    def types(self) -> frozenset[str]:
        """Types of operators that are quantised."""
        if self.mode == "dynamic":
            return _DYNAMIC
        return _LINEAR | _REMOVABLE | (_FURTHER if self.operators == "all" else frozenset())


def prepared(model: ir.Model, mode: Mode) -> ir.Model:
    """A copy of a float model as quantisation wants it: its answers are the same up to rounding.

    Constants are initializers, batch norms are folded into convolutions, all nodes have names, and the opset is raised
    where it is too old for the mode.

    Raises:
        SliceError: it is too large for one message, or its opset cannot be raised.
    """
    if tensor_bytes(model) > PROTOBUF_LIMIT:
        raise SliceError("its weights do not fit into one message of 2 GB")
    copy = copy_of(model)
    if external_tensors(copy):
        ir.external_data.load_to_model(copy)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(copy)
    copy = raised(fold_scales(copy), _OPSETS[mode])
    _name_nodes(copy)
    return infer_shapes(copy)


def raised(model: ir.Model, opset: int) -> ir.Model:
    """The model at an opset of at least this; itself where it is new enough.

    Raises:
        SliceError: ONNX does not convert it.
    """
    if model.opset_imports.get("", opset) >= opset:
        return model
    try:
        proto = onnx.version_converter.convert_version(to_proto(model), opset)
    except Exception as error:  # of the converter's own, without a common base
        raise SliceError(
            f"its opset {model.opset_imports['']} cannot be raised to {opset}: {first_line(error)}"
        ) from error
    proto.ir_version = max(proto.ir_version, _IR_VERSIONS[opset])
    later = ir.from_proto(proto)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(later)
    later.metadata_props.update(model.metadata_props)
    later.producer_name, later.producer_version = model.producer_name, model.producer_version
    return later


def _name_nodes(model: ir.Model) -> None:
    taken = {node.name for node in model.graph}
    seen: set[str | None] = set()
    for number, node in enumerate(model.graph):
        if not node.name or node.name in seen:
            name = f"{node.op_type}_{number}"
            while name in taken:
                name += "_"
            node.name = name
            taken.add(name)
        seen.add(node.name)


def can_be_quantised(model: ir.Model) -> bool:
    """Whether any node of a model holds float weights that some scheme has in integers."""
    heavy = _LINEAR | _DYNAMIC
    return any(node.domain == "" and node.op_type in heavy and weights_of(node) for node in model.graph)


def quantisable(model: ir.Model, scheme: Scheme) -> list[str]:
    """Names of the nodes of a prepared model whose weights, or products, a scheme has in integers."""
    heavy = (_DYNAMIC if scheme.mode == "dynamic" else _LINEAR) & scheme.types
    return [
        node.name or "" for node in model.graph if node.domain == "" and node.op_type in heavy and _fits(node, scheme)
    ]


def _fits(node: ir.Node, scheme: Scheme) -> bool:
    """Whether a node computes with floats; where ranges are dynamic, with a constant."""
    read = [value for value in node.inputs if value is not None]
    if scheme.mode == "dynamic" and not any(value.is_initializer() for value in read):
        return False
    floats = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    tables = read[0] if node.op_type == "Gather" else None
    if tables is not None and not tables.is_initializer():
        return False
    return any(_dtype(value) in floats for value in read[:2])


def _dtype(value: ir.Value) -> ir.DataType | None:
    return value.const_value.dtype if value.const_value is not None else value.dtype


def quantised(
    model: ir.Model, scheme: Scheme, histograms: Histograms | None = None, kept: Collection[str] = ()
) -> ir.Model:
    """A prepared model in 8 bits.

    Args:
        model: of `prepared`, for the scheme's mode; not changed.
        scheme: how.
        histograms: of all its float values; needed with static ranges.
        kept: names of nodes that stay in float.

    Raises:
        SliceError: onnxruntime's quantiser fails.
    """
    proto = to_proto(model)
    proto.metadata_props.add(key=_INFERRED[0], value=_INFERRED[1])
    excluded = sorted(kept)
    with _quiet():
        try:
            found = (
                _dynamic(proto, scheme, excluded)
                if scheme.mode == "dynamic"
                else _static(proto, scheme, histograms or {}, excluded)
            )
        except Exception as error:  # of the quantiser's own: it raises what its dictionaries do
            raise SliceError(f"onnxruntime cannot quantise it: {type(error).__name__}: {first_line(error)}") from error
    return _as_before(model, found, excluded)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantiser's advice to itself."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _static(proto: onnx.ModelProto, scheme: Scheme, histograms: Histograms, kept: list[str]) -> onnx.ModelProto:
    from onnxruntime.quantization import QDQQuantizer, QuantType  # noqa: PLC0415 - takes a second

    options = {"ActivationSymmetric": False, "WeightSymmetric": True}
    return QDQQuantizer(
        proto, True, scheme.narrow, QuantType.QInt8, QuantType.QUInt8, ranges_of(histograms, scheme.rule), [], kept,
        sorted(scheme.types), options,
    ).quantize_model()  # fmt: skip


def ranges_of(histograms: Histograms, rule: Rule) -> object:
    """The ranges of all values by one rule, as onnxruntime's quantiser takes them: a `TensorsData`."""
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData  # noqa: PLC0415 - takes a second

    ends = {name: histogram.range_by(rule) for name, histogram in histograms.items()}
    return TensorsData(
        CalibrationMethod.MinMax, {n: (np.float32(low), np.float32(high)) for n, (low, high) in ends.items()}
    )


def _dynamic(proto: onnx.ModelProto, scheme: Scheme, kept: list[str]) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType  # noqa: PLC0415 - takes a second
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer  # noqa: PLC0415
    from onnxruntime.quantization.quant_utils import QuantizationMode  # noqa: PLC0415

    parts = [f"{name}{part}" for name in kept for part in ("", "_MatMul", "_Add")]  # of a `Gemm`, which it takes apart
    quantiser = ONNXQuantizer(
        proto, True, scheme.narrow, QuantizationMode.IntegerOps, False, QuantType.QInt8, QuantType.QUInt8, None, [],
        parts, sorted(scheme.types), {"MatMulConstBOnly": True},
    )  # fmt: skip
    quantiser.quantize_model()
    return quantiser.model.model


def _as_before(before: ir.Model, proto: onnx.ModelProto, kept: list[str]) -> ir.Model:
    """What a quantiser made, with the head of the model that it was made of."""
    del proto.graph.value_info[:]
    found = ir.from_proto(proto)
    found.metadata_props.clear()
    found.metadata_props.update(before.metadata_props)
    found.producer_name, found.producer_version = before.producer_name, before.producer_version
    found.graph.name, found.doc_string = before.graph.name, before.doc_string
    for old, new in zip(before.graph.outputs, found.graph.outputs, strict=True):
        new.shape, new.type = old.shape, old.type
    _shield(found, kept)
    found.graph.sort()
    return found


def _shield(model: ir.Model, kept: Collection[str]) -> None:
    """Let what stays in float stay in float.

    onnxruntime quantises the weight of a layer between a dequantised input and a quantised output by itself. An
    activation that changes nothing in between keeps it from that, and is computed together with the layer.
    """
    held = set(kept)
    for node in list(model.graph):
        if (
            node.name in held
            and node.op_type in _BY_ITSELF
            and _is_dequantised(node.inputs[0])
            and _ends_in_steps(node)
        ):
            _let_pass(model.graph, node)


_BY_ITSELF = ("Conv", "ConvTranspose", "Gemm")
"""Operators whose weights onnxruntime quantises by itself."""


def _is_dequantised(value: ir.Value | None) -> bool:
    maker = None if value is None else value.producer()
    return maker is not None and maker.op_type == "DequantizeLinear"


def _ends_in_steps(node: ir.Node) -> bool:
    """Whether all that reads a node quantises what it reads, perhaps behind an activation."""
    readers = [use.node for use in node.outputs[0].uses()]
    if len(readers) == 1 and readers[0].op_type in _REMOVABLE:
        readers = [use.node for use in readers[0].outputs[0].uses()]
    return bool(readers) and all(reader.op_type == "QuantizeLinear" for reader in readers)


def _let_pass(graph: ir.Graph, node: ir.Node) -> None:
    """Put an activation that changes nothing behind a node."""
    output = node.outputs[0]
    same = ir.node("LeakyRelu", [output], {"alpha": 1.0}, name=f"{node.name}/same")
    same.outputs[0].name = f"{output.name}/same"
    for use in output.uses():
        if use.node is not same:
            use.node.replace_input_with(use.idx, same.outputs[0])
    graph.insert_after(node, same)


def scales_of(model: ir.Model) -> dict[str, tuple[float, int]]:
    """Scale and zero point of every value that a quantised model has one of, by the name of the value."""
    found = {}
    for node in model.graph:
        if node.op_type != "QuantizeLinear" or len(node.inputs) < 3:
            continue
        read, *parameters = node.inputs
        scale, zero = (constant_of(value) for value in parameters)
        if read is not None and scale is not None and zero is not None and scale.size == 1:
            found[read.name or ""] = (float(scale.numpy().item()), int(zero.numpy().item()))
    return found
