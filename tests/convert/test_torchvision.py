"""What stands beside torch: a torchvision that loads, one that does not, or none. Each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from ndonnx.convert import check_parity, to_torch
from tests.helpers.models import Net, inputs_of, loaded, residual_cnn, run

ROOT = Path(__file__).resolve().parents[2]

LOADS = """
import torch

# As the real one: whoever defined the operator before makes this fail.
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from torchvision import ops
"""

OPERATORS = """
def roi_align(input, boxes, output_size, **options):
    return input.new_full((len(boxes), input.shape[1], *output_size), 7.0)
"""

FAILS = 'raise RuntimeError("operator torchvision::nms does not exist")'

CONVERTS = (
    "from tests.convert.test_torchvision import check_residual, told_of_boxes; check_residual(); print(told_of_boxes())"
)


def check_residual() -> None:
    """A slice without any operator of torchvision's converts and answers as onnxruntime does."""
    proto = residual_cnn()
    feeds = inputs_of(proto, 2)
    (expected,) = run(proto, feeds).values()
    check_parity(to_torch(loaded(proto)), list(feeds.values()), expected, 1e-4)


def boxes() -> onnx.ModelProto:
    """A model with one `RoiAlign`: an image, boxes, and the image that each box lies in."""
    net = Net()
    inputs = [net.input("x", "N", 2, 8, 8), net.input("rois", "M", 4), net.input("of", "M", dtype=TensorProto.INT64)]
    net.op("RoiAlign", *inputs, out="y", output_height=3, output_width=3, sampling_ratio=2)
    return net.proto("y")


def feeds_of_boxes() -> dict[str, np.ndarray]:
    return {
        "x": np.random.default_rng(0).standard_normal((2, 2, 8, 8)).astype(np.float32),
        "rois": np.array([[0, 0, 4, 4], [1, 2, 7, 6], [2, 2, 5, 8]], np.float32),
        "of": np.array([0, 1, 1], np.int64),
    }


def told_of_boxes() -> str:
    """What comes out of a `RoiAlign` in torch, or why it does not run."""
    module = to_torch(loaded(boxes()))
    try:
        return str(float(module(*(torch.from_numpy(array) for array in feeds_of_boxes().values())).mean()))
    except NotImplementedError as error:
        return str(error)


def python(folder: Path, *lines: str) -> str:
    """What a new process prints that finds the modules of `folder` before any other."""
    path = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def install(folder: Path, init: str, operators: str = "") -> None:
    """Lay a torchvision into a folder."""
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(init)
    (folder / "torchvision" / "ops.py").write_text(operators)


@pytest.mark.parametrize("first", ["import ndonnx.convert", "import torchvision", "import onnx2torch"])
def test_torchvision_that_loads_is_used_whatever_is_imported_first(tmp_path: Path, first: str) -> None:
    install(tmp_path, LOADS, OPERATORS)
    assert python(tmp_path, first, CONVERTS, "import torchvision; print(torchvision.library.ns)") == "7.0\ntorchvision"


def test_torchvision_that_does_not_load_costs_its_own_operators_alone(tmp_path: Path) -> None:
    install(tmp_path, FAILS)
    said = python(tmp_path, CONVERTS)
    assert said == "it needs torchvision, which does not load here (operator torchvision::nms does not exist)"


def test_missing_torchvision_costs_its_own_operators_alone(tmp_path: Path) -> None:
    said = python(tmp_path, "import sys; sys.modules['torchvision'] = None", CONVERTS)
    assert said.startswith("it needs torchvision, which does not load here (import of torchvision")


@pytest.mark.slow
def test_import_leaves_nothing_of_torchvision_behind(tmp_path: Path) -> None:
    install(tmp_path, FAILS)
    lines = "import sys, torch, ndonnx.convert", "print([name for name in sys.modules if name[:11] == 'torchvision'])"
    assert python(tmp_path, *lines, "print(list(torch.ops.torchvision))") == "[]\n[]"


@pytest.mark.slow
def test_boxes_are_what_onnxruntime_makes_of_them() -> None:
    try:
        import torchvision  # noqa: F401, PLC0415
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision does not load: {error}")
    feeds = feeds_of_boxes()
    (expected,) = run(boxes(), feeds).values()
    check_parity(to_torch(loaded(boxes())), list(feeds.values()), expected, 1e-5)
