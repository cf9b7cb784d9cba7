"""Data sources: what they give, and what they say when a file is broken or does not fit."""

from __future__ import annotations

import io
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto
from PIL import Image

from ndonnx.config.recipe import DataRecipe
from ndonnx.data import Batch, DataSource, InputSpec, open_source
from ndonnx.data.sources import parquet
from ndonnx.data.sources.arrays import open_npz
from ndonnx.errors import DataError
from tests.helpers.models import Net

PLAIN = DataRecipe()
IMAGE = InputSpec("image", np.dtype(np.float32), ("N", 3, 8, 6))
GREY = InputSpec("image", np.dtype(np.float32), ("N", 1, 8, 6))
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


# Arrays


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_gives_arrays_and_labels(tmp_path: Path, save: Callable[..., None], order: Literal["C", "F"]) -> None:
    path = tmp_path / "calib.npz"
    save(path, x=np.asarray(vectors(), order=order), label=np.arange(7, dtype=np.int32), other="ignored")
    source = open_source(str(path), [VECTOR], PLAIN)
    assert (source.spec, source.length, source.has_labels) == (str(path), 7, True)
    batch = read(source)
    assert batch.labels is not None and batch.labels.dtype == np.int64
    np.testing.assert_array_equal(batch.labels, np.arange(7))
    np.testing.assert_array_equal(batch.inputs["x"], vectors())


def test_input_names_with_dots_and_slashes(tmp_path: Path) -> None:
    specs = [InputSpec("input.1", np.dtype(np.float32), (None, 4)), InputSpec("a/b", np.dtype(np.float32), ("N", 4))]
    arrays: dict[str, Any] = {"input.1": vectors(), "a/b": -vectors()}
    np.savez(tmp_path / "d.npz", **arrays)
    batch = read(open_source(str(tmp_path / "d.npz"), specs, PLAIN))
    np.testing.assert_array_equal(batch.inputs["a/b"], -batch.inputs["input.1"])


def test_an_input_called_label_is_an_input(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", label=vectors())
    source = open_source(str(tmp_path / "d.npz"), [InputSpec("label", np.dtype(np.float32), ("N", 4))], PLAIN)
    assert not source.has_labels
    assert read(source).inputs["label"].shape == (7, 4)


def test_npy_feeds_a_single_input_of_any_name(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", vectors().astype(np.float64))
    batch = read(open_source(str(tmp_path / "d.npy"), [VECTOR], PLAIN))
    assert batch.inputs["x"].dtype == np.float32 and batch.labels is None
    assert "'x', 'ids'" in refused(tmp_path / "d.npy", [VECTOR, TOKENS])


def test_batches_are_copies(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", vectors())
    source = open_source(str(tmp_path / "d.npy"), [VECTOR], PLAIN)
    next(source.batches(2)).inputs["x"][:] = -1
    np.testing.assert_array_equal(read(source).inputs["x"], vectors())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 20), batch_size=st.integers(1, 25), samples=st.none() | st.integers(1, 25), data=st.data())
def test_samples_come_in_order_or_by_their_numbers_with_labels_beside_inputs(
    tmp_path: Path, count: int, batch_size: int, samples: int | None, data: st.DataObject
) -> None:
    np.savez(tmp_path / "d.npz", x=vectors(count), label=np.arange(count))
    source = open_source(str(tmp_path / "d.npz"), [VECTOR], PLAIN)
    ordered = read(source, batch_size, samples)
    np.testing.assert_array_equal(ordered.inputs["x"], vectors(count)[:samples])
    rows = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=25))
    found = taken(source, rows, batch_size)
    np.testing.assert_array_equal(found.labels, rows)
    np.testing.assert_array_equal(found.inputs["x"], vectors(count)[rows])


@pytest.mark.parametrize(
    ("found", "wanted"),
    [(np.float64, np.float32), (np.float32, np.float16), (np.int32, np.int64), (np.uint8, np.int32)],
)
def test_widths_are_cast_silently(tmp_path: Path, found: type[np.generic], wanted: type[np.generic]) -> None:
    np.save(tmp_path / "d.npy", np.ones((2, 4), found))
    batch = read(open_source(str(tmp_path / "d.npy"), [InputSpec("x", np.dtype(wanted), ("N", 4))], PLAIN))
    assert batch.inputs["x"].dtype == wanted


