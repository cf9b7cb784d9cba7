"""A first look at data: what is told of inputs and answers is what the samples hold and the model says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import ndonnx
from ndonnx.errors import DataError
from tests.helpers.models import Net, inputs_of, residual_cnn, run


def embedder() -> onnx.ModelProto:
    """Ids and a mask to vectors of norm 1."""
    net = Net()
    ids = net.input("ids", "N", 5, dtype=TensorProto.INT64)
    mask = net.input("mask", "N", 5, dtype=TensorProto.INT64)
    table = net.weight("table", 30, 8)
    read = net.op("Mul", net.op("Gather", table, ids), net.op("Unsqueeze", net.op("Cast", mask, to=1), net.ints(2)))
    summed = net.op("ReduceSum", read, net.ints(1), keepdims=0)
    norm = net.op("ReduceL2", summed, net.ints(1), keepdims=1)
    return net.proto(net.op("Div", summed, norm, out="vector"), opset=18)


def test_what_inputs_hold_and_answers_mean(tmp_path: Path) -> None:
    rng, model = np.random.default_rng(0), embedder()
    ids = rng.integers(1, 30, (100, 5))
    mask = (np.arange(5) < rng.integers(1, 6, (100, 1))).astype(np.int64)
    onnx.save(model, tmp_path / "m.onnx")
    found = ndonnx.inspect(tmp_path / "m.onnx", data={"ids": ids, "mask": mask}).data
    assert found is not None and (found.samples, found.length) == (64, 100)
    told = {value.name: value for value in (*found.inputs, *found.outputs)}
    assert (told["ids"].dtype, told["ids"].shape, told["ids"].looks) == ("int64", [5], "whole numbers, such as ids")
    assert (told["ids"].low, told["ids"].high) == (ids[:64].min(), ids[:64].max())
    assert told["mask"].looks == f"a mask, {mask[:64].mean():.0%} of it set"
    answers = run(model, {"ids": ids[:64], "mask": mask[:64]})["vector"]
    assert told["vector"].looks == "embedding" and told["vector"].shape == [8]
    assert told["vector"].high == pytest.approx(answers.max(), rel=1e-5)
    assert found.samples_a_second is None or found.samples_a_second > 0


def test_the_user_says_what_an_output_is(tmp_path: Path) -> None:
    onnx.save(residual_cnn(), tmp_path / "m.onnx")
    images = inputs_of(residual_cnn(), 9)["x"]
    for task, looks in (((), "classification (logits)"), (("regression",), "regression")):
        found = ndonnx.inspect(tmp_path / "m.onnx", data={"x": images}, task=task).data
        assert found is not None and found.samples == 9
        assert found.inputs[0].looks.startswith("pictures of 3 x ") and found.outputs[0].looks == looks
        assert found.inputs[0].high == pytest.approx(images.max())


def test_data_that_do_not_fit_are_told(tmp_path: Path) -> None:
    onnx.save(residual_cnn(), tmp_path / "m.onnx")
    with pytest.raises(DataError):
        ndonnx.inspect(tmp_path / "m.onnx", data={"z": np.zeros((4, 3), np.float32)})
    assert ndonnx.inspect(tmp_path / "m.onnx").data is None


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_a_model_of_a_fixed_batch_is_fed_whole_batches(tmp_path: Path, batch: int) -> None:
    net = Net()
    net.gemm(net.input("x", batch, 4), 4, 3, out="y")
    onnx.save(net.proto("y"), tmp_path / "m.onnx")
    rows = np.random.default_rng(0).standard_normal((250, 4)).astype(np.float32)
    found = ndonnx.inspect(tmp_path / "m.onnx", data={"x": rows}).data
    assert found is not None and found.samples == batch
    assert found.inputs[0].high == pytest.approx(rows[:batch].max())
