"""A model in 8 bits for onnxruntime: with ranges known beforehand (QDQ), or with ranges found anew in every run.

Weights are int8, symmetric, one scale per output channel; activations are uint8 with a zero point. onnxruntime's own
quantiser writes the same, a channel at a time in Python: a minute for a sentence embedder of 22 million weights, too
long for a choice among dozens. Which nodes stay in float is the caller's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass

from ndonnx.assemble.quantise_dynamic import TYPES, DynamicQuantiser, dynamic_nodes
from ndonnx.assemble.quantise_names import names_in, shorten_names
from ndonnx.assemble.quantise_numbers import Weights
from ndonnx.assemble.quantise_ranges import Histograms, Range, Rule
from ndonnx.assemble.quantise_static import ACTIVATIONS, FURTHER, LINEAR, MOVING, StaticQuantiser
from ndonnx.errors import SliceError
from ndonnx.graph.costs import constant_of, weights_of
from ndonnx.graph.passes.fold_scales import fold_scales
from ndonnx.graph.passes.raise_opset import raise_opset
from ndonnx.graph.save import PROTOBUF_LIMIT, tensor_bytes, to_proto
from ndonnx.graph.shapes.declared import copy_of
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.graph.storage.external import external_tensors

Mode: TypeAlias = Literal["static", "dynamic"]
Operators: TypeAlias = Literal["linear", "all"]

_OPSETS: dict[Mode, int] = {"static": 13, "dynamic": 11}
"""Opset from which scales per channel, and quantisation in every run, can be written down."""


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
            return TYPES
        return LINEAR | ACTIVATIONS | (FURTHER | MOVING if self.operators == "all" else frozenset())


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
    later = ir.from_proto(raise_opset(to_proto(model), opset))
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
    heavy = LINEAR | TYPES
    return any(node.domain == "" and node.op_type in heavy and weights_of(node) for node in model.graph)


def quantisable(model: ir.Model, scheme: Scheme) -> list[str]:
    """Names of the nodes of a prepared model whose weights, or products, a scheme has in integers."""
    if scheme.mode == "dynamic":
        return [node.name or "" for node in dynamic_nodes(model)]
    nodes = (node for node in model.graph if node.domain == "" and node.op_type in LINEAR)
    return [node.name or "" for node in nodes if node.outputs[0].dtype is ir.DataType.FLOAT]


def quantised(
    model: ir.Model,
    scheme: Scheme,
    histograms: Histograms | None = None,
    kept: Collection[str] = (),
    weights: Weights | None = None,
) -> ir.Model:
    """A prepared model in 8 bits.

    Args:
        model: of `prepared`, for the scheme's mode; not changed.
        scheme: how.
        histograms: of all its float values; needed with static ranges. What has none stays in float.
        kept: names of nodes that stay in float.
        weights: where weights in 8 bits are kept from one call for this model to the next.
    """
    found, held = model.clone(), Weights() if weights is None else weights
    if scheme.mode == "dynamic":
        DynamicQuantiser(found, held, scheme.narrow).run(kept)
    else:
        StaticQuantiser(found, _ranges(histograms or {}, scheme.rule), held, scheme.narrow).run(scheme.types, kept)
        _shield(found, kept)
    RemoveUnusedNodesPass()(found)
    shorten_names(found, names_in(model))
    for node in found.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None
    found.graph.sort()
    return found


def rounded(
    model: ir.Model, scheme: Scheme, histograms: Histograms, kept: Collection[str] = ()
) -> tuple[ir.Model, dict[str, int]]:
    """A prepared model that rounds its values as `quantised` does, with weights that are floats and can be trained.

    Args:
        model: of `prepared`; not changed.
        scheme: how it is quantised; static.
        histograms: of all its float values.
        kept: names of nodes that stay in float.

    Returns:
        The model, and its weights that `quantised` has in integers, by name, with the axis of their output channels.
    """
    found = model.clone()
    quantiser = StaticQuantiser(found, _ranges(histograms, scheme.rule), Weights(), scheme.narrow)
    axes = quantiser.round_values(scheme.types, kept)
    found.graph.sort()
    return found, axes


def _ranges(histograms: Histograms, rule: Rule) -> Callable[[str], Range | None]:
    @cache
    def range_of(name: str) -> Range | None:
        return histograms[name].range_by(rule) if name in histograms else None

    return range_of


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
    if len(readers) == 1 and readers[0].op_type in ACTIVATIONS:
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