@pytest.mark.parametrize(
    ("found", "wanted"),
    [(np.int64, np.float32), (np.float32, np.int64), (np.bool_, np.int64), (np.bool_, np.float32), ("S3", np.float32)],
)
def test_other_types_are_refused(tmp_path: Path, found: Any, wanted: type[np.generic]) -> None:
    np.save(tmp_path / "d.npy", np.zeros((2, 4), found))
    message = refused(tmp_path / "d.npy", [InputSpec("x", np.dtype(wanted), ("N", 4))])
    assert f"expected {np.dtype(wanted).name} [N, 4], found {np.dtype(found).name} [2, 4]" in message


def test_integers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    values = np.zeros((5, 4), np.int64)
    values[3, 1] = 2**40
    np.save(tmp_path / "d.npy", values)
    assert "sample 3" in refused(tmp_path / "d.npy", [InputSpec("x", np.dtype(np.int32), ("N", 4))])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_values_that_are_not_finite_name_the_first_sample(tmp_path: Path, bad: float) -> None:
    values = vectors().astype(np.float64)
    values[[4, 6], 2] = bad
    np.save(tmp_path / "d.npy", values)
    assert "'x': sample 4: NaN or Inf" in refused(tmp_path / "d.npy", [VECTOR])


def test_integers_are_not_floats_until_the_recipe_says_so(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.full((2, 4), 255, np.uint8))
    assert "set scale or dtype" in refused(tmp_path / "d.npy", [VECTOR])
    scaled = open_source(str(tmp_path / "d.npy"), [VECTOR], DataRecipe(scale=1 / 255, mean=0.5, std=0.5))
    np.testing.assert_allclose(read(scaled).inputs["x"], 1)
    cast = open_source(str(tmp_path / "d.npy"), [VECTOR], DataRecipe(dtype="float32"))
    np.testing.assert_array_equal(read(cast).inputs["x"], 255)


