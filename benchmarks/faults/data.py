"""Hostile data and recipes: each function writes files into a folder and gives the source, or the flags, to use."""

from __future__ import annotations

import io
import math
import os
import pickle
import random
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from benchmarks.faults.mutations import ABSURD, BYTES, NAMES

Hostile = Callable[[random.Random, Path], str]
"""Writes a data source for the image model into a folder, and tells its name."""
INPUT = "image"
SHAPE = (3, 8, 8)
"""Name and sizes of a sample of the model that data are for."""
_BOMB = 2**30
"""Bytes that a packed file of a megabyte unpacks to."""
_PICTURE_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16")


class Owned:
    """What is run where a pickle is read."""

    def __reduce__(self) -> Any:
        return os.system, ("touch owned",)


def samples(rng: random.Random, count: int = 24) -> NDArray[np.float32]:
    """Sound samples."""
    return np.random.default_rng(rng.randrange(2**32)).standard_normal((count, *SHAPE)).astype(np.float32)


def _damaged(rng: random.Random, path: Path) -> str:
    """The file as it is, or with damaged bytes."""
    if rng.random() < 0.35:
        path.write_bytes(rng.choice(list(BYTES.values()))(rng, path.read_bytes()))
    return path.name


# Arrays


def odd_values(rng: random.Random, folder: Path) -> str:
    """NaN, infinities, numbers beyond float32, or all the same."""
    array = samples(rng).astype(rng.choice((np.float32, np.float64, np.float16)))
    with np.errstate(over="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array[tuple(rng.randrange(size) for size in array.shape)] = rng.choice(
            (np.nan, np.inf, -np.inf, 1e300, 3e38, 1e-45)
        )
        if rng.random() < 0.3:
            array[:] = rng.choice((np.nan, 0, np.inf, 1e30))
    np.savez(folder / "d.npz", **{INPUT: array})
    return _damaged(rng, folder / "d.npz")


def odd_dtype(rng: random.Random, folder: Path) -> str:
    """Elements that are no numbers, or of another kind."""
    kind = rng.choice(("?", "i1", "u8", "c16", "U5", "S3", "M8[s]", "m8[D]", ">f4", "V4", "f2", "g", "V0", "U0"))
    array = np.zeros((24, *SHAPE), dtype=kind)
    if rng.random() < 0.5:
        np.save(folder / "d.npy", array)
        return _damaged(rng, folder / "d.npy")
    np.savez(folder / "d.npz", **{INPUT: array})
    return _damaged(rng, folder / "d.npz")


def odd_shape(rng: random.Random, folder: Path) -> str:
    """Arrays of other ranks and sizes, empty ones among them."""
    sizes = [rng.choice((0, 1, 2, 3, 8, 24)) for _ in range(rng.randrange(7))]
    np.savez(folder / "d.npz", **{INPUT: np.zeros(sizes, np.float32), "label": np.zeros(sizes[:1], np.int64)})
    return _damaged(rng, folder / "d.npz")


def odd_labels(rng: random.Random, folder: Path) -> str:
    """Labels that are negative, absurdly large, no whole numbers, or too many."""
    labels: Any = rng.choice(
        (
            np.full(24, rng.choice((-1, 10**6, 2**40, 2**62, -(2**63)))),
            np.full(24, np.nan), np.full(24, 0.5), np.zeros((24, 2)), np.zeros(23, np.int64), np.array("cat"),
            np.array(["a"] * 24), np.zeros(24, np.uint64) + np.uint64(2**64 - 1), np.zeros(24, bool), np.array(3),
        )
    )  # fmt: skip
    np.savez(folder / "d.npz", **{INPUT: samples(rng), rng.choice(("label", "labels")): labels})
    return _damaged(rng, folder / "d.npz")


def pickled(rng: random.Random, folder: Path) -> str:
    """Pickles, which run what they like where they are read."""
    way = rng.randrange(4)
    if way == 0:
        np.savez(folder / "d.npz", **{INPUT: np.array([Owned()] * 3, dtype=object)}, allow_pickle=True)  # type: ignore[arg-type]
        return _damaged(rng, folder / "d.npz")
    if way == 1:
        np.save(folder / "d.npy", np.array([Owned()] * 3, dtype=object), allow_pickle=True)
        return _damaged(rng, folder / "d.npy")
    name = rng.choice(("d.npy", "d.npz", "d.parquet", "d.pkl"))
    (folder / name).write_bytes(pickle.dumps(Owned()))
    return name


