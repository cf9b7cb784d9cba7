"""`.parquet` files in the Hugging Face image layout: `image` = struct{bytes, path}, maybe `label`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from tempfile import SpooledTemporaryFile
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ndonnx.data.inputs import refuse_scalars
from ndonnx.data.registry import Opening, check_file, has_suffix, register_source
from ndonnx.data.source import DataSource, file_bytes, first_line
from ndonnx.data.sources.images import ImageReader
from ndonnx.data.specs import Batch
from ndonnx.errors import DataError

_IN_MEMORY = 128 * 2**20
"""Bytes of encoded images up to which they are set aside in memory."""
READ_ROWS = 256
"""Rows decoded from the file at a time."""
_FAULTS = (pa.ArrowException, OSError, ValueError, KeyError, MemoryError)  # met by damaging files at random

Row = tuple[int, bytes, int | None]
"""Index, encoded image, label."""


@register_source("a .parquet file of images", opens=has_suffix(".parquet"))
class ParquetSource(DataSource):
    """Encoded images in a table, decoded batch by batch.

    In order they are streamed. Of rows by their numbers, which lie anywhere in the file, the encoded bytes
    are set aside, on the disk where they are many, never their pixels.
    """

    def __init__(self, opening: Opening) -> None:
        """Read the file's footer and check its columns.

        Raises:
            DataError: the file is missing, corrupt, empty, or has other columns.
        """
        spec = opening.spec
        super().__init__(spec, opening.inputs, opening.recipe)
        self._path = check_file(spec)
        refuse_scalars(opening.inputs)
        self._reader = ImageReader(spec, opening.inputs, opening.recipe)
        try:
            with pq.ParquetFile(self._path) as file:
                schema: Any = file.schema_arrow
                self.length = int(file.metadata.num_rows)
        except _FAULTS as error:
            raise DataError(f"{spec}: not a readable .parquet file: {first_line(error)}") from error
        self._check_columns(schema)
        if self.length == 0:
            raise DataError(f"{spec}: holds no samples; expected at least one row")
        self.has_labels = "label" in schema.names

    def batches(self, batch_size: int, *, samples: int | None = None) -> Iterator[Batch]:
        return self._decoded(islice(self._rows(), samples), batch_size)

    def take(self, rows: NDArray[np.int64], batch_size: int) -> Iterator[Batch]:
        return self._decoded(self._found(rows), batch_size)

    def _decoded(self, rows: Iterable[Row], batch_size: int) -> Iterator[Batch]:
        rows = iter(rows)
        while chunk := list(islice(rows, batch_size)):
            yield self._batch(chunk)

    def _batch(self, rows: list[Row]) -> Batch:
        indices = np.array([index for index, _, _ in rows], dtype=np.int64)
        pixels = self._reader.read([(self._where(index), image) for index, image, _ in rows], indices)
        labels = np.array([label for _, _, label in rows], dtype=np.int64) if self.has_labels else None
        return Batch({self._reader.input.name: pixels}, labels)

    def _found(self, numbers: NDArray[np.int64]) -> Iterator[Row]:
        wanted = set(numbers.tolist())
        places: dict[int, tuple[int, int, int | None]] = {}
        with SpooledTemporaryFile(max_size=_IN_MEMORY) as images:
            for number, image, label in self._rows():
                if number in wanted:
                    places[number] = images.tell(), len(image), label
                    images.write(image)
            for number in numbers.tolist():
                start, length, label = places[number]
                images.seek(start)
                yield number, images.read(length), label

    def _rows(self) -> Iterator[Row]:
        columns = ["image.bytes", *(["label"] if self.has_labels else [])]
        index = 0
        try:
            with pq.ParquetFile(self._path) as file:
                for record in file.iter_batches(READ_ROWS, columns=columns):
                    images = record.column("image").flatten()[0].to_pylist()
                    labels = record.column("label").to_pylist() if self.has_labels else [None] * len(images)
                    for image, label in zip(images, labels, strict=True):
                        yield self._checked(index, image, label)
                        index += 1
        except _FAULTS as error:
            raise DataError(f"{self.spec}: corrupt after row {index}: {first_line(error)}") from error
        if index != self.length:
            raise DataError(f"{self.spec}: declares {self.length} rows, found {index}; the file is corrupt")

    def _checked(self, index: int, image: bytes | None, label: int | None) -> Row:
        if image is None:
            raise DataError(f"{self._where(index)}: image.bytes is null; expected the encoded image itself")
        if label is None and self.has_labels:
            raise DataError(f"{self._where(index)}: the label is null; drop the row, or the whole column 'label'")
        return index, image, label

    def _check_columns(self, schema: Any) -> None:
        found = ", ".join(f"{field.name}: {field.type}" for field in schema)
        if "image" not in schema.names:
            raise DataError(f"{self.spec}: expected a column 'image' = struct<bytes, path>, found {found or 'none'}")
        image = schema.field("image").type
        fields = {field.name: field.type for field in image} if pa.types.is_struct(image) else {}
        if "bytes" not in fields or fields["bytes"] not in (pa.binary(), pa.large_binary()):
            raise DataError(f"{self.spec}: expected 'image' to be struct<bytes: binary, path: string>, found {image}")
        if "label" in schema.names and not pa.types.is_integer(schema.field("label").type):
            raise DataError(f"{self.spec}: expected integers in 'label', found {schema.field('label').type}")

    def _where(self, index: int) -> str:
        return f"{self.spec}: row {index}"

    def _content(self) -> Iterator[bytes]:
        return file_bytes(self._path, self.spec)