def test_arrays_are_normalised_by_channel_and_transposed_where_the_recipe_asks(tmp_path: Path) -> None:
    raw = np.stack([pixels(index) for index in range(4)])
    np.save(tmp_path / "d.npy", raw)
    recipe = DataRecipe(scale=1 / 255, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    assert 'layout = "NCHW"' in refused(tmp_path / "d.npy", [IMAGE], recipe)
    source = open_source(str(tmp_path / "d.npy"), [IMAGE], recipe.model_copy(update={"layout": "NCHW"}))
    wanted = (raw / 255 - [0.1, 0.2, 0.3]) / [1.0, 2.0, 4.0]
    np.testing.assert_allclose(read(source).inputs["image"], wanted.transpose(0, 3, 1, 2), atol=1e-6)
    assert "[data] mean has 2 values" in refused(
        tmp_path / "d.npy", [IMAGE], DataRecipe(mean=(1.0, 2.0), layout="NCHW")
    )


def test_wrong_shapes_say_what_was_expected_and_found(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((5, 3), np.float32))
    assert "'x': expected float32 [N, 4], found float32 [5, 3]" in refused(tmp_path / "d.npz", [VECTOR])
    np.savez(tmp_path / "d.npz", x=np.zeros((5, 4, 1), np.float32))
    assert "found float32 [5, 4, 1]" in refused(tmp_path / "d.npz", [VECTOR])


def test_wrong_keys_say_what_was_expected_and_found(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", images=vectors(), label=np.arange(7))
    message = refused(tmp_path / "d.npz", [VECTOR])
    assert "expected the keys 'x'" in message and "found 'images', 'label'" in message


def test_lengths_have_to_agree(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=vectors(7), ids=np.zeros((6, 2), np.int64))
    assert "found 'x' 7, 'ids' 6" in refused(tmp_path / "d.npz", [VECTOR, TOKENS])
    np.savez(tmp_path / "d.npz", x=vectors(7), label=np.zeros(6, np.int64))
    assert "each of 7 samples, found 6 labels" in refused(tmp_path / "d.npz", [VECTOR])


@pytest.mark.parametrize("labels", [np.zeros(7), np.zeros((7, 1), np.int64), np.array(list("abcdefg"))])
def test_labels_have_to_be_a_vector_of_integers(tmp_path: Path, labels: NDArray[np.generic]) -> None:
    np.savez(tmp_path / "d.npz", x=vectors(7), label=labels)
    assert "'label': expected integer labels [n]" in refused(tmp_path / "d.npz", [VECTOR])


def test_pickles_are_never_read(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.array([object()] * 3), allow_pickle=True)
    assert "pickled" in refused(tmp_path / "d.npy", [VECTOR])
    np.savez(tmp_path / "d.npz", x=np.array([object()] * 3), allow_pickle=True)
    assert "pickled" in refused(tmp_path / "d.npz", [VECTOR])


@pytest.mark.parametrize("name", ["d.npz", "d.npy", "d.parquet"])
def test_missing_empty_and_text_files(tmp_path: Path, name: str) -> None:
    inputs = [IMAGE]
    assert refused(tmp_path / name, inputs) == f"{tmp_path / name}: no such file"
    (tmp_path / name).touch()
    assert "empty" in refused(tmp_path / name, inputs)
    (tmp_path / name).write_text("image,label\n1,2\n" * 40)
    assert str(tmp_path / name) in refused(tmp_path / name, inputs)


@pytest.mark.parametrize("shape", ["(0, 4)", "()", "(-1, 4)", "(4611686018427387904, 4)", "(10, 4)", "('a',)"])
def test_a_header_is_checked_before_anything_is_allocated(tmp_path: Path, shape: str) -> None:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(16)
    (tmp_path / "d.npy").write_bytes(content)
    refused(tmp_path / "d.npy", [VECTOR])
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "d.npz", "w", method) as archive:
            archive.writestr("x.npy", content)
        refused(tmp_path / "d.npz", [VECTOR])


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ndonnx.data.sources.arrays.MOST_UNPACKED", 1000)
    np.savez_compressed(tmp_path / "d.npz", x=np.zeros((100, 4), np.float32))
    assert "memory to unpack" in refused(tmp_path / "d.npz", [VECTOR])
    np.savez(tmp_path / "d.npz", x=np.zeros((100, 4), np.float32))
    assert open_source(str(tmp_path / "d.npz"), [VECTOR], PLAIN).length == 100


def test_uncompressed_archives_are_memory_mapped(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=vectors())
    assert isinstance(open_npz(tmp_path / "d.npz", ["x"])["x"], np.memmap)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(["npz", "npz compressed", "npy"]))
def test_no_damage_to_an_array_file_gets_past_or_raises_anything_else(
    tmp_path: Path, data: st.DataObject, kind: str
) -> None:
    path = tmp_path / f"d.{kind[:3]}"
    if kind == "npy":
        np.save(path, vectors())
    else:
        (np.savez if kind == "npz" else np.savez_compressed)(path, x=vectors())
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    cut = data.draw(st.booleans())
    if not cut:
        content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content[:at] if cut else content)
    try:
        found = read(open_source(str(path), [VECTOR], PLAIN)).inputs["x"]
    except DataError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert found.dtype == np.float32 and found.shape[1:] == (4,)
        assert not cut
        if kind != "npy":  # which has no checksum
            np.testing.assert_array_equal(found, vectors())


# Memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_reading_a_large_file_does_not_keep_it_in_memory(tmp_path: Path, name: str) -> None:
    """A mapped file's pages count as the process's memory as long as they are mapped."""
    rows, path = 200, tmp_path / name
    array = np.zeros((rows, 250_000), np.float32)
    np.save(path, array) if path.suffix == ".npy" else np.savez(path, x=array)
    del array
    source = open_source(str(path), [InputSpec("x", np.dtype(np.float32), ("N", 250_000))], PLAIN)

    def mapped() -> int:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssFile")))

    before, most = mapped(), 0
    for _ in source.batches(4):
        most = max(most, mapped())
    assert most - before < 50_000  # of 200,000 kB


@pytest.mark.parametrize("limit", [0, 10**9])
def test_encoded_images_may_be_set_aside_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(parquet, "_IN_MEMORY", limit + 1)
    raw = [pixels(index) for index in range(9)]
    path = write_parquet(tmp_path / "d.parquet", [png(image) for image in raw], range(9))
    source = open_source(str(path), [IMAGE], PLAIN)
    whole, found = read(source), taken(source, [7, 2, 2, 8, 0])
    assert found.labels is not None and found.labels.tolist() == [7, 2, 2, 8, 0]
    np.testing.assert_array_equal(found.inputs["image"], whole.inputs["image"][[7, 2, 2, 8, 0]])


