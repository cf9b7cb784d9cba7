"""The files of a model, and what they weigh: its own, and those beside it that hold its weights."""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

_KEY = b"location"
"""Names the file of a tensor that is kept outside: a file without these bytes keeps everything itself."""
_CHUNK = 2**20


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


def _locations(path: Path) -> set[str]:
    """Names of the files that hold tensors of a model, as it writes them; a file of another kind has none."""
    if not _mentions_files(path):
        return set()
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except (DecodeError, ValueError):
        return set()
    graphs: tuple[onnx.GraphProto | onnx.FunctionProto, ...] = (model.graph, *model.functions)
    return {
        entry.value
        for graph in graphs
        for tensor in _tensors(graph)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == _KEY.decode()
    }


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
