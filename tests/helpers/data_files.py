"""Files of data, and what is read of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from ndonnx.config.recipe import DataRecipe
from ndonnx.data import Batch, DataSource, InputSpec, open_source
from ndonnx.errors import DataError

PLAIN = DataRecipe()
IMAGE = InputSpec("image", np.dtype(np.float32), ("N", 3, 8, 6))
VECTOR = InputSpec("x", np.dtype(np.float32), ("N", 4))
TOKENS = InputSpec("ids", np.dtype(np.int64), ("N", "seq"))


def read(source: DataSource, batch_size: int = 3, samples: int | None = None) -> Batch:
    return joined(list(source.batches(batch_size, samples=samples)), batch_size)


def taken(source: DataSource, rows: list[int] | NDArray[np.int64], batch_size: int = 3) -> Batch:
    return joined(list(source.take(np.asarray(rows, np.int64), batch_size)), batch_size)


def joined(batches: list[Batch], batch_size: int) -> Batch:
    assert all(len(batch) == batch_size for batch in batches[:-1])
    labels = [batch.labels for batch in batches if batch.labels is not None]
    inputs = {name: np.concatenate([batch.inputs[name] for batch in batches]) for name in batches[0].inputs}
    return Batch(inputs, np.concatenate(labels) if labels else None)


def refused(spec: object, inputs: list[InputSpec], recipe: DataRecipe = PLAIN) -> str:
    """The message of the DataError, which is one line and names the source."""
    with pytest.raises(DataError) as caught:
        read(open_source(str(spec), inputs, recipe))
    message = str(caught.value)
    assert "\n" not in message
    return message


def pixels(seed: int, size: tuple[int, int] = (8, 6)) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def png(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, images: Sequence[bytes | None], labels: Sequence[int | None] | None = None) -> Path:
    struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": pa.array([{"bytes": image, "path": None} for image in images], struct_type)}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
    pq.write_table(pa.table(columns), path, row_group_size=4)
    return path


def vectors(count: int = 7) -> NDArray[np.float32]:
    return np.arange(count * 4, dtype=np.float32).reshape(count, 4)