# Images


def test_images_are_normalised_as_the_recipe_says(tmp_path: Path) -> None:
    raw = [pixels(index) for index in range(5)]
    path = write_parquet(tmp_path / "d.parquet", [png(image) for image in raw], [4, 3, 2, 1, 0])
    recipe = DataRecipe(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    wanted = (np.stack(raw) / 255 - np.array(recipe.mean)) / np.array(recipe.std)
    batch = read(open_source(str(path), [IMAGE], recipe))
    assert batch.labels is not None and batch.labels.tolist() == [4, 3, 2, 1, 0]
    assert batch.inputs["image"].flags.c_contiguous and batch.inputs["image"].dtype == np.float32
    np.testing.assert_allclose(batch.inputs["image"], wanted.transpose(0, 3, 1, 2), atol=1e-5)
    last = InputSpec("image", np.dtype(np.float16), ("N", 8, 6, 3))
    found = read(open_source(str(path), [last], recipe)).inputs["image"]
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, wanted, atol=1e-2)


def test_raw_pixels_for_an_integer_input(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "d.parquet", [png(pixels(0))])
    spec = InputSpec("image", np.dtype(np.uint8), ("N", 8, 6, 3))
    np.testing.assert_array_equal(read(open_source(str(path), [spec], PLAIN)).inputs["image"][0], pixels(0))
    assert "raw pixels" in refused(path, [spec], DataRecipe(mean=0.5))


def test_images_are_resized_and_turned_grey(tmp_path: Path) -> None:
    large = np.full((16, 24, 3), 51, np.uint8)
    transparent = np.dstack([large, np.full((16, 24), 7, np.uint8)])
    path = write_parquet(tmp_path / "d.parquet", [png(large), png(transparent), png(large[..., 0])])
    np.testing.assert_allclose(read(open_source(str(path), [GREY], PLAIN)).inputs["image"], 0.2, atol=1e-6)
    dynamic = InputSpec("image", np.dtype(np.float32), ("N", 3, "H", "W"))
    assert read(open_source(str(path), [dynamic], PLAIN)).inputs["image"].shape == (3, 3, 16, 24)
    sized = open_source(str(path), [dynamic], DataRecipe(size=(4, 5)))
    assert read(sized).inputs["image"].shape == (3, 3, 4, 5)


def test_a_size_that_contradicts_the_model(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "d.parquet", [png(pixels(0))])
    assert "size = [9, 6] does not fit" in refused_anywhere(path, [IMAGE], DataRecipe(size=(9, 6)))
    assert "no input of the model is an image" in refused_anywhere(path, [VECTOR], DataRecipe(size=(9, 6)))
    assert "dtype = 'float64'" in refused_anywhere(path, [IMAGE], DataRecipe(dtype="float64"))
    assert "not the name of a numpy type" in refused_anywhere(path, [IMAGE], DataRecipe(dtype="float33"))


def refused_anywhere(spec: object, inputs: list[InputSpec], recipe: DataRecipe) -> str:
    with pytest.raises(DataError) as caught:
        open_source(str(spec), inputs, recipe)
    return str(caught.value)


def test_images_of_several_sizes_need_a_size(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "d.parquet", [png(pixels(0)), png(pixels(1, (9, 9)))])
    dynamic = InputSpec("image", np.dtype(np.float32), ("N", 3, "H", "W"))
    message = refused(path, [dynamic])
    assert "row 1" in message and "set size under [data]" in message


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (("N", 4, 8, 6), "1 or 3 channels"),
        (("N", 4), "rank 4"),
        (("N", "C", "H", "W"), "set layout"),
    ],
)
def test_models_that_take_no_images(tmp_path: Path, shape: tuple[str | int, ...], words: str) -> None:
    path = write_parquet(tmp_path / "d.parquet", [png(pixels(0))])
    assert words in refused(path, [InputSpec("image", np.dtype(np.float32), shape)])


def test_a_model_of_several_inputs_takes_no_images(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "d.parquet", [png(pixels(0))])
    assert "the model has 2" in refused(path, [IMAGE, VECTOR])


