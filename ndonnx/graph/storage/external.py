"""Tensors that a model keeps in files beside it: read from its own folder alone, wherever links lead."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from ndonnx.errors import ModelError, first_line


def resolve_external_data(model: ir.Model, path: Path) -> bool:
    """Tie each external tensor to a real file of the model's own folder; whether attributes were read in.

    Where the model is a link itself, as hubs lay it out, the folder that it leads to is its own, too.

    Raises:
        ModelError: a file is missing, too short, or lies elsewhere.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = _in_real_file(value.const_value, path)
        for node in graph:
            for name, attribute in node.attributes.items():
                if _is_external(attribute):
                    node.attributes[name] = ir.AttrTensor(name, _in_real_file(attribute.value, path))
    return _bring_attributes_in(model)


def _is_external(attribute: ir.Attr) -> bool:
    return attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor)


def _in_real_file(tensor: ir.ExternalTensor, path: Path) -> ir.ExternalTensor:
    """The tensor by the real name of its file, which `onnx_ir` wants."""
    location, folder = Path(tensor.location), path.parent.resolve()
    try:
        target = (folder / location).resolve()
        size = target.stat().st_size if target.is_file() else None
        own = {folder, path.resolve().parent}
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links that lead round in a circle
        raise ModelError(f"{path}: tensor '{tensor.name}' names no usable file: {first_line(error)}") from error
    if location.is_absolute() or not any(target.is_relative_to(each) for each in own):
        raise ModelError(
            f"{path}: tensor '{tensor.name}' keeps its data in '{tensor.location}', outside the model's folder"
        )
    if size is None:
        raise ModelError(f"{path}: tensor '{tensor.name}' needs the missing file '{tensor.location}' beside the model")
    end = (tensor.offset or 0) + tensor.nbytes
    if size < end:
        raise ModelError(f"{path}: tensor '{tensor.name}' needs {end} bytes of '{tensor.location}', which has {size}")
    return ir.ExternalTensor(
        target.name,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
        base_dir=target.parent,
    )


def _bring_attributes_in(model: ir.Model) -> bool:
    """Read external data of `Constant` nodes: `onnx_ir` and onnxruntime know them of initializers only."""
    any_was_outside = False
    for graph in model.graphs():
        for node in graph:
            for name, attribute in node.attributes.items():
                if _is_external(attribute):
                    (tensor,) = ir.external_data.convert_tensors_from_external([attribute.value])
                    node.attributes[name] = ir.AttrTensor(name, tensor)
                    any_was_outside = True
    return any_was_outside


def external_tensors(model: ir.Model) -> list[ir.ExternalTensor]:
    """The tensors that are kept in files beside the model, those of sub-graphs among them."""
    found: list[ir.ExternalTensor] = []
    for graph in model.graphs():
        found += [v.const_value for v in graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)]
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    found.append(attribute.value)
    return found
