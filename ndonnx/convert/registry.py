"""onnx2torch, made ready: its registry with our converters and the aliases that newer opsets need.

Our converters live in a domain of their own, so that they neither clash with onnx2torch's nor
depend on the opset: `lower.py` moves a node there when this package knows its operator.
Import `onnx2torch` only through here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from onnx import defs
from torch import nn

from ndonnx.convert.lazy_torchvision import torchvision_on_demand

with torchvision_on_demand():
    from onnx2torch import convert
    from onnx2torch.node_converters.registry import _CONVERTER_REGISTRY, add_converter
    from onnx2torch.onnx_graph import OnnxGraph
    from onnx2torch.onnx_node import OnnxNode
    from onnx2torch.utils.common import OperationConverterResult, onnx_mapping_from_node

__all__ = ["DOMAIN", "OPSET_ATTRIBUTE", "OnnxNode", "convert", "converts", "has_converter", "opset_of"]

DOMAIN = "ndonnx"
"""Domain of nodes that our own converters take."""
OPSET_ATTRIBUTE = "ndonnx_opset"
"""Attribute by which a lowered node remembers the opset it was written for."""

Builder = Callable[[OnnxNode], nn.Module]
_OWN: set[str] = set()


def converts(*operators: str) -> Callable[[Builder], Builder]:
    """Register a builder for these operators, whatever their opset.

    The module it builds takes the node's inputs in ONNX's order, weights among them.
    """

    def register(builder: Builder) -> Builder:
        def converter(node: OnnxNode, graph: OnnxGraph) -> OperationConverterResult:
            return OperationConverterResult(builder(node), onnx_mapping_from_node(node))

        for operator in operators:
            add_converter(operator, 1, domain=DOMAIN)(converter)
            _OWN.add(operator)
        return builder

    return register


def has_converter(operator: str) -> bool:
    """Whether one of our own converters takes this operator."""
    return operator in _OWN


def opset_of(node: OnnxNode) -> int:
    """The opset that a lowered node was written for."""
    return int(node.attributes[OPSET_ATTRIBUTE])


def _signature(schema: defs.OpSchema) -> tuple[list[str], list[str], list[str]]:
    return [i.name for i in schema.inputs], [o.name for o in schema.outputs], sorted(schema.attributes)


def _alias_newer_opsets() -> None:
    """Let operators whose inputs, outputs and attributes did not change share the older converter.

    What changed without changing these is caught by the parity gate.
    """
    known: dict[str, int] = defaultdict(int)
    for entry in _CONVERTER_REGISTRY:
        if entry.domain == "":
            known[entry.operation_type] = max(known[entry.operation_type], entry.version)
    for schema in defs.get_all_schemas_with_history():
        version = known.get(schema.name, 0)
        if schema.domain == "" and 0 < version < schema.since_version and not schema.deprecated:
            base = defs.get_schema(schema.name, version, "")
            if _signature(base) == _signature(schema):
                converter = next(c for d, c in _CONVERTER_REGISTRY.items() if d == ("", schema.name, version))
                add_converter(schema.name, schema.since_version)(converter)


_alias_newer_opsets()
