"""Data sources: what they give, and what they say when a file is broken or does not fit."""

from __future__ import annotations

import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ndonnx.config.recipe import DataRecipe
from ndonnx.data import InputSpec, open_source
from ndonnx.data.sources import parquet
from ndonnx.data.sources.arrays import open_npz
from ndonnx.errors import DataError
from tests.helpers.data_files import (
    IMAGE,
    PLAIN,
    TOKENS,
    VECTOR,
    pixels,
    png,
    read,
    refused,
    taken,
    vectors,
    write_parquet,
)

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


@pytest.mark.parametrize(
    "shape",
    ["(0, 4)", "()", "(-1, 4)", "(4611686018427387904, 4)", "(10, 4)", "('a',)", "(True,)", "(1, True)", "(1.0, 4)"],
)
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