@pytest.mark.parametrize("image", [b"", b"not an image", png(pixels(0))[:60], png(pixels(0))[:-30], b"%!PS-Adobe-3.0"])
def test_a_corrupt_image_names_its_row(tmp_path: Path, image: bytes) -> None:
    path = write_parquet(tmp_path / "d.parquet", [png(pixels(0))] * 6 + [image])
    assert refused(path, [IMAGE]).startswith(f"{path}: row 6: cannot decode the image")


def test_an_image_that_declares_too_many_pixels(tmp_path: Path) -> None:
    bomb = bytearray(png(pixels(0)))
    bomb[16:24] = struct.pack(">II", 12_000, 12_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    path = write_parquet(tmp_path / "d.parquet", [bytes(bomb)])
    message = refused(path, [IMAGE])
    assert "row 0" in message and "144000000 pixels" in message


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damaged_image_raises_anything_else(tmp_path: Path, data: st.DataObject) -> None:
    buffer = io.BytesIO()
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]))
    Image.fromarray(pixels(0)).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = write_parquet(tmp_path / "d.parquet", [bytes(content[: data.draw(st.integers(1, len(content)))])])
    try:
        assert read(open_source(str(path), [IMAGE], PLAIN)).inputs["image"].shape == (1, 3, 8, 6)
    except DataError as error:
        assert "row 0" in str(error)


# Parquet


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_parquet_streams_across_row_groups_and_gives_rows_by_number(tmp_path: Path, batch_size: int) -> None:
    raw = [np.full((8, 6, 3), index * 10, np.uint8) for index in range(11)]
    source = open_source(
        str(write_parquet(tmp_path / "d.parquet", [png(image) for image in raw], list(range(11)))), [IMAGE], PLAIN
    )
    assert (source.length, source.has_labels) == (11, True)
    ordered = read(source, batch_size, samples=9)
    assert ordered.labels is not None and ordered.labels.tolist() == list(range(9))
    drawn = taken(source, [7, 0, 10, 3, 2], batch_size)
    assert drawn.labels is not None and drawn.labels.tolist() == [7, 0, 10, 3, 2]
    np.testing.assert_allclose(drawn.inputs["image"][:, 0, 0, 0], drawn.labels * 10 / 255, atol=1e-6)


def test_parquet_columns(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"img": [1], "label": [1]}), path)
    assert "expected a column 'image'" in refused(path, [IMAGE]) and "img: int64" in refused(path, [IMAGE])
    pq.write_table(pa.table({"image": [b"x"]}), path)
    assert "struct<bytes: binary, path: string>, found binary" in refused(path, [IMAGE])
    pq.write_table(pa.table({"image": [{"bytes": b"x"}], "label": ["cat"]}), path)
    assert "expected integers in 'label', found string" in refused(path, [IMAGE])
    assert "no samples" in refused(write_parquet(path, []), [IMAGE])


def test_parquet_nulls_name_their_row(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    assert "row 1: image.bytes is null" in refused(write_parquet(path, [png(pixels(0)), None]), [IMAGE])
    image = png(pixels(0))
    assert "row 1: the label is null" in refused(write_parquet(path, [image, image], [0, None]), [IMAGE])


def test_a_truncated_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "d.parquet", [png(pixels(index)) for index in range(9)])
    path.write_bytes(path.read_bytes()[:-20])
    assert "not a readable .parquet" in refused(path, [IMAGE])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3))
def test_no_damage_to_a_parquet_file_raises_anything_else(tmp_path: Path, damage: list[tuple[float, int]]) -> None:
    path = write_parquet(tmp_path / "d.parquet", [png(pixels(index)) for index in range(5)], list(range(5)))
    content = bytearray(path.read_bytes())
    for place, value in damage:
        content[int(place * len(content))] = value
    path.write_bytes(content)
    try:
        assert len(read(open_source(str(path), [IMAGE], PLAIN))) == 5
    except DataError as error:
        assert str(path) in str(error) and "\n" not in str(error)


