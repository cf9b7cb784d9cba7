"""Images, in files, folders and Parquet: decoded, scaled as the recipe says, refused by their row."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ndonnx.config.recipe import DataRecipe
from ndonnx.data import InputSpec, open_source
from ndonnx.errors import DataError
from tests.helpers.data_files import (
    IMAGE,
    PLAIN,
    VECTOR,
    pixels,
    png,
    read,
    refused,
    taken,
    write_parquet,
)

GREY = InputSpec("image", np.dtype(np.float32), ("N", 1, 8, 6))
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
