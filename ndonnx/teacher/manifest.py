"""What a store says of its files, checked before anything of them is believed."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ndonnx.errors import RunDirError

MANIFEST = "manifest.json"
"""Name of the file in a store's folder that is written last."""
DtypeName = Literal[
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"
]
"""Element types that a store can hold."""
Count = Annotated[int, Field(ge=0)]


def disk_error(error: OSError, directory: Path) -> RunDirError:
    """What the system's refusal to write into a store means to the user, in one line."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return RunDirError(f"{directory}: the disk is full; capture fewer --samples, or choose another --run-dir")
    return RunDirError(f"{directory}: cannot write activations: {error.strerror or error}")


VALUE_FILE = re.compile(r"v\d+\.npy")


class StoredValue(BaseModel):
    """One value: its file, and the rows `[start, stop)` and checksum of every block written."""

    model_config = ConfigDict(extra="forbid", strict=True)

    file: Annotated[str, Field(pattern=rf"^{VALUE_FILE.pattern}$")]
    dtype: DtypeName
    shape: list[Count]
    constant: bool = False
    blocks: list[tuple[Count, Count, Count]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the value's elements."""
        return nbytes_of(np.dtype(self.dtype), self.shape)

    @property
    def header(self) -> bytes:
        """The `.npy` header of the value's file."""
        return npy_header(np.dtype(self.dtype), tuple(self.shape))


class Manifest(BaseModel):
    """What a store holds, sealed by a digest of its own contents."""

    model_config = ConfigDict(extra="forbid", strict=True)

    samples: Count
    values: dict[str, StoredValue] = {}
    nonfinite: list[str] = []
    unstorable: dict[str, str] = {}
    digest: str = ""

    def sealed(self) -> str:
        """SHA-256 of everything but the digest itself, in hexadecimal."""
        return hashlib.sha256(self.model_dump_json(exclude={"digest"}).encode()).hexdigest()


def nbytes_of(dtype: np.dtype[Any], shape: tuple[int, ...] | list[int]) -> int:
    """Bytes of an array, as a Python integer that does not overflow."""
    total = dtype.itemsize
    for size in shape:
        total *= size
    return total


def npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The header of an `.npy` file of this type and shape."""
    buffer = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def check_file(path: Path, name: str, entry: StoredValue) -> None:
    """Refuse a file that is not what the manifest says.

    Raises:
        RunDirError: it is missing, has another size, or another header.
    """
    header = entry.header
    try:
        with path.open("rb") as file:
            found = file.read(len(header))
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise RunDirError(f"{path}: cannot read value '{name}': {error.strerror}; capture again") from error
    expected = len(header) + entry.nbytes
    if size != expected:
        raise RunDirError(f"{path}: value '{name}' has {size} bytes instead of {expected}; capture again")
    if found != header:
        raise RunDirError(f"{path}: value '{name}' is not the array that the manifest describes; capture again")


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        RunDirError: there is none, or it is damaged.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise RunDirError(f"{path}: no finished activation store here: {error.strerror}; capture again") from error
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise RunDirError(f"{path}: the manifest is damaged: {error.errors()[0]['msg']}; capture again") from error
    if manifest.digest != manifest.sealed():
        raise RunDirError(f"{path}: the manifest is damaged: its digest does not match; capture again")
    return manifest


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Seal a manifest and write it, whole or not at all.

    Raises:
        RunDirError: the disk is full, or the file cannot be written.
    """
    manifest.digest = manifest.sealed()
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_text(manifest.model_dump_json(), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise disk_error(error, path.parent) from error
