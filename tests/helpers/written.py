"""Models written without any check, with weights beside them."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from tests.helpers.models import CUSTOM, floats, mlp


def written(path: Path, nodes: list[onnx.NodeProto], *, functions: list[onnx.FunctionProto] | None = None) -> Path:
    """A model of these nodes from `x` to `y`, without any check or inference."""
    graph = helper.make_graph(nodes, "g", [floats("x", 4)], [floats("y", 4)])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(CUSTOM, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, functions=functions or [], ir_version=9), path)
    return path


def external(
    folder: Path,
    location: str = "w.bin",
    *,
    offset: int | str = 0,
    length: int | None = None,
    cut: int = 0,
    write: bool = True,
) -> Path:
    """The MLP with its first weight in a file of its own."""
    model = mlp()
    put_outside(model.graph.initializer[0], folder, location, offset=offset, length=length, cut=cut, write=write)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def put_outside(
    tensor: onnx.TensorProto,
    folder: Path,
    location: str,
    *,
    offset: int | str = 0,
    length: int | None = None,
    cut: int = 0,
    write: bool = True,
) -> None:
    raw = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", len(raw) if length is None else length)):
        tensor.external_data.add(key=key, value=str(value))
    if write:
        (folder / "w.bin").write_bytes(raw[: len(raw) - cut])
