"""Writing a model whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import onnx
import onnx_ir as ir

from ndonnx.errors import RunDirError
from ndonnx.graph.storage.external import external_tensors
from ndonnx.graph.storage.files import model_files, name_by_contents, own_data, rename_data
from ndonnx.graph.storage.maps import write_maps
from ndonnx.graph.storage.opsets import write_opsets
from ndonnx.graph.storage.sparse import write_sparse

PROTOBUF_LIMIT = 1_900_000_000
"""Bytes of tensors above which a model is written with external data (protobuf stops at 2 GB)."""


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as one message, with the tensors that were kept beside it inside; the model itself is not changed."""
    if external_tensors(model):
        model = ir.external_data.load_to_model(model.clone())
    proto = ir.to_proto(model)
    write_sparse(model, proto)
    return _as_in_file(model, proto)


def serialise(model: ir.Model) -> bytes:
    """The model as the bytes of one `.onnx` file, with the tensors that were kept beside it inside."""
    return to_proto(model).SerializeToString(deterministic=True)


def _as_in_file(model: ir.Model, proto: onnx.ModelProto) -> onnx.ModelProto:
    """Let a model's message say what `onnx_ir` does not hold as the file that the model was read from does."""
    write_opsets(model, proto)
    write_maps(model, proto.graph)
    held = set(model.graph.initializers)  # their types stand in the tensors; `onnx_ir` writes them down once more
    told = [value for value in proto.graph.value_info if value.name not in held]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(told)
    return proto


def save(model: ir.Model, path: str | Path) -> None:
    """Write a model under its final name only when it is complete.

    Above 1.9 GB of tensors the weights go into a file beside it, named after its contents: `<name>.<digest>.data`. So
    whenever the process is killed, the model's name stands for the old pair of files or for the new one. The old
    weights go when nothing reads them any more.

    Raises:
        RunDirError: the folder is missing, unwritable, or full.
    """
    path = Path(path)
    try:
        with tempfile.TemporaryDirectory(prefix=".ndonnx-", dir=path.parent) as scratch:
            whole = Path(scratch) / path.name
            if tensor_bytes(model) > PROTOBUF_LIMIT:
                data = whole.with_name(f"{path.name}.data")
                ir.save(model, whole, external_data=data.name)
                named = name_by_contents(data, path.name)
                proto = _as_in_file(model, onnx.load(whole, load_external_data=False))
                rename_data(proto, named.name)
                whole.write_bytes(proto.SerializeToString(deterministic=True))
                os.replace(named, path.parent / named.name)
            else:
                whole.write_bytes(serialise(model))
            own = own_data(path)
            os.replace(whole, path)
        for unread in own.difference(model_files(path)):
            unread.unlink(missing_ok=True)
    except OSError as error:
        raise RunDirError(f"{path}: cannot write the model: {error.strerror}") from error


def check_writable(path: str | Path) -> None:
    """Refuse, before any work is done, a path under which nothing could be written.

    Raises:
        RunDirError: naming the path and what is wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        raise RunDirError(f"{path}: is a directory; give the name of a file to write")
    try:
        with tempfile.TemporaryDirectory(prefix=".ndonnx-", dir=path.parent):
            pass
    except OSError as error:
        raise RunDirError(f"{path}: cannot write there: {error.strerror}") from error
    if path.exists() and not os.access(path, os.W_OK):
        raise RunDirError(f"{path}: exists and is not writable")
    if shutil.disk_usage(path.parent).free == 0:
        raise RunDirError(f"{path}: the disk is full")


def tensor_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, without reading those kept in external data."""
    values = (value for graph in model.graphs() for value in graph.initializers.values())
    tensors = (tensor for value in values if (tensor := value.const_value) is not None)
    return sum(tensor.nbytes for tensor in tensors if tensor.dtype is not ir.DataType.STRING)