# Folders


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    for index, name in enumerate(["dog/2.png", "cat/1.png", "dog/1.png", "bird/deep/9.PNG"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 6, 3), index * 51, np.uint8)).save(tmp_path / name)
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    (tmp_path / ".git").mkdir()
    source = open_source(str(tmp_path), [IMAGE], PLAIN)
    batch = read(source)
    assert batch.labels is not None and batch.labels.tolist() == [0, 1, 2, 2]
    np.testing.assert_allclose(batch.inputs["image"][:, 0, 0, 0], [0.6, 0.2, 0.4, 0.0], atol=1e-6)


def test_images_directly_inside_are_unlabelled(tmp_path: Path) -> None:
    assert "holds no samples" in refused(tmp_path, [IMAGE])
    (tmp_path / "1.png").write_bytes(png(pixels(0)))
    source = open_source(str(tmp_path), [IMAGE], PLAIN)
    assert (source.length, source.has_labels, read(source).labels) == (1, False, None)
    (tmp_path / "cat").mkdir()
    assert not open_source(str(tmp_path), [IMAGE], PLAIN).has_labels
    (tmp_path / "cat" / "2.png").write_bytes(b"corrupt")
    assert "one or the other" in refused(tmp_path, [IMAGE])
    (tmp_path / "1.png").unlink()
    assert str(tmp_path / "cat" / "2.png") in refused(tmp_path, [IMAGE])


