"""Fingerprints: keys that stay the same for the same contents, whatever the machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ndonnx.runtime.atomic import explained

Fingerprintable: TypeAlias = (
    "bytes | str | int | float | bool | Mapping[str, Fingerprintable] | Sequence[Fingerprintable] | None"
)


_DIGEST_BYTES = 16


def _blake2b() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=_DIGEST_BYTES)


def _canonical(part: Fingerprintable) -> Any:
    """A JSON value that is equal for equal parts only: every scalar carries its type's tag."""
    form: Any
    match part:
        case None | bool():
            form = part
        case str():
            form = ["s", part]
        case int():
            form = ["i", f"{int(part):x}"]
        case float():
            form = ["f", float(part).hex()]
        case bytes() | bytearray() | memoryview():
            form = ["b", bytes(part).hex()]
        case Mapping():
            if strange := [key for key in part if not isinstance(key, str)]:
                raise TypeError(f"cannot fingerprint a mapping with the key {strange[0]!r}: keys must be strings")
            form = {key: _canonical(value) for key, value in part.items()}
        case Sequence():
            form = ["l", *(_canonical(item) for item in part)]
        case _:
            kinds = "bytes, str, int, float, bool, None, mappings and sequences of them"
            raise TypeError(f"cannot fingerprint a {type(part).__name__}; possible are {kinds}")
    return form


def fingerprint(*parts: Fingerprintable) -> str:
    """A stable name for the given parts: 32 hexadecimal digits (blake2b, 16 bytes).

    The same on every machine and in every process. Types count (`"1"`, `1`, `1.0`, `True` and
    `b"1"` differ), so does grouping (`("a", "b")` and `(("a", "b"),)` differ); the order of a
    mapping's keys does not, nor does list against tuple.

    Raises:
        TypeError: a part is none of bytes, str, int, float, bool, None, mapping, sequence.
    """
    text = json.dumps(_canonical(parts), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    digest = _blake2b()
    digest.update(text.encode("ascii"))
    return digest.hexdigest()


def fingerprint_file(path: str | Path) -> str:
    """The blake2b digest (16 bytes, as 32 hexadecimal digits) of a file's contents, streamed.

    Raises:
        RunDirError: the file cannot be read.
    """
    with explained(Path(path), "read"):
        return digest_of(Path(path))


def digest_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, _blake2b).hexdigest()
