"""A first look at data: what is told of inputs and answers is what the samples hold and the model says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

import ndonnx
from ndonnx.distill import step_time
from ndonnx.distill.plan import Plan
from ndonnx.distill.step_time import seconds_a_step
from ndonnx.errors import DataError
from ndonnx.graph.interface import Interface
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


def test_how_long_it_would_take_follows_steps_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing is the machine's, what is made of it is not: here a step takes 0.1 s, an answer 0.01 s."""
    monkeypatch.setattr("ndonnx.metrics.first_look.outputs_a_second", lambda *_: 100.0)
    monkeypatch.setattr("ndonnx.metrics.duration.seconds_a_step", lambda *_: 0.1)
    onnx.save(residual_cnn(), tmp_path / "m.onnx")
    images = inputs_of(residual_cnn(), 400)["x"]

    def told(**settings: object) -> ndonnx.TimeLook:
        found = ndonnx.inspect(tmp_path / "m.onnx", data={"x": images}, **{"augment": ()} | settings)
        assert found.data is not None and found.data.time is not None
        assert found.data.time.neighbourhoods == sum(each.status == "distillable" for each in found.neighbourhoods)
        return found.data.time

    one, two = told(steps=100), told(steps=200)
    assert (one.steps, one.finetune_steps, two.finetune_steps) == (100, 300, 600)
    assert two.finetuning == pytest.approx(2 * one.finetuning) and two.training > one.training
    assert one.reading == pytest.approx(8) and one.comparing == pytest.approx(2 * 40 / 100)
    assert one.seconds == pytest.approx(one.reading + one.training + one.finetuning + one.comparing)
    copied = told(steps=100, augment=("flip",))
    assert copied.reading == pytest.approx(4 + 4 * round(300 * 64 / 2 / 400))
    alone = told(steps=100, finetune_steps=0)
    assert alone.finetuning == 0 and alone.reading == pytest.approx(4)
    assert told(steps=100, keep=0.25).finetuning < one.finetuning
    budget = ndonnx.inspect(tmp_path / "m.onnx", data={"x": images}, time_budget="60s").data
    assert budget is not None and budget.time is None


def test_a_step_of_the_whole_is_timed_for_a_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = residual_cnn()
    rows, plan = inputs_of(model, 16), Plan(steps=1, batch_size=64, lr=0.1, warmup=0.0, seed=0)
    teacher = ir.from_proto(model)
    outputs = [value.name or "" for value in teacher.graph.outputs]
    taken = seconds_a_step(teacher, Interface(), outputs, rows, plan)
    assert taken is not None and taken > 0
    timed: list[int] = []
    monkeypatch.setattr(step_time, "_seconds", lambda _, rows: timed.append(len(rows["x"])) or 1.0)
    assert seconds_a_step(teacher, Interface(), outputs, rows, plan) == 4.0
    assert seconds_a_step(teacher, Interface(), outputs, rows, replace(plan, batch_size=8)) == 1.0
    assert timed == [16, 8]


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_a_model_of_a_fixed_batch_is_fed_whole_batches(tmp_path: Path, batch: int) -> None:
    net = Net()
    net.gemm(net.input("x", batch, 4), 4, 3, out="y")
    onnx.save(net.proto("y"), tmp_path / "m.onnx")
    rows = np.random.default_rng(0).standard_normal((250, 4)).astype(np.float32)
    found = ndonnx.inspect(tmp_path / "m.onnx", data={"x": rows}).data
    assert found is not None and found.samples == batch
    assert found.inputs[0].high == pytest.approx(rows[:batch].max())
