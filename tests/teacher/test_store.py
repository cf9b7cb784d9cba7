"""The activation store: what is written comes back, and damage is met by name."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ndonnx.errors import RunDirError
from ndonnx.teacher.blocks import CHUNK, checksum, is_finite
from ndonnx.teacher.manifest import MANIFEST
from ndonnx.teacher.store import ActivationStore

NAMES = ("layer/1:0", "../../etc/passwd", "a" * 500, "naïve \n value", "")


def write(directory: Path, arrays: dict[str, np.ndarray], batch: int = 3) -> ActivationStore:
    samples = len(next(iter(arrays.values())))
    shapes = {name: (array.dtype, array.shape[1:]) for name, array in arrays.items()}
    writer = ActivationStore.create(directory, shapes, samples)
    for start in range(0, samples, batch):
        for name, array in arrays.items():
            writer.append(name, array[start : start + batch])
    return writer.finish()


def only_file(directory: Path) -> Path:
    (path,) = directory.glob("*.npy")
    return path


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((10, 3, 5)).astype(np.float32)


def test_values_come_back_whatever_they_are_called(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    arrays = {name: rng.standard_normal((7, 3)).astype(np.float16) for name in NAMES}
    directory = tmp_path / "in" / "store"
    write(directory, arrays)
    store = ActivationStore.open(directory)
    assert store.names == NAMES
    assert store.samples == 7
    assert store.nbytes == len(NAMES) * 7 * 3 * 2
    for name, array in arrays.items():
        np.testing.assert_array_equal(store.array(name), array)
        store.verify(name)
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {directory}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.lists(st.integers(0, 29), max_size=40), st.booleans(), st.sampled_from(["f2", "i8", "?"]))
def test_rows_are_read_as_numpy_takes_them(samples: int, rows: list[int], in_order: bool, dtype: str) -> None:
    array = np.arange(samples * 6).reshape(samples, 2, 3).astype(dtype)
    wanted = np.array(sorted(rows) if in_order else rows, np.int64) % samples
    with tempfile.TemporaryDirectory() as folder:
        stored = write(Path(folder), {"x": array}).rows("x")
        assert (len(stored), stored.shape, stored.dtype, stored.ndim) == (samples, array.shape, array.dtype, 3)
        found = stored[wanted]
        np.testing.assert_array_equal(found, array[wanted])
        assert found.flags.writeable
        np.testing.assert_array_equal(stored[1:7], array[1:7])
        np.testing.assert_array_equal(stored[:0], array[:0])
        with pytest.raises(IndexError):
            stored[np.array([samples])]


def test_rows_of_a_file_that_has_become_shorter_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    stored = write(tmp_path, {"x": values}).rows("x")
    os.truncate(only_file(tmp_path), only_file(tmp_path).stat().st_size - 1)
    with pytest.raises(RunDirError, match="ends early; capture again"):
        stored[len(stored) - 1 :]


def test_a_constant_has_no_rows(tmp_path: Path) -> None:
    writer = ActivationStore.create(tmp_path, {}, 3)
    writer.add_constant("table", np.zeros((2, 2), np.float32))
    with pytest.raises(RunDirError, match="'table' has no rows"):
        writer.finish().rows("table")


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float16", "float32", "float64"])
def test_every_type_is_a_plain_npy_file(tmp_path: Path, dtype: str) -> None:
    array = (np.arange(24).reshape(4, 2, 3) % 5).astype(dtype)
    write(tmp_path, {"x": array})
    loaded = np.load(only_file(tmp_path), mmap_mode="r", allow_pickle=False)
    assert loaded.dtype == dtype
    np.testing.assert_array_equal(loaded, array)


def test_reads_are_read_only_views_of_the_file(tmp_path: Path, values: np.ndarray) -> None:
    store = write(tmp_path, {"x": values})
    block = store.read("x", 4, 9)
    np.testing.assert_array_equal(block, values[4:9])
    assert np.shares_memory(block, store.array("x"))
    with pytest.raises(ValueError, match="read-only"):
        block[0] = 0
    store.release()
    np.testing.assert_array_equal(block, values[4:9])
    with pytest.raises(IndexError, match="4:11 of 10"):
        store.read("x", 4, 11)


@given(
    hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.int8, np.float64]),
        hnp.array_shapes(min_dims=1, max_dims=3, max_side=9),
    ),
    st.integers(1, 10),
)
@settings(max_examples=40, deadline=None)
def test_any_array_in_any_batches_survives(
    tmp_path_factory: pytest.TempPathFactory, array: np.ndarray, batch: int
) -> None:
    store = write(tmp_path_factory.mktemp("store"), {"x": array}, batch)
    np.testing.assert_array_equal(store.array("x"), array)
    store.verify("x")
    assert (store.nonfinite == ()) == (array.dtype.kind != "f" or bool(np.isfinite(array).all()))


@given(st.sampled_from([np.float16, np.float32, np.float64]), st.binary(min_size=8, max_size=64))
@settings(deadline=None)
def test_finite_agrees_with_numpy_on_any_bits(dtype: type[np.floating], data: bytes) -> None:
    array = np.frombuffer(data[: len(data) - len(data) % 8], dtype)
    assert is_finite(array) == bool(np.isfinite(array).all())


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, -np.nan])
def test_one_bad_element_among_extremes_is_found(bad: float) -> None:
    for dtype in (np.float16, np.float32, np.float64):
        info = np.finfo(dtype)
        array = np.full(2 * CHUNK // info.dtype.itemsize + 7, info.max, dtype)
        array[1::2] = info.min
        assert is_finite(array)
        array[-1] = bad
        assert not is_finite(array)


@given(st.binary(min_size=1, max_size=100), st.data())
@settings(deadline=None)
def test_checksum_sees_every_changed_bit(data: bytes, draw: st.DataObject) -> None:
    array = np.frombuffer(data, np.uint8)
    changed = array.copy()
    changed[draw.draw(st.integers(0, len(data) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    assert checksum(array, 0) != checksum(changed, 0)


def test_checksum_sees_exchanged_chunks_and_moved_blocks() -> None:
    one, two = np.zeros(CHUNK, np.uint8), np.ones(CHUNK, np.uint8)
    assert checksum(np.concatenate([one, two]), 0) != checksum(np.concatenate([two, one]), 0)
    assert checksum(two, 0) != checksum(two, 64)


def test_a_flipped_bit_is_found_and_named(tmp_path: Path, values: np.ndarray) -> None:
    store = write(tmp_path, {"x": values})
    flip(only_file(tmp_path), -1)
    with pytest.raises(RunDirError, match=r"'x' is damaged in samples 9 to 10"):
        store.verify("x")


def test_exchanged_blocks_are_found(tmp_path: Path, values: np.ndarray) -> None:
    store = write(tmp_path, {"x": values}, batch=5)
    path = only_file(tmp_path)
    data, half = path.read_bytes(), values.nbytes // 2
    path.write_bytes(data[: -2 * half] + data[-half:] + data[-2 * half : -half])
    with pytest.raises(RunDirError, match="samples 0 to 5"):
        store.verify("x")


@pytest.mark.parametrize("change", [-1, 1, -10_000])
def test_a_file_of_another_length_is_refused(tmp_path: Path, values: np.ndarray, change: int) -> None:
    write(tmp_path, {"x": values})
    path = only_file(tmp_path)
    os.truncate(path, max(0, path.stat().st_size + change))
    with pytest.raises(RunDirError, match=r"value 'x' has \d+ bytes instead of"):
        ActivationStore.open(tmp_path)


def test_a_changed_header_is_refused(tmp_path: Path, values: np.ndarray) -> None:
    write(tmp_path, {"x": values})
    path = only_file(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"<f4", b"|O4", 1))
    with pytest.raises(RunDirError, match="not the array that the manifest describes"):
        ActivationStore.open(tmp_path)


def test_a_missing_file_is_refused(tmp_path: Path, values: np.ndarray) -> None:
    write(tmp_path, {"x": values})
    only_file(tmp_path).unlink()
    with pytest.raises(RunDirError, match="cannot read value 'x'"):
        ActivationStore.open(tmp_path)


def test_without_its_manifest_a_folder_is_no_store(tmp_path: Path, values: np.ndarray) -> None:
    writer = ActivationStore.create(tmp_path, {"x": (np.float32, (3, 5))}, 10)
    writer.append("x", values)
    with pytest.raises(RunDirError, match="no finished activation store"):
        ActivationStore.open(tmp_path)


def test_any_change_of_the_manifest_is_noticed(tmp_path: Path, values: np.ndarray) -> None:
    write(tmp_path, {"x": values})
    path = tmp_path / MANIFEST
    whole = path.read_bytes()
    for offset in range(len(whole)):
        flip(path, offset)
        with pytest.raises(RunDirError):
            ActivationStore.open(tmp_path)
        path.write_bytes(whole)
    path.write_bytes(whole[:-20])
    with pytest.raises(RunDirError, match="damaged"):
        ActivationStore.open(tmp_path)
    path.write_bytes(whole)
    assert ActivationStore.open(tmp_path).names == ("x",)


def test_a_manifest_cannot_point_outside(tmp_path: Path, values: np.ndarray) -> None:
    directory = tmp_path / "store"
    write(directory, {"x": values})
    only_file(directory).rename(tmp_path / "v00000.npy")
    path = directory / MANIFEST
    path.write_text(path.read_text().replace("v00000.npy", "../v00000.npy"))
    with pytest.raises(RunDirError, match="damaged"):
        ActivationStore.open(directory)


def test_creating_again_takes_the_old_store_away_but_nothing_else(tmp_path: Path, values: np.ndarray) -> None:
    write(tmp_path, {"x": values, "y": values})
    (tmp_path / "mine.npy").write_bytes(b"kept")
    writer = ActivationStore.create(tmp_path, {"x": (np.float32, (3, 5))}, 10)
    with pytest.raises(RunDirError, match="no finished"):
        ActivationStore.open(tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 2
    writer.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.npy"]


def test_drop_and_remove_free_the_disk(tmp_path: Path, values: np.ndarray) -> None:
    directory = tmp_path / "store"
    store = write(directory, {"x": values, "y": values})
    held = store.array("x")
    store.drop("x")
    np.testing.assert_array_equal(held, values)
    assert ActivationStore.open(directory).names == ("y",)
    assert len(list(directory.glob("*.npy"))) == 1
    with pytest.raises(RunDirError, match="no value 'x'"):
        store.array("x")
    store.remove()
    assert not directory.exists()


def test_a_constant_is_read_whole_for_any_samples(tmp_path: Path) -> None:
    mask = np.tril(np.ones((1, 1, 4, 4), bool))
    writer = ActivationStore.create(tmp_path, {}, 100)
    writer.add_constant("mask", mask)
    store = writer.finish({"loop": "it is a list"})
    assert store.is_constant("mask")
    np.testing.assert_array_equal(store.read("mask", 10, 20), mask)
    store.verify("mask")
    assert store.nbytes == 16
    with pytest.raises(RunDirError, match="it is a list"):
        store.read("loop", 0, 1)
    flip(only_file(tmp_path), -1)
    with pytest.raises(RunDirError, match="'mask' is damaged"):
        ActivationStore.open(tmp_path).verify("mask")


def test_a_store_is_not_finished_before_all_samples_are_there(tmp_path: Path, values: np.ndarray) -> None:
    writer = ActivationStore.create(tmp_path, {"x": (np.float32, (3, 5))}, 10)
    writer.append("x", values[:9])
    with pytest.raises(ValueError, match="9 of 10"):
        writer.finish()
    with pytest.raises(ValueError, match="does not fit"):
        writer.append("x", values[:2])
    with pytest.raises(ValueError, match="does not fit"):
        writer.append("x", values[:1].astype(np.float16))


def test_a_disk_too_small_is_met_when_the_store_is_created(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=r"disk is full|cannot write activations"):
        ActivationStore.create(tmp_path, {"x": (np.float32, (2**40,))}, 2**12)


def test_a_write_that_fails_midway_is_told_on_one_line(tmp_path: Path, values: np.ndarray) -> None:
    resource = pytest.importorskip("resource")
    writer = ActivationStore.create(tmp_path, {"x": (np.float32, (3, 5))}, 10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(RunDirError, match=os.strerror(errno.EFBIG)):
            writer.append("x", values)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").write_bytes(b"")
    with pytest.raises(RunDirError, match="cannot write activations"):
        ActivationStore.create(tmp_path / "store", {}, 1)