# Functions


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of a module in the current directory with many functions to read data from."""
    name = f"loader_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(
        "import numpy as np\n"
        "def rows(n): return np.arange(n * 4, dtype=np.float32).reshape(n, 4)\n"
        "def samples(): return ({'x': row} for row in rows(7))\n"
        "def labelled(): return [({'x': row}, i) for i, row in enumerate(rows(7))]\n"
        "def uneven(): return (({'x': rows(7)[a:b]}, list(range(a, b))) for a, b in [(0, 5), (5, 5), (5, 6), (6, 7)])\n"
        "def nothing(): return []\n"
        "def number(): return 3\n"
        "def arrays(): return [rows(2)]\n"
        "def wrong_key(): return [{'y': rows(2)}]\n"
        "def wrong_shape(): return [{'x': rows(2)[:, :3]}]\n"
        "def ragged(): return [{'x': [[1.0, 2.0], [1.0]]}]\n"
        "def bad_labels(): return [({'x': rows(2)}, [1])]\n"
        "def some_labels(): return [({'x': rows(2)}, [1, 2]), {'x': rows(2)}]\n"
        "def late_nan(): return [{'x': rows(2)}, {'x': rows(2) * np.float32('nan')}]\n"
        "def raises():\n"
        "    yield {'x': rows(2)}\n"
        "    raise KeyError('lost\\nin two lines')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.parametrize("function", ["samples", "labelled", "uneven"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_functions_give_samples_or_batches(module: str, function: str, batch_size: int) -> None:
    source = open_source(f"{module}:{function}", [VECTOR], PLAIN)
    assert source.length is None and source.has_labels == (function != "samples")
    for samples in (None, 5):
        batch = read(source, batch_size, samples)
        np.testing.assert_array_equal(batch.inputs["x"], vectors()[:samples])
        if batch.labels is not None:
            np.testing.assert_array_equal(batch.labels, np.arange(7)[:samples])


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("nothing", "no samples"),
        ("number", "TypeError"),
        ("arrays", "found ndarray"),
        ("wrong_key", "expected the inputs ['x'], found ['y']"),
        ("wrong_shape", "item 0: 'x': expected float32 [N, 4], found float32 [2, 3]"),
        ("ragged", "cannot be read as an array"),
        ("bad_labels", "each of 2 samples, found 1 labels"),
        ("some_labels", "some items have a label"),
        ("late_nan", "sample 2: NaN"),
        ("raises", "KeyError"),
        ("absent", "has no function 'absent'; it has ['rows', 'samples'"),
        ("np", "has no function 'np'"),
    ],
)
def test_functions_that_do_not_fit(module: str, function: str, words: str) -> None:
    assert words in refused(f"{module}:{function}", [VECTOR])


def test_modules_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "cannot import 'no_such_module'" in refused("no_such_module:f", [VECTOR])
    Path("broken_loader.py").write_text("1 +\n")
    assert "SyntaxError" in refused("broken_loader:f", [VECTOR])


# Made up


@pytest.mark.parametrize("kind", ["gaussian", "smooth", "leaves"])
def test_made_up_samples_depend_on_nothing_but_the_seed(kind: str) -> None:
    inputs = [IMAGE, InputSpec("z", np.dtype(np.float16), (1, 5))]
    source = open_source(f"{kind}:500", inputs, PLAIN, seed=3)
    assert (source.length, source.has_labels) == (500, False)
    one, other = read(source, 7).inputs, read(source, 500).inputs
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    assert one["z"].dtype == np.float16 and one["z"].shape == (500, 5)
    assert one["image"].dtype == np.float32 and one["image"].shape == (500, 3, 8, 6)
    assert abs(one["image"].mean()) < 0.1 and abs(one["image"].std() - 1) < 0.1
    np.testing.assert_allclose(one["z"].astype(np.float64).std(axis=0), 1, atol=0.12)
    np.testing.assert_array_equal(taken(source, [400, 3]).inputs["z"], one["z"][[400, 3]])
    assert not np.array_equal(read(open_source(f"{kind}:500", inputs, PLAIN, seed=4)).inputs["image"], one["image"])
    assert open_source(kind, inputs, PLAIN).length == 20_000


@pytest.mark.parametrize("kind", ["gaussian", "smooth", "leaves"])
@pytest.mark.parametrize("count", ["0", "-3", "x", "1.5", "", "9" * 5000, "²"])
def test_made_up_samples_need_a_count(kind: str, count: str) -> None:
    message = refused(f"{kind}:{count}", [VECTOR])
    assert f"expected {kind}:N with a number of samples N" in message


def test_an_unknown_kind_of_made_up_samples_lists_the_known_ones() -> None:
    assert "gaussian, smooth, leaves" in refused("perlin", [VECTOR])
    assert "gaussian, smooth, leaves" in refused("perlin:-3", [VECTOR])


def test_made_up_samples_or_a_path_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("leaves").mkdir()
    Path("leaves", "1.png").write_bytes(png(pixels(0)))
    assert "write leaves:20000 or" in refused("leaves", [IMAGE])
    assert open_source("./leaves", [IMAGE], PLAIN).length == 1
    assert open_source("leaves:7", [IMAGE], PLAIN).length == 7


def test_made_up_pictures_go_through_the_preprocessing_of_real_ones() -> None:
    recipe = DataRecipe(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    plain = read(open_source("leaves:60", [IMAGE], PLAIN)).inputs["image"]
    pixels = 0.5 + 0.25 * plain
    assert pixels.min() == 0 and pixels.max() == 1
    mean, std = (np.asarray(part).reshape(3, 1, 1) for part in (recipe.mean, recipe.std))
    shown = read(open_source("leaves:60", [IMAGE], recipe)).inputs["image"]
    np.testing.assert_allclose(shown, (pixels - mean) / std, atol=1e-5)
    bytes_ = read(open_source("leaves:60", [IMAGE], DataRecipe(scale=1.0, mean=127.0, std=128.0))).inputs["image"]
    np.testing.assert_allclose(bytes_, (255 * pixels - 127) / 128, atol=1e-4)
    turned = InputSpec("image", np.dtype(np.uint8), ("N", 8, 6, 3))
    raw = read(open_source("leaves:60", [turned], PLAIN)).inputs["image"]
    np.testing.assert_allclose(raw, 255 * pixels.transpose(0, 2, 3, 1), atol=0.51)


@pytest.mark.parametrize(
    "shape", [("N", 7), ("N", 1, 50), ("N", 3, 1, 1), ("N", 2, 3, 8, 8), (1, 12, 3), ("N", 1, 2, 2)]
)
@pytest.mark.parametrize("kind", ["smooth", "leaves"])
def test_made_up_samples_for_inputs_that_are_no_images(kind: str, shape: tuple[int | str, ...]) -> None:
    values = read(open_source(f"{kind}:400", [InputSpec("x", np.dtype(np.float32), shape)], PLAIN)).inputs["x"]
    assert values.shape[1:] == shape[1:] and np.isfinite(values).all()
    assert 0.4 < values.std() < 1.2


def test_columns_of_a_made_up_table_depend_on_each_other() -> None:
    table = read(open_source("leaves:3000", [InputSpec("x", np.dtype(np.float32), ("N", 8))], PLAIN)).inputs["x"]
    np.testing.assert_allclose(table.std(axis=0), 1, atol=0.06)
    off = np.corrcoef(table.T)[np.triu_indices(8, 1)]
    assert np.abs(off).max() > 0.3 and np.abs(off).max() < 0.6


def test_made_up_samples_need_floats_of_known_size() -> None:
    dynamic = InputSpec("image", np.dtype(np.float32), ("N", 3, None, "W"))
    for kind in ("gaussian", "leaves"):
        assert "dimension 2 (?)" in refused(kind, [dynamic])
        assert "set size = [height, width] under [data]" in refused(kind, [dynamic])
        source = open_source(f"{kind}:2", [dynamic], DataRecipe(size=(4, 5)))
        assert read(source).inputs["image"].shape == (2, 3, 4, 5)
        assert "give data" in refused(kind, [InputSpec("x", np.dtype(np.float32), ("N", "features"))])
        assert "holds no floats" in refused(kind, [TOKENS])
        assert "check the model" in refused(kind, [InputSpec("x", np.dtype(np.float32), ("N", 2**40))])


def test_made_up_tokens_are_rows_of_the_table_in_which_they_are_looked_up() -> None:
    net = Net()
    ids = net.input("ids", "N", 12, dtype=TensorProto.INT32)
    mask = net.input("mask", "N", 12, dtype=TensorProto.INT64)
    x = net.op("Gather", net.weight("table", 30, 4), net.op("Cast", ids, to=TensorProto.INT64))
    graph = ir.from_proto(net.proto(x, net.op("Neg", mask))).graph
    inputs = [InputSpec("ids", np.dtype(np.int32), ("N", 12)), InputSpec("mask", np.dtype(np.int64), ("N", 12))]
    source = open_source("leaves:200", inputs, PLAIN, seed=1, graph=graph)
    one, other = read(source, 9).inputs, read(source, 200).inputs
    assert one["ids"].dtype == np.int32
    assert (one["ids"].min(), one["ids"].max()) == (0, 29)
    np.testing.assert_array_equal(one["ids"], other["ids"])
    assert (one["mask"] == 1).all() and len(np.unique(one["ids"], axis=0)) == 200


# All of them


def test_unknown_sources_list_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("1,2")
    for spec in (str(tmp_path / "d.csv"), "nowhere", "", "a:b:c", "bad\0name", "x" * 5000):
        message = refused(spec, [VECTOR])
        assert "a .npz or .npy file, a directory of images, module:function" in message or "cannot be read" in message


def test_inputs_without_a_sample_axis() -> None:
    assert "no axis for the samples" in refused("gaussian", [InputSpec("x", np.dtype(np.float32), ())])


def test_fingerprints_follow_content_and_preprocessing(tmp_path: Path, module: str) -> None:
    def digest(spec: object, recipe: DataRecipe = PLAIN, seed: int = 0) -> str:
        return open_source(str(spec), [VECTOR], recipe, seed=seed).fingerprint()

    np.save(tmp_path / "a.npy", vectors())
    np.save(tmp_path / "b.npy", vectors())
    np.save(tmp_path / "c.npy", vectors() + 1)
    assert digest(tmp_path / "a.npy") == digest(tmp_path / "b.npy") != digest(tmp_path / "c.npy")
    assert digest(tmp_path / "a.npy") != digest(tmp_path / "a.npy", DataRecipe(mean=0.5))
    assert len({digest("gaussian:5"), digest("gaussian:6"), digest("gaussian:5", seed=1), digest("leaves:5")}) == 4
    assert digest(f"{module}:samples") != digest(f"{module}:labelled")
    before = digest(f"{module}:samples")
    with Path(f"{module}.py").open("a") as file:
        file.write("# changed\n")
    assert digest(f"{module}:samples") != before
    assert re.fullmatch("[0-9a-f]{32}", before)


def test_the_fingerprint_of_a_folder_follows_names_and_bytes(tmp_path: Path) -> None:
    def digest() -> str:
        return open_source(str(tmp_path), [IMAGE], PLAIN).fingerprint()

    (tmp_path / "1.png").write_bytes(png(pixels(0)))
    digests = [digest()]
    (tmp_path / "1.png").write_bytes(png(pixels(1)))
    digests.append(digest())
    (tmp_path / "1.png").rename(tmp_path / "2.png")
    digests.append(digest())
    assert len(set(digests)) == 3
