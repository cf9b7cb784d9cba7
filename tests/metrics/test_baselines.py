"""Baselines: what they are made of, that they are what they are called, and that one that fails ends nothing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

import ndonnx
from ndonnx.config.recipe import DataRecipe
from ndonnx.data import DataSource, input_specs, open_source
from ndonnx.metrics.baselines import Made, Material, make_baselines
from ndonnx.metrics.baselines.making import _runs
from ndonnx.metrics.baselines.noise_floor import grey_level, moved
from ndonnx.teacher import make_session
from ndonnx_cli.main import main
from tests.helpers.models import Net

SAMPLES = 64


def images(count: int = SAMPLES, seed: int = 0) -> NDArray[np.float32]:
    """8-bit images after a usual preprocessing."""
    grey = np.random.default_rng(seed).integers(0, 256, (count, 3, 8, 8))
    return (grey.astype(np.float32) / 255 - 0.45) / 0.22


def convolution(folder: Path, opset: int = 17) -> Path:
    net = Net()
    x = net.op("Relu", net.conv(net.input("image", "N", 3, 8, 8), 3, 8))
    x = net.op("Relu", net.conv(x, 8, 8))
    proto = net.proto(net.gemm(net.op("Flatten", x, axis=1), 512, 4, out="logits"))
    del proto.opset_import[:]
    proto.opset_import.append(helper.make_opsetid("", opset))
    path = folder / "teacher.onnx"
    onnx.save(proto, path)
    return path


def material(model: Path, array: NDArray[np.float32] | None = None, name: str = "image") -> Material:
    array = images() if array is None else array
    source = source_of(model, {name: array})
    return Material(model, model.parent, source, source)


def source_of(model: Path, arrays: dict[str, NDArray[np.float32]]) -> DataSource:
    return open_source(arrays, input_specs(make_session(model)), DataRecipe())


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("opset", [11, 17])
def test_each_is_what_it_is_called(tmp_path: Path, opset: int) -> None:
    model = convolution(tmp_path, opset)
    static, dynamic, half = make_baselines(["int8", "dynamic", "fp16"], material(model))
    assert [made.reason for made in (static, dynamic, half)] == [None] * 3
    assert static.path and dynamic.path and half.path
    assert operators(static.path)["QuantizeLinear"] and "per channel" in (static.how or "")
    scales = {t.name: t for t in onnx.load(static.path).graph.initializer if t.name.endswith("_scale")}
    assert any(list(t.dims) == [8] for t in scales.values()), "one scale for each output channel"
    assert operators(dynamic.path)["DynamicQuantizeLinear"]
    assert {t.data_type for t in onnx.load(half.path).graph.initializer} == {TensorProto.FLOAT16}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "dynamic.onnx", "fp16.onnx", "int8.onnx", "teacher.onnx",
    ]  # fmt: skip
    feeds = {"image": images(16, seed=1)}
    expected = ort.InferenceSession(model).run(None, feeds)[0]
    for made in (static, dynamic, half):
        found = ort.InferenceSession(made.path).run(None, feeds)[0]
        assert np.mean((found - expected) ** 2) < 0.02 * expected.var()


def test_the_calibration_is_bounded_and_keeps_to_the_batch_of_the_model(tmp_path: Path) -> None:
    source = source_of(convolution(tmp_path), {"image": images(150)})
    runs = _runs(source)
    assert len(runs) == 100 and runs[0]["image"].shape == (1, 3, 8, 8)


def test_what_the_tools_refuse_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = convolution(tmp_path)
    (made,) = make_baselines(["int8"], Material(model, tmp_path, None, None))
    assert made == Made("INT8 static", reason="there are no data to calibrate on; give --data")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(model.read_bytes()[:-200])
    source = material(model)
    (made,) = make_baselines(["fp16"], Material(broken, tmp_path, source.calibration, source.choosing))
    assert made.path is None and made.reason and "\n" not in made.reason


def test_grey_levels_follow_from_the_values() -> None:
    for channel in range(3):
        level = grey_level(images()[:, channel])
        assert level == pytest.approx(1 / 255 / 0.22, rel=1e-2)
    assert grey_level(np.random.default_rng(0).standard_normal((64, 8, 8))) is None
    assert grey_level(np.zeros((64, 8, 8))) is None


def test_the_noise_floor_is_the_teacher_on_moved_images(tmp_path: Path) -> None:
    model = convolution(tmp_path)
    teacher = ndonnx.load(model)
    before = ir.to_proto(teacher).SerializeToString(deterministic=True)
    noisy = moved(teacher, source_of(model, {"image": images()}))
    assert noisy is not None
    assert ir.to_proto(teacher).SerializeToString(deterministic=True) == before
    noise = noisy.graph.initializers["image/ndonnx:noise"].const_value
    assert noise is not None and np.abs(noise.numpy()).max() == pytest.approx(1 / 3 / 255 / 0.22, rel=0.05)
    x = images(4, seed=2)
    found = make_session(noisy).run(None, {"image": x})[0]
    expected = ort.InferenceSession(model).run(None, {"image": x + noise.numpy()})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert moved(teacher, source_of(model, {"image": x + np.random.default_rng(0).random(x.shape, np.float32)})) is None


def test_benchmark_tells_all_in_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = convolution(tmp_path)
    student = tmp_path / "student.onnx"
    student.write_bytes(model.read_bytes())
    np.savez(tmp_path / "data.npz", image=images())
    flags = ["--against", str(model), "--data", str(tmp_path / "data.npz"), "--baselines", "dynamic"]
    short = ["--processes", "2", "--rounds", "2", "--batch-sizes", "2", "--threads", "1"]
    assert main(["benchmark", str(student), *flags, *short, "-q", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["baselines"]
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows)[:3] == ["teacher", "student", "INT8 dynamic"] and len(rows) == 4
    assert (found["batch_size"], found["processes"], found["threads"]) == (2, 2, 1)
    assert rows["teacher"]["speed"]["ratio"] is None and rows["student"]["fidelity"]["nmse"] == 0
    assert {rows[name]["speed"]["latency"]["runs"] for name in list(rows)[:3]} == {4}
    assert rows["INT8 dynamic"]["bytes"] < rows["teacher"]["bytes"]
    assert rows["INT8 dynamic"]["fidelity"]["samples"] == int(0.1 * SAMPLES), "the rows that nothing else has seen"
    assert 0 < next(row for name, row in rows.items() if "grey" in name)["fidelity"]["nmse"] < 0.01
