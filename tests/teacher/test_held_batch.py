"""A batch that the graph's own numbers hold: found by trying, and everything is run at it, trainings included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import ndonnx
from ndonnx.config.recipe import Recipe
from ndonnx.convert import to_torch
from ndonnx.distill.gate import answer, open_slice
from ndonnx.graph.interface import Interface
from ndonnx.graph.working_copy import hold_batch, slice_batch
from ndonnx.teacher import make_session
from ndonnx.teacher.trying import mixes
from tests.helpers.models import Array, Net, inputs_of, loaded, run
from tests.helpers.runs import Bench, Recorder, statuses
from tests.helpers.sample_axes import windows


def detector(batch: int | str = 1) -> onnx.ModelProto:
    """Boxes of two scales in one list, as detectors export them: the numbers of each `Reshape` hold the batch."""
    net = Net(1)
    x = net.relu(net.conv(net.input("image", batch, 3, 8, 8), 3, 8, out="stem"))
    x = net.op("Add", x, net.conv(net.relu(net.conv(x, 8, 16, out="up")), 16, 8, out="down"), out="trunk")
    coarse = net.relu(net.conv(x, 8, 8, stride=2, out="coarse"))
    lists = [
        net.op("Reshape", net.conv(net.relu(net.conv(y, 8, 12)), 12, 6, 1), net.ints(1, 6, -1)) for y in (x, coarse)
    ]
    return net.proto(net.op("Transpose", net.op("Concat", *lists, axis=2), out="boxes", perm=[0, 2, 1]))


def attention(tokens: int = 4) -> onnx.ModelProto:
    """Self-attention, tokens first, that takes all that comes in for one sample: several mix without a word."""
    net = Net(2)
    x = net.op("Transpose", net.input("x", "N", tokens, 8), perm=[1, 0, 2], out="tokens")
    flat = net.op("Reshape", net.matmul(x, 8, 24, out="qkv"), net.ints(-1, 1, 3, 8))
    q, k, v = (net.op("Gather", flat, net.constant(f"i{i}", np.array(i)), axis=2) for i in range(3))
    q, k, v = (net.op("Transpose", part, perm=[1, 0, 2]) for part in (q, k, v))
    scores = net.op("Softmax", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 1])), axis=-1)
    mixed = net.op("Reshape", net.op("MatMul", scores, v), net.ints(-1, tokens, 8), out="mixed")
    up = net.relu(net.matmul(mixed, 8, 24, out="hidden"))
    return net.proto(net.op("Add", mixed, net.matmul(up, 24, 8, out="back"), out="y"))


def towers() -> onnx.ModelProto:
    """The similarity of every sample with every other: what a batch is compared within is no mixture."""
    net = Net(3)
    a, b = net.matmul(net.input("a", "N", 6), 6, 4), net.matmul(net.input("b", "N", 6), 6, 4)
    return net.proto(net.op("MatMul", a, net.op("Transpose", b, perm=[1, 0]), out="similarity"))


def noisy() -> onnx.ModelProto:
    net = Net(4)
    x = net.input("x", "N", 6)
    return net.proto(net.op("Add", net.matmul(x, 6, 4, out="h"), net.op("RandomNormalLike", "h"), out="y"))


def centred() -> onnx.ModelProto:
    """Normalised over the batch: the answer is the same size, and depends on the others."""
    net = Net(5)
    x = net.matmul(net.input("x", "N", 6), 6, 4)
    return net.proto(net.op("Sub", x, net.op("ReduceMean", x, net.ints(0), keepdims=1), out="y"))


def mixed(model: onnx.ModelProto) -> bool:
    return mixes(make_session(model.SerializeToString()), Interface(), inputs_of(model, 2))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (detector("N"), True),
        (attention(), True),
        (centred(), True),
        (windows(), False),
        (towers(), False),
        (noisy(), False),
    ],
)
def test_it_is_found_by_trying_whether_samples_are_kept_apart(model: onnx.ModelProto, expected: bool) -> None:
    assert mixed(model) is expected


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_slice_that_holds_its_batch_is_run_in_batches_of_that_size(batch: int) -> None:
    net = Net(6)
    x = net.matmul(net.input("x", batch, 4, 6), 6, 8)
    model = loaded(net.proto(net.matmul(net.op("Reshape", net.relu(x), net.ints(batch, 4, 8)), 8, 3, out="y")))
    rows = np.random.default_rng(0).standard_normal((7, 4, 6)).astype(np.float32)

    opened = open_slice(model, ["x"], {"x": rows})

    assert slice_batch(opened) == batch
    padded = np.concatenate([rows, np.repeat(rows[-1:], batch, axis=0)])
    expected = np.concatenate([run(model, {"x": padded[i : i + batch]})["y"] for i in range(0, 7, batch)])[:7]
    np.testing.assert_allclose(answer(opened, {"x": rows}), expected, atol=1e-6)
    module = to_torch(opened)
    np.testing.assert_allclose(module(torch.from_numpy(rows)).detach().numpy(), expected, atol=1e-5)


def test_a_slice_that_mixes_without_a_word_is_held() -> None:
    model = attention()
    slice_ = hold_batch(loaded(model), ["x"], 1)

    opened = open_slice(slice_, ["x"], inputs_of(model, 5))

    assert slice_batch(opened) == 1


@pytest.mark.usefixtures("one_core")
@pytest.mark.parametrize(
    ("model", "feed"), [(detector(), detector("N")), (detector("N"), detector("N")), (attention(), attention())]
)
@pytest.mark.parametrize("inputs", ["teacher", "student", "refit"])
def test_models_that_hold_their_batch_are_distilled_and_fine_tuned(
    tmp_path: Path, model: onnx.ModelProto, feed: onnx.ModelProto, inputs: str
) -> None:
    bench = Bench(tmp_path).put(model, 40, free=feed)
    progress = Recorder()

    result = bench.compress(inputs=inputs, progress=progress, steps=8, finetune_steps=6)

    kept = [n.reason for n in result.report.neighbourhoods if n.status == "kept"]
    assert "distilled" in statuses(result).values(), kept
    assert not any("batch" in (reason or "") for reason in kept), kept
    assert result.report.finetune is not None and result.report.finetune.reason is None
    free = not isinstance(loaded(model).graph.inputs[0].shape[0], int)  # type: ignore[index]
    assert any("one sample at a time" in note for note in progress.notes) is free
    one = {name: array[:1] for name, array in inputs_of(feed, 3).items()}
    ours, theirs = (next(iter(run(m, one).values())) for m in (onnx.load(bench.student), model))
    assert ours.shape == theirs.shape


@pytest.mark.usefixtures("one_core")
def test_ends_that_are_wholly_of_one_sample_are_trained(tmp_path: Path) -> None:
    """With a batch of one, the windows of a sample are a value of their own."""
    net = Net(7)
    x = net.matmul(net.input("x", 1, 4, 8), 8, 8, out="before")
    x = net.op("Squeeze", x, net.ints(0), out="alone")
    for i in range(2):
        inner = net.matmul(net.relu(net.matmul(x, 8, 24, out=f"up{i}")), 24, 8, out=f"down{i}")
        x = net.op("Add", x, inner, out=f"unit{i}")
    model = net.proto(net.op("Unsqueeze", x, net.ints(0), out="y"))
    bench = Bench(tmp_path)
    onnx.save(model, bench.model)
    data: dict[str, Any] = {"x": np.random.default_rng(0).standard_normal((60, 4, 8)).astype(np.float32)}
    np.savez(bench.data, **data)

    result = bench.compress(inputs="student", steps=30, lr=0.02)

    assert list(statuses(result).values()).count("distilled") == 2, [n.reason for n in result.report.neighbourhoods]
    nmse = result.report.metrics["student"].nmse
    assert nmse is not None and nmse < 0.5


@pytest.mark.usefixtures("one_core")
def test_what_measures_a_model_runs_it_one_sample_at_a_time(tmp_path: Path) -> None:
    bench = Bench(tmp_path).put(attention(), 40)
    data: dict[str, Array] = dict(np.load(bench.data))
    one_by_one = [run(attention(), {"x": data["x"][i : i + 1]})["y"] for i in range(40)]

    found = ndonnx.evaluate(bench.model, str(bench.data), teacher=bench.model)
    study = ndonnx.threshold(
        bench.model,
        data=str(bench.data),
        samples=20,
        repeats=1,
        amplitudes=[0.1, 0.4],
        recipe=Recipe(executor="serial"),
    )

    assert found.samples == len(one_by_one) and found.nmse == 0
    assert study.tolerances and all(one.nmse is not None for one in study.width)
