"""Students of slices whose operators see several channels: they start well, pass every gate, train, and get smaller."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from ndonnx.convert import relative_error
from ndonnx.graph import fold_constants
from ndonnx.partition import find_groups
from ndonnx.students import TeacherSlice
from ndonnx.students.cutting import shrink
from ndonnx.students.methods.width import Width
from tests.helpers.channel_blocks import ALL_BLOCKS, CHANNEL_BLOCKS
from tests.helpers.models import Net, inputs_of, loaded, run, stack
from tests.helpers.runs import Bench

BLOCKS_IN_A_MODEL = 6
CHUNKS = [sorted(CHANNEL_BLOCKS)[i : i + BLOCKS_IN_A_MODEL] for i in range(0, len(CHANNEL_BLOCKS), BLOCKS_IN_A_MODEL)]


@pytest.mark.slow
@pytest.mark.parametrize("names", CHUNKS, ids=lambda names: names[0])
def test_students_pass_the_gates_train_and_are_smaller(names: list[str], tmp_path: Path) -> None:
    bench = Bench(tmp_path).put(stack(names, ALL_BLOCKS))
    report = bench.compress(keep=0.5, steps=2).report
    for n in report.neighbourhoods:
        assert n.status == "distilled" or "no width" in (n.reason or "") or n.reason == "holds no weights", n.reason
    assert report.student.parameters < 0.75 * report.teacher.parameters
    feed = inputs_of(onnx.load(bench.student))
    assert np.isfinite(run(loaded(onnx.load(bench.student)), feed, ["logits"])["logits"]).all()


def sliced(model: onnx.ModelProto, samples: dict[str, npt.NDArray[np.generic]] | None = None) -> TeacherSlice:
    working = fold_constants(loaded(model))
    groups = find_groups(working.graph, working.graph.outputs[0])
    return TeacherSlice("n01", working, groups, samples or inputs_of(model, batch=48), threads=1)


def test_what_is_removed_from_a_layer_norm_is_in_none_of_its_statistics() -> None:
    """By hand: the norm of the kept channels alone, by their own mean and deviation."""
    net = Net()
    x = net.input("x", "N", 8)
    hidden = net.matmul(x, 8, 6, out="hidden")
    scale, bias = net.weight("scale", 6), net.weight("bias", 6)
    normed = net.op("LayerNormalization", hidden, scale, bias, axis=-1, out="normed")
    teacher = sliced(net.proto(net.matmul(normed, 6, 3, out="y")))
    kept = np.array([True, False, True, True, False, True])
    found = teacher.run(shrink(teacher.model, teacher.groups, kept), ["y"])["y"]
    weights = {name: array.astype(np.float64) for name, array in net.weights.items()}
    inner = (teacher.samples["x"] @ weights["hidden.weight"])[:, kept]
    centred = inner - inner.mean(axis=1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
    expected = (expected * weights["scale"][kept] + weights["bias"][kept]) @ weights["y.weight"][kept]
    assert relative_error(found, expected.astype(np.float32)) < 1e-5


@pytest.mark.parametrize("statistic", ["ReduceMean", "ReduceMax", "ReduceL2"])
def test_what_reads_a_statistic_is_refitted_to_that_of_the_kept_channels(statistic: str) -> None:
    """Channels that are all multiples of one: the statistic of some is a multiple of that of all."""
    net = Net()
    x = net.input("x", "N", 8, 6, 6)
    one = net.rng.standard_normal((1, 8, 1, 1))
    factors = net.rng.uniform(0.5, 2, (12, 1, 1, 1))
    y = net.relu(net.op("Conv", x, net.constant("same", (factors * one).astype(np.float32)), out="a"))
    seen = net.op(statistic, y, net.ints(1), out="seen")
    gate = net.op("Sigmoid", net.conv(seen, 1, 1, out="map"), out="gate")
    teacher = sliced(net.proto(net.conv(net.op("Mul", y, gate), 12, 8, out="y")))
    assert [group.width for group in teacher.groups.groups] == [12]
    student = Width(0.5).build(teacher, np.random.default_rng(0)).model
    gates = [teacher.run(model, ["gate"])["gate"] for model in (student, teacher.model)]
    answers = [teacher.run(model, ["y"])["y"] for model in (student, teacher.model)]
    assert relative_error(*gates) < 1e-2 and relative_error(*answers) < 1e-2
