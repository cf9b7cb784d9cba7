"""`--augment auto`: images are changed only as the teacher itself hardly notices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import ndonnx
from ndonnx.config.recipe import DataRecipe, Recipe
from ndonnx.data import input_specs, open_source
from ndonnx.teacher import make_session
from ndonnx.teacher.augmentations import suiting
from tests.helpers.models import Net, mlp, residual_cnn
from tests.helpers.runs import ALONE, Recorder

pytestmark = pytest.mark.usefixtures("one_core")

SIDE = 16


def of_everywhere() -> onnx.ModelProto:
    """Answers by what is in an image, wherever it is."""
    net = Net()
    x = net.relu(net.conv(net.input("x", "N", 3, SIDE, SIDE), 3, 6, 1))
    net.gemm(net.op("Flatten", net.op("GlobalAveragePool", x)), 6, 4, out="y")
    return net.proto("y")


def of_places() -> onnx.ModelProto:
    """Answers by where bright columns are, as a reader of text does."""
    net = Net()
    columns = net.op("ReduceMean", net.input("x", "N", 3, SIDE, SIDE), net.ints(1, 2), keepdims=0)
    net.gemm(net.op("Tanh", columns), SIDE, 8, out="y")
    return net.proto("y")


def images(rows: int = 64) -> np.ndarray[Any, Any]:
    """Bright on one side, each other images."""
    rng = np.random.default_rng(0)
    found = 0.1 * rng.standard_normal((rows, 3, SIDE, SIDE))
    for row in found:
        start = int(rng.integers(0, SIDE - 4))
        row[:, :, start : start + 4] += rng.uniform(1, 3, (3, 1, 1))
    return found.astype(np.float32)


def kinds(folder: Path, model: onnx.ModelProto, **data: Any) -> tuple[str, ...]:
    np.savez(folder / "data.npz", **(data or {"x": images()}))
    source = open_source(str(folder / "data.npz"), input_specs(make_session(ir.from_proto(model))), DataRecipe())
    return suiting(ir.from_proto(model), source, [value.name for value in model.graph.output], seed=0)


def test_what_the_teacher_does_not_notice_suits(tmp_path: Path) -> None:
    assert kinds(tmp_path, of_everywhere()) == ("flip", "shift")


def test_mirrored_text_is_no_text(tmp_path: Path) -> None:
    assert "flip" not in kinds(tmp_path, of_places())


def test_what_is_no_image_is_left_alone(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((40, 10)).astype(np.float32)
    assert kinds(tmp_path, mlp(), x=rows) == ()


def test_a_teacher_that_always_says_the_same_tells_nothing(tmp_path: Path) -> None:
    net = Net()
    pooled = net.op("Flatten", net.op("GlobalAveragePool", net.input("x", "N", 3, SIDE, SIDE)))
    net.op("Mul", pooled, net.constant("zero", np.zeros(3, np.float32)), out="y")
    assert kinds(tmp_path, net.proto("y")) == ()


@pytest.mark.parametrize(("augment", "told"), [(("auto",), True), (("flip",), False)])
def test_what_is_left_out_is_told(tmp_path: Path, augment: tuple[str, ...], told: bool) -> None:
    net = Net()
    x = net.relu(net.conv(net.relu(net.conv(net.input("x", "N", 3, SIDE, SIDE), 3, 16)), 16, 3))
    net.gemm(net.op("Tanh", net.op("ReduceMean", x, net.ints(1, 2), keepdims=0)), SIDE, 8, out="y")
    onnx.save(net.proto("y"), tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", x=images())
    progress = Recorder()
    settings = ALONE | {"steps": 2, "finetune_steps": 2, "finetune_samples": 64, "samples": 64, "augment": augment}
    ndonnx.compress(tmp_path / "m.onnx", data=str(tmp_path / "data.npz"), recipe=Recipe(**settings), progress=progress)
    assert any("--augment auto leaves out flip" in note for note in progress.notes) is told


def test_students_of_images_are_those_of_the_kinds_that_suit(tmp_path: Path) -> None:
    onnx.save(residual_cnn(), tmp_path / "m.onnx")
    rows = np.random.default_rng(0).standard_normal((96, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=rows)
    settings = ALONE | {"steps": 2, "finetune_steps": 4, "finetune_samples": 64, "samples": 64}
    source = open_source(
        str(tmp_path / "data.npz"), input_specs(make_session(ir.from_proto(residual_cnn()))), DataRecipe()
    )
    found = suiting(ir.from_proto(residual_cnn()), source, ["logits"], seed=0)
    for name, augment in (("auto", ("auto",)), ("said", found or ("none",))):
        recipe = Recipe(**(settings | {"augment": augment}))
        ndonnx.compress(
            tmp_path / "m.onnx", data=str(tmp_path / "data.npz"), recipe=recipe, output=tmp_path / f"{name}.onnx"
        )
    assert (tmp_path / "auto.onnx").read_bytes() == (tmp_path / "said.onnx").read_bytes()
