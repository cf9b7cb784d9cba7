"""The files of a model, and what they weigh: its own, and those beside it that hold its weights."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

_KEY = b"location"
"""Names the file of a tensor that is kept outside: a file without these bytes keeps everything itself."""
_CHUNK = 2**20
_DIGEST_BYTES = 8
"""Of the digest in the name of a file of weights."""


def model_files(path: str | Path) -> list[Path]:
    """The model's file, and each file that it names for its weights.

    Raises:
        OSError: the model cannot be read.
    """
    path = Path(path)
    beside = {path.parent / name for name in _locations(path)}
    return [path, *sorted(part for part in beside if part.is_file())]


def file_bytes(path: str | Path) -> int:
    """Bytes of a model on disk, the files that hold its weights among them.

    Raises:
        OSError: a file cannot be read.
    """
    return sum(part.stat().st_size for part in model_files(path))


def compressed_bytes(path: str | Path) -> int:
    """Bytes that the same files take after zlib: what zeros are worth on the way to a device.

    Raises:
        OSError: a file cannot be read.
    """
    packer = zlib.compressobj()
    size = 0
    for part in model_files(path):
        with part.open("rb") as file:
            while chunk := file.read(_CHUNK):
                size += len(packer.compress(chunk))
    return size + len(packer.flush())


def name_by_contents(data: Path, model: str) -> Path:
    """Rename the file of a model's weights after what it holds; its new path.

    Args:
        data: the file.
        model: name of the model's file.

    Raises:
        OSError: the file cannot be read or renamed.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    with data.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    named = data.with_name(f"{model}.{digest.hexdigest()}.data")
    os.replace(data, named)
    return named


def rename_data(model: onnx.ModelProto, name: str) -> None:
    """Let every tensor that a model keeps outside name this file, in place."""
    for entry in _places(model):
        entry.value = name


def own_data(path: Path) -> set[Path]:
    """Files of weights beside a model that `ndonnx.graph.save` has written for it, whether it reads them or not.

    They are named after the model and after what they hold, or `<name>.data` where the model reads that file.
    """
    named = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{{2 * _DIGEST_BYTES}}}\.data")
    found = {part for part in path.parent.iterdir() if named.fullmatch(part.name)}
    read = {path.parent / name for name in _locations(path)} if path.is_file() else set()
    return found | {part for part in read if part.name == f"{path.name}.data"}


def _locations(path: Path) -> set[str]:
    """Names of the files that hold tensors of a model, as it writes them; a file of another kind has none."""
    if not _mentions_files(path):
        return set()
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except (DecodeError, ValueError):
        return set()
    return {entry.value for entry in _places(model)}


def _places(model: onnx.ModelProto) -> Iterator[onnx.StringStringEntryProto]:
    """Where each tensor that is kept outside says in which file."""
    graphs: tuple[onnx.GraphProto | onnx.FunctionProto, ...] = (model.graph, *model.functions)
    for tensor in (tensor for graph in graphs for tensor in _tensors(graph)):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield from (entry for entry in tensor.external_data if entry.key == _KEY.decode())


def _mentions_files(path: Path) -> bool:
    with path.open("rb") as file:
        if not path.stat().st_size:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(_KEY) >= 0


def _tensors(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.TensorProto]:
    """All tensors of a graph or function, with those of its nodes and of the graphs inside them."""
    if isinstance(graph, onnx.GraphProto):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from _held(attribute)


def _held(attribute: onnx.AttributeProto) -> Iterator[onnx.TensorProto]:
    yield from (attribute.t, *attribute.tensors)
    for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
        yield from (sparse.values, sparse.indices)
    inner: Iterable[onnx.GraphProto] = (attribute.g, *attribute.graphs)
    for graph in inner:
        yield from _tensors(graph)
