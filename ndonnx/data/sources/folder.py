"""A directory of image files: sub-folders are classes, or the images lie in it unlabelled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndonnx.data.inputs import refuse_scalars
from ndonnx.data.registry import Opening, register_source
from ndonnx.data.source import RowSource, file_bytes
from ndonnx.data.sources.images import SUFFIXES, ImageReader
from ndonnx.data.sources.noise import is_name
from ndonnx.data.specs import Batch
from ndonnx.errors import DataError


def _is_folder(given: Any) -> bool:
    return isinstance(given, str) and not is_name(given) and Path(given).is_dir()


@register_source("a directory of images", opens=_is_folder)
class FolderSource(RowSource):
    """Image files, sorted by name; the label is the place of the sub-folder among its sorted siblings."""

    def __init__(self, opening: Opening) -> None:
        """List the folder.

        Raises:
            DataError: it holds no images, or images both directly and in sub-folders.
        """
        spec = opening.spec
        refuse_scalars(opening.inputs)
        super().__init__(spec, opening.inputs, opening.recipe)
        self._root = Path(spec)
        self._reader = ImageReader(spec, opening.inputs, opening.recipe)
        try:
            self._list()
        except OSError as error:
            raise DataError(f"{spec}: cannot list {error.filename}: {error.strerror}") from error
        self.length = len(self._files)
        self.has_labels = self._labels is not None

    def _list(self) -> None:
        classes = sorted(path for path in self._root.iterdir() if path.is_dir() and not path.name.startswith("."))
        direct = sorted(path for path in self._root.iterdir() if _is_image_file(path))
        inside = [sorted(path for path in folder.rglob("*") if _is_image_file(path)) for folder in classes]
        if direct and any(inside):
            raise DataError(
                f"{self.spec}: images lie both directly inside ({direct[0].name}) and in sub-folders; "
                "expected one or the other (sub-folders are classes)"
            )
        self._files = direct or [path for paths in inside for path in paths]
        self._labels = None if direct else np.repeat(np.arange(len(classes)), [len(paths) for paths in inside])
        if not self._files:
            raise DataError(
                f"{self.spec}: holds no samples; expected images ({', '.join(SUFFIXES)}) or sub-folders of images"
            )

    def _fetch(self, rows: NDArray[np.int64]) -> Batch:
        files = [self._files[row] for row in rows]
        pixels = self._reader.read([(str(path), path) for path in files], rows)
        labels = None if self._labels is None else self._labels[rows].astype(np.int64)
        return Batch({self._reader.input.name: pixels}, labels)

    def _content(self) -> Iterator[bytes]:
        for path in self._files:
            yield path.relative_to(self._root).as_posix().encode(errors="surrogateescape") + b"\0"
            yield from file_bytes(path, str(path))


def _is_image_file(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
