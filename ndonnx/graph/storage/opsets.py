"""Opset imports as onnxruntime reads them: one spelling for ONNX's own domain, and none that is missing.

A model is worked on with the settled imports and written with those of its file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

_ONNX, _ALIAS = "", "ai.onnx"
ONNX_NAMES = (_ONNX, _ALIAS)
"""The names of the domain of ONNX's own operators."""
_MICROSOFT = "com.microsoft"
_FROM_FILE = "ndonnx.opsets"
"""Key of a graph's metadata, which copies of the graph share."""


@dataclass(frozen=True)
class FileOpsets:
    """The opset imports of a file, and the domains that it uses without importing them."""

    written: tuple[tuple[str, int], ...] = ()
    missing: frozenset[str] = field(default_factory=frozenset)


def settle_opsets(proto: onnx.ModelProto) -> FileOpsets:
    """Let a message import each domain that it uses, once and under its usual name. In place.

    Of several versions of one domain the last one counts, and operators of a domain that is not imported have its
    newest version, as in onnxruntime.
    """
    written = tuple((entry.domain, entry.version) for entry in proto.opset_import)
    imports = {_usual(domain): version for domain, version in written}
    used = {_settle_node(node) for node in _nodes(proto.graph.node)}
    for function in proto.functions:
        used |= {_settle_node(node) for node in _nodes(function.node)}
        _import(function, {_usual(entry.domain): entry.version for entry in function.opset_import})
    missing = used.difference(imports, {function.domain for function in proto.functions}, {_ONNX})
    newest = {domain: version for domain in sorted(missing) if (version := _newest(domain)) is not None}
    _import(proto, imports | newest)
    return FileOpsets(written, frozenset(newest))


def remember_opsets(model: ir.Model, opsets: FileOpsets) -> None:
    """Let a model, and all copies of it, know the imports of its file."""
    model.graph.meta[_FROM_FILE] = opsets


def write_opsets(model: ir.Model, proto: onnx.ModelProto) -> None:
    """Put the imports of the file that a model was read from into its message, and behind them what came later."""
    opsets: FileOpsets = model.graph.meta.get(_FROM_FILE, FileOpsets())
    known = {_usual(domain) for domain, _ in opsets.written} | opsets.missing
    later = ((domain, version) for domain, version in model.opset_imports.items() if domain not in known)
    del proto.opset_import[:]
    proto.opset_import.extend(onnx.helper.make_opsetid(*entry) for entry in (*opsets.written, *later))


def let_functions_follow(model: ir.Model) -> None:
    """Let functions import the model's versions where these define their operators as the functions' own do."""
    for function in model.functions.values():
        for domain, own in list(function.opset_imports.items()):
            version = model.opset_imports.get(domain, own)
            operators = {node.op_type for node in function.all_nodes() if node.domain == domain}
            if all(_since(domain, op, own) == _since(domain, op, version) is not None for op in operators):
                function.opset_imports[domain] = version


def _usual(domain: str) -> str:
    return _ONNX if domain == _ALIAS else domain


def _settle_node(node: onnx.NodeProto) -> str:
    """The node's domain, under its usual name from now on."""
    if node.domain == _ALIAS:
        node.domain = _ONNX
    return str(node.domain)


def _import(message: onnx.ModelProto | onnx.FunctionProto, imports: dict[str, int]) -> None:
    del message.opset_import[:]
    message.opset_import.extend(onnx.helper.make_opsetid(*entry) for entry in imports.items())


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes, and those of their sub-graphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g.node)
            elif attribute.type == onnx.AttributeProto.GRAPHS:
                for graph in attribute.graphs:
                    yield from _nodes(graph.node)


def _since(domain: str, operator: str, version: int) -> int | None:
    if not onnx.defs.has(operator, version, domain):
        return None
    return int(onnx.defs.get_schema(operator, version, domain).since_version)


def _newest(domain: str) -> int | None:
    """Newest version of a domain that is known here; onnxruntime's own has one only."""
    if domain == _MICROSOFT:
        return 1
    return max((s.since_version for s in onnx.defs.get_all_schemas_with_history() if s.domain == domain), default=None)
