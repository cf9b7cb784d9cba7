"""The samples that are told as the worst are the worst, in whatever batches they come; their pictures are theirs."""

from __future__ import annotations

import errno
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import ndonnx
from ndonnx.config.recipe import DataRecipe
from ndonnx.data import input_specs, open_source
from ndonnx.errors import RunDirError
from ndonnx.metrics.evaluation import evaluate
from ndonnx.metrics.worst import FOLDER, MOST, Worst, WorstSample, draw
from ndonnx.report.receipt.document import RunDocument
from ndonnx.teacher import make_session
from tests.helpers.models import residual_cnn
from tests.helpers.runs import Bench


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.integers(1, 20))
def test_the_worst_are_found_in_any_batches(errors: list[float], size: int) -> None:
    found, every = Worst(), np.array(errors)
    for start in range(0, len(every), size):
        part = every[start : start + size]
        found.add(start, part, {"x": np.arange(start, start + len(part))[:, None]})
    told = found.result(lambda error: error)
    expected = sorted(range(len(errors)), key=lambda i: (-errors[i], i))[:MOST]
    assert [sample.sample for sample in told] == expected
    assert all(sample.nmse == errors[sample.sample] for sample in told)
    assert all(sample.inputs["x"].tolist() == [sample.sample] for sample in told)


def test_what_is_not_a_number_is_the_worst_and_has_no_figure() -> None:
    found = Worst()
    found.add(0, np.array([1.0, np.nan, 2.0]), {}, (np.array([3, 4, 5]), np.array([6, 7, 8])))
    told = found.result(lambda error: error)
    assert told == (WorstSample(1, math.inf, 7, 4), WorstSample(2, 2.0, 8, 5), WorstSample(0, 1.0, 6, 3))
    assert told[0].to_json() == {"sample": 1, "nmse": None, "teacher": 7, "student": 4, "picture": None}


@pytest.mark.parametrize("shape", [(3, 8, 6), (1, 300, 200), (8, 6, 3), (4, 8, 8)])
def test_pictures_show_the_image_from_its_least_to_its_largest_value(tmp_path: Path, shape: tuple[int, ...]) -> None:
    image = np.linspace(-2.0, 3.0, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    axes = (1, 2) if shape[-1] == 3 else (2, 3)
    (drawn,) = draw([WorstSample(5, 0.1, inputs={"x": image})], {"x": axes}, tmp_path)
    assert drawn.picture == f"{FOLDER}/5.png"
    picture = Image.open(tmp_path / FOLDER / "5.png")
    height, width = (shape[axis - 1] for axis in axes)
    assert picture.width / picture.height == pytest.approx(width / height, rel=0.05)
    assert 90 <= max(picture.size) <= 256
    pixels = np.asarray(picture)
    assert pixels.ndim == (2 if shape[0] == 1 else 3) and pixels.min() <= 2
    assert pixels.max() >= (253 if shape[0] != 4 else 180), "of four channels the last is not drawn"


def test_flat_and_broken_images_are_drawn_and_what_is_no_image_is_not(tmp_path: Path) -> None:
    flat = WorstSample(1, 0.1, inputs={"x": np.full((3, 4, 4), 7.0, np.float32)})
    broken = WorstSample(2, 0.1, inputs={"x": np.array([[[np.nan, 1.0]]], np.float32)})
    drawn = list(draw([flat, broken], {"x": (2, 3)}, tmp_path))
    assert all((tmp_path / (sample.picture or "")).is_file() for sample in drawn)
    ids = WorstSample(3, 0.1, inputs={"ids": np.arange(4)})
    assert list(draw([ids], {}, tmp_path)) == [ids]


def test_a_picture_that_cannot_be_written_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = WorstSample(1, 0.1, inputs={"x": np.zeros((3, 4, 4), np.float32)})
    (tmp_path / "file").touch()
    with pytest.raises(RunDirError):
        list(draw([sample], {"x": (2, 3)}, tmp_path / "file"))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(RunDirError, match="No space left"):
        list(draw([sample], {"x": (2, 3)}, tmp_path))
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_an_evaluation_tells_the_worst_by_their_numbers_in_the_data(tmp_path: Path) -> None:
    bench = Bench(tmp_path).put(residual_cnn(), samples=40)
    bench.compress(steps=0, keep=0.5)
    source = open_source(str(bench.data), input_specs(make_session(bench.model)), DataRecipe())
    found = evaluate(bench.student, source, teacher=bench.model)
    assert len(found.worst) == MOST and found.worst_sample == found.worst[0].sample
    assert found.worst_nmse == found.worst[0].nmse
    told = [sample.nmse for sample in found.worst]
    assert told == sorted(told, reverse=True)
    document = found.to_json()
    assert [each["sample"] for each in document["worst"]] == [sample.sample for sample in found.worst]
    assert "inputs" not in document["worst"][0]
    rows = np.load(bench.data)["x"]
    assert all(np.array_equal(sample.inputs["x"], rows[sample.sample]) for sample in found.worst)


def test_the_page_shows_them_and_takes_nothing_from_elsewhere(tmp_path: Path) -> None:
    bench = Bench(tmp_path).put(residual_cnn(), samples=40)
    report = bench.compress(steps=0, keep=0.5).report
    shown = report.metrics["student"].worst
    assert shown and all(sample.picture is not None for sample in shown)
    ndonnx.write_report(bench.folder / "run")
    page = (bench.folder / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(shown)
    assert f"number {shown[0].sample}" in page and len(page) < 2 * 2**20
    run = RunDocument(bench.folder / "run" / "report.json", {})
    (bench.folder / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\nmine")
    (bench.folder / "run" / FOLDER / "text.png").write_text("no picture")
    (bench.folder / "run" / FOLDER / "link.png").symlink_to(bench.folder / "secret.png")
    for name in ("../secret.png", "worst/../../secret.png", "text.png", "link.png", "", "absent.png", "\0"):
        assert run.picture(name) is None