def _npy(header: str, version: tuple[int, int] = (1, 0), length: int | None = None, body: bytes = b"") -> bytes:
    text = header.encode("latin1")
    size = struct.pack("<H" if version == (1, 0) else "<I", len(text) if length is None else length)
    return b"\x93NUMPY" + bytes(version) + size + text + body


def odd_header(rng: random.Random, folder: Path) -> str:
    """A `.npy` whose header claims what is not there, or is no header."""
    shape = rng.choice(
        ("(2**40,)", f"({2**62}, 3, 8, 8)", "(-1, 3, 8, 8)", "(24, 3, 8, 8)", "()", "(1.5,)", "'x'", "(True,)")
    )
    kind = rng.choice(("<f4", "|O", "<U1000000000", "|V2147483647", "<M8[ns]", "x", "<f400"))
    header = f"{{'descr': '{kind}', 'fortran_order': {rng.choice((True, False, 3))}, 'shape': {shape}, }}\n"
    odd = (
        "(" * 5000,
        "[" * 200,
        "{'descr': " * 90,
        "__import__('os').system('touch owned')",
        "\n" * 10_000,
        "'" * 3,
        "9" * 5000,
    )
    body = rng.randbytes(rng.choice((0, 4, 24 * math.prod(SHAPE) * 4)))
    whole = _npy(rng.choice((header, header, header, rng.choice(odd))), body=body)
    if rng.random() < 0.3:
        whole = _npy(header, (rng.choice((2, 3, 9)), rng.choice((0, 7))), rng.choice((None, 2**32 - 1)), body)
    if rng.random() < 0.5:
        (folder / "d.npy").write_bytes(whole)
        return "d.npy"
    with zipfile.ZipFile(folder / "d.npz", "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        archive.writestr(f"{INPUT}.npy", whole)
    return _damaged(rng, folder / "d.npz")


_packed: dict[int, bytes] = {}


def _zeros(size: int) -> bytes:
    """That many zeros, deflated, of which a thousandth is left."""
    if size not in _packed:
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        part = bytes(2**20)
        _packed[size] = b"".join(packer.compress(part) for _ in range(size // 2**20)) + packer.flush()
    return _packed[size]


def zip_bomb(rng: random.Random, folder: Path) -> str:
    """A megabyte that unpacks to a gigabyte, and says so, or says something else."""
    claimed = rng.choice((_BOMB, 2**31, 2**33, 4000, 0, 2**32 - 1))
    rows = rng.choice((_BOMB // (math.prod(SHAPE) * 4), 24, 2**40))
    header = _npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, 3, 8, 8), }}\n")
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(header) + packer.flush(zlib.Z_FULL_FLUSH) + _zeros(_BOMB)
    name = rng.choice((f"{INPUT}.npy", "../outside/owned.npy", "/etc/owned.npy"))
    (folder / "d.npz").write_bytes(_zip_of([(name, packed, claimed)] * rng.choice((1, 1, 3))))
    return _damaged(rng, folder / "d.npz")


def _zip_of(members: Sequence[tuple[str, bytes, int]]) -> bytes:
    """An archive of deflated members whose sizes are whatever they are said to be."""
    whole, directory = io.BytesIO(), io.BytesIO()
    for name, packed, claimed in members:
        at, text, size = whole.tell(), name.encode(), min(claimed, 2**32 - 1)
        whole.write(
            struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, 8, 0, 0, 0, len(packed), size, len(text), 0) + text + packed
        )
        fields = (20, 20, 0, 8, 0, 0, 0, len(packed), size, len(text), 0, 0, 0, 0, 0, at)
        directory.write(struct.pack("<4s6H3I5H2I", b"PK\x01\x02", *fields) + text)
    start = whole.tell()
    whole.write(directory.getvalue())
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, len(members), len(members), directory.tell(), start, 0)
    return whole.getvalue() + end


# Pictures


