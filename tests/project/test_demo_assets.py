"""The demo's files are whole, small, honest about their accuracy, and what the training script makes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from ndonnx.demo import data_path, teacher_path
from ndonnx.errors import UsageError

README = teacher_path().with_name("README.md")
SIZES = {"train": 1297, "test": 500}


def load(split: Any) -> tuple[np.ndarray, np.ndarray]:
    with np.load(data_path(split)) as arrays:
        assert set(arrays.files) == {"image", "label"}
        return arrays["image"], arrays["label"]


def answer(image: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(teacher_path(), providers=["CPUExecutionProvider"])
    logits: np.ndarray = session.run(["logits"], {"image": image})[0]
    return logits


def written_claim(split: str) -> tuple[int, int]:
    found = re.search(rf"^- {split}: (\d+) of (\d+) right \(([\d.]+)%\)$", README.read_text("utf-8"), re.MULTILINE)
    assert found, f"README.md states no accuracy for {split}"
    correct, samples = int(found[1]), int(found[2])
    assert found[3] == f"{100 * correct / samples:.1f}"
    return correct, samples


@pytest.mark.parametrize("split", SIZES)
def test_arrays_fit_the_model_and_are_preprocessed(split: str) -> None:
    image, label = load(split)
    assert image.dtype == np.float32 and image.shape == (SIZES[split], 1, 8, 8)
    assert label.dtype == np.int64 and label.shape == (SIZES[split],)
    levels = (image + 1) * 8
    assert np.array_equal(np.unique(levels), np.arange(17))


def test_splits_are_stratified_and_share_no_image() -> None:
    (train, train_label), (test, test_label) = load("train"), load("test")
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}
    share = np.bincount(test_label, minlength=10) / np.bincount(np.concatenate([train_label, test_label]), minlength=10)
    assert share == pytest.approx(500 / 1797, abs=0.01)


@pytest.mark.parametrize("split", SIZES)
def test_teacher_is_as_accurate_as_the_readme_says(split: str) -> None:
    image, label = load(split)
    claimed, samples = written_claim(split)
    assert samples == len(label)
    assert int((answer(image).argmax(axis=1) == label).sum()) >= claimed


def test_teacher_is_good_enough_to_demonstrate_with() -> None:
    correct, samples = written_claim("test")
    assert correct / samples >= 0.985


@pytest.mark.parametrize("batch", [1, 7])
def test_batch_axis_is_dynamic_and_samples_are_independent(batch: int) -> None:
    image, _ = load("test")
    logits = answer(image[:batch])
    assert logits.dtype == np.float32 and logits.shape == (batch, 10)
    np.testing.assert_allclose(logits, answer(image)[:batch], rtol=0, atol=1e-4)


def test_teacher_is_a_valid_residual_network_with_a_stable_interface() -> None:
    model = onnx.load(teacher_path())
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in model.graph.input] == ["image"]
    assert [value.name for value in model.graph.output] == ["logits"]
    for value in (model.graph.input[0], model.graph.output[0]):
        assert value.type.tensor_type.shape.dim[0].dim_param == "N"
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]
    assert sum(node.op_type == "Add" for node in model.graph.node) == 6
    weights = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
    assert f"{weights:,} weights" in README.read_text("utf-8")
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in model.graph.initializer)


def test_assets_stay_small() -> None:
    files = [teacher_path(), data_path("train"), data_path("test"), README]
    assert sum(file.stat().st_size for file in files) < 800_000


def test_readme_carries_origin_and_licence() -> None:
    text = README.read_text("utf-8")
    for needed in ("UCI", "Optical Recognition of Handwritten Digits", "Alpaydin", "CC BY 4.0", "scikit-learn"):
        assert needed in text


@pytest.mark.parametrize("split", ["", "Train", "validation", "../demo/train"])
def test_unknown_split_is_refused_and_the_message_names_the_choices(split: Any) -> None:
    with pytest.raises(UsageError, match="'train' or 'test'"):
        data_path(split)


def test_script_preprocesses_as_shipped() -> None:
    pytest.importorskip("sklearn")
    from benchmarks.train_demo_teacher import load_splits  # noqa: PLC0415 - needs scikit-learn

    for split, made in load_splits().items():
        image, label = load(split)
        assert np.array_equal(made.image, image) and made.image.dtype == image.dtype
        assert np.array_equal(made.label, label) and made.label.dtype == label.dtype


def test_augmentation_moves_each_image_by_at_most_a_pixel() -> None:
    pytest.importorskip("sklearn")
    import torch  # noqa: PLC0415 - only the script needs it

    from benchmarks.train_demo_teacher import BACKGROUND, shift  # noqa: PLC0415 - needs scikit-learn

    torch.manual_seed(0)
    image = torch.full((200, 1, 8, 8), BACKGROUND)
    image[:, 0, 3, 5] = 1.0
    sample, channel, row, column = torch.nonzero(shift(image) == 1.0, as_tuple=True)
    assert sample.tolist() == list(range(200)) and not channel.any()
    moves = set(zip((row - 3).tolist(), (column - 5).tolist(), strict=True))
    assert moves == {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}
    edge = torch.full((50, 1, 8, 8), 1.0)
    assert set(torch.unique(shift(edge)).tolist()) == {BACKGROUND, 1.0}


@pytest.fixture
def torch_threads_kept() -> Iterator[None]:
    import torch  # noqa: PLC0415 - only the script needs it

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("torch_threads_kept")
def test_script_writes_the_same_bytes_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    from benchmarks.train_demo_teacher import main  # noqa: PLC0415 - needs scikit-learn

    for run in ("first", "second"):
        main(["--out", str(tmp_path / run), "--epochs", "1"])
    names = sorted(file.name for file in (tmp_path / "first").iterdir())
    assert names == ["teacher.onnx", "test.npz", "train.npz"]
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert re.search(r"^test: \d+ of 500 right", capsys.readouterr().out, re.MULTILINE)