def _png(width: int, height: int, packed: bytes, depth: int = 8, colour: int = 2, more: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + more + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def _absurd_png(rng: random.Random) -> tuple[str, bytes]:
    """A picture of any number of pixels in a megabyte of zeros."""
    sizes = (0, 1, 8, 9_000, 30_000, 65_535, 2**31 - 1)
    packed = zlib.compress(bytes(2**20))
    return ".png", _png(rng.choice(sizes), rng.choice(sizes), packed, rng.choice((8, 16, 1, 3)))


def _talkative_png(rng: random.Random) -> tuple[str, bytes]:
    """A small picture with a packed remark of many megabytes."""
    body = b"Comment\0\0" + zlib.compress(bytes(2**26))
    more = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    return ".png", _png(8, 8, zlib.compress(bytes(8 * 25)), more=more * rng.choice((1, 3)))


def _odd_picture(rng: random.Random) -> tuple[str, bytes]:
    """A picture of any mode, format and size, whole or damaged."""
    sizes = (rng.choice((1, 7, 8, 3000)), rng.choice((1, 8, 400)))
    mode, kind = rng.choice(_PICTURE_MODES), rng.choice(("PNG", "TIFF", "BMP", "GIF", "JPEG", "WEBP", "PPM"))
    made = io.BytesIO()
    try:
        Image.new(mode, sizes).save(made, kind)
    except (OSError, ValueError, KeyError):
        Image.new("RGB", sizes).save(made, "PNG")
    return ".jpg", rng.choice((made.getvalue(), rng.choice(list(BYTES.values()))(rng, made.getvalue())))


def _absurd_ppm(rng: random.Random) -> tuple[str, bytes]:
    return ".ppm", f"P{rng.randrange(8)} {rng.choice(ABSURD)} {rng.choice(ABSURD)} 255\n".encode() + bytes(100)


def _absurd_bmp(rng: random.Random) -> tuple[str, bytes]:
    width, height = rng.choice((8, -8, 2**30)), rng.choice((8, -(2**31), 2**30))
    head = struct.pack("<2sIHHI", b"BM", 0, 0, 0, 54)
    return ".bmp", head + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(200)


def _programme(rng: random.Random) -> tuple[str, bytes]:
    """PostScript, which some readers of pictures hand to an interpreter."""
    return rng.choice((".png", ".gif")), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(owned) (w) file\n"


def _noisy_tiff(rng: random.Random) -> tuple[str, bytes]:
    return ".tif", b"II*\0\x08\0\0\0" + rng.randbytes(rng.choice((2, 40, 400)))


_PICTURES = (_absurd_png, _talkative_png, _odd_picture, _absurd_ppm, _absurd_bmp, _programme, _noisy_tiff)


def _picture(rng: random.Random) -> tuple[str, bytes]:
    """A picture as it should not be, and its suffix."""
    return rng.choice(_PICTURES)(rng)


def pictures(rng: random.Random, folder: Path) -> str:
    """A directory of pictures, one or all of them hostile."""
    where = folder / "pictures"
    for number in range(4):
        suffix, whole = _picture(rng)
        if number and rng.random() < 0.5:
            made = io.BytesIO()
            Image.new("RGB", (8, 8), (number * 20, 3, 9)).save(made, "PNG")
            suffix, whole = ".png", made.getvalue()
        inner = where / rng.choice(("a", "b", "\x1b[31m")) if rng.random() < 0.2 else where
        inner.mkdir(parents=True, exist_ok=True)
        (inner / f"{number}{suffix}").write_bytes(whole)
    if rng.random() < 0.1:
        (where / "again").symlink_to(".")
        (where / "9.png").symlink_to("9.png")
    return "pictures"


def parquet(rng: random.Random, folder: Path) -> str:
    """A table of pictures with other columns, nothing in them, one value a million times, or damaged bytes."""
    way, path = rng.randrange(5), folder / "d.parquet"
    suffix, whole = _picture(rng)
    row: Any = {"bytes": whole, "path": f"a{suffix}"}
    if way == 0:
        table = pa.table({"image": [row, None, row], "label": [1, None, 2**40]})
    elif way == 1:
        table = pa.table(
            {rng.choice(("image", "images", "")): rng.choice(([1, 2], ["a", "b"], [row, row])), "label": ["x", "y"]}
        )
    elif way == 2:
        table = pa.table({"image": [{"bytes": b"", "path": None}] * 200_000})
    elif way == 3:
        table = pa.table({"image": pa.array([{"bytes": bytes(2**24)}] * 6)})
    else:
        table = pa.table({"image": [row] * 8, "label": [rng.choice(ABSURD)] * 8})
    pq.write_table(table, path, compression=rng.choice(("snappy", "gzip", "none", "zstd")))
    if rng.random() < 0.6:
        path.write_bytes(rng.choice(list(BYTES.values()))(rng, path.read_bytes()))
    return path.name


def nothing(rng: random.Random, folder: Path) -> str:
    """A source that there is not, or that is something else."""
    (folder / "d.csv").write_text("image,label\n1,2\n\x00,\ufffe\n" * 5, encoding="utf-8")
    (folder / "empty.npz").touch()
    os.mkfifo(folder / "fifo.npz")
    (folder / "loop.npz").symlink_to("loop.npz")
    (folder / "folder.npz").mkdir()
    (folder / "text.parquet").write_text("PAR1 and nothing else PAR1", encoding="utf-8")
    (folder / "noise.npz").write_bytes(rng.randbytes(3000))
    odd = [name for name in NAMES if "\0" not in name]
    given = (
        "d.csv",
        "empty.npz",
        "fifo.npz",
        "loop.npz",
        "folder.npz",
        "text.parquet",
        "noise.npz",
        "nowhere:function",
        "x" * 5000,
    )
    return rng.choice((*given, "os:nothing", "::", "/dev/zero", "/dev/null", "..", *odd))


DATA: Sequence[Hostile] = (
    odd_values, odd_values, odd_dtype, odd_shape, odd_labels, odd_labels, pickled, odd_header, odd_header, zip_bomb,
    pictures, pictures,
    parquet, parquet, nothing,
)  # fmt: skip


# Recipes

_HOSTILE = (
    "nan", "inf", "-inf", "1e400", "-1", "0", "99999999999999999999999", "1e-300", '""', '"x"', "true", "[]", "{}",
    "[nan]",
    '"1e9999GB"', '"9"', "1979-05-27T07:32:00Z", '"../outside/owned"', "'''\n'''", '"\\u0000"', "[[1],[2]]", "0.5",
    "2", "0x10",
    '"' + "9" * 400 + 'TB"', '"' + "9" * 5000 + '"', "9" * 5000,
)  # fmt: skip


def recipe(rng: random.Random, folder: Path) -> list[str]:
    """A recipe file with hostile values, or one that is none; the flags that name it."""
    from ndonnx.config.recipe import KEYS, DataRecipe, SearchRecipe  # noqa: PLC0415

    lines = [
        f"{key} = {rng.choice(_HOSTILE)}"
        for key in rng.sample(sorted(KEYS), rng.choice((1, 1, 2, 4)))
        if _is_quick(key)
    ]
    tables = {
        "data": sorted(DataRecipe.model_fields),
        "search": sorted(SearchRecipe.model_fields),
        f"inputs.{INPUT}": ["value", "axis", "shape", "min", "max", "more"],
    }
    for name, keys in tables.items():
        if rng.random() < 0.4:
            lines += [f"[{name}]", *(f"{key} = {rng.choice(_HOSTILE)}" for key in rng.sample(keys, 1))]
    whole = ("\n".join(lines) + "\n").encode()
    odd = (
        b"a = " + b"[" * 3000,
        b"a = " + b"{a=" * 3000,
        b"\xff\xfe",
        b"a.b.c = 1\na.b = 2",
        b"a" * 100_000,
        b"[" * 5000,
        b"a=1\0",
        b"\xef\xbb\xbfkeep = 0.5",
        b"a." * 3000 + b"b = 1",
    )
    way = rng.random()
    if way < 0.25:
        whole = rng.choice(odd)
    elif way < 0.45:
        whole = rng.choice(list(BYTES.values()))(rng, whole)
    (folder / "r.toml").write_bytes(whole)
    return ["--recipe", "r.toml"]


def _is_quick(key: str) -> bool:
    """Whether any value of a setting ends soon; who asks for a trillion steps gets them."""
    return key not in ("steps", "finetune_steps", "time_budget", "workers", "executor")


def flags(rng: random.Random, folder: Path) -> list[str]:
    """Hostile values on the line."""
    values = (
        "nan",
        "inf",
        "-1",
        "0",
        "99999999999999999999",
        "",
        "x",
        "1e400",
        "1,,2",
        "=",
        "image=",
        "image=nan",
        "image=1,-1",
        "image:axis=99",
        "image=" + "9," * 999 + "9",
    )
    known = (
        "--keep",
        "--seed",
        "--samples",
        "--batch-size",
        "--shape",
        "--input",
        "--cut",
        "--freeze",
        "--granularity",
        "--cache-budget",
        "--lr",
        "--holdout",
        "--round-to",
        "--task",
        "--metric",
    )
    return [word for flag in rng.sample(known, rng.choice((1, 2))) for word in (flag, rng.choice((*values, *NAMES)))]
