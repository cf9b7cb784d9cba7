"""Where the samples lie: followed through any graph, turned at the ends of slices, and turned back in the student."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ndonnx.assemble.splice import splice
from ndonnx.graph.interface import NOWHERE, WHOLE, Interface, sample_axis, samples_back, samples_first
from ndonnx.graph.passes.branches import open_branches
from ndonnx.graph.working_copy import working_copy
from ndonnx.partition import partition
from ndonnx.teacher import CaptureSettings, capture
from tests.helpers.models import Net, inputs_of, loaded, run
from tests.helpers.runs import Bench, statuses
from tests.helpers.sample_axes import windows


def recogniser(batch: int | str = "N", width: int = 10) -> onnx.ModelProto:
    """Reads lines as text recognisers do: columns of feature maps as a sequence, steps first, (T, N, C)."""
    net = Net(3)
    x = net.relu(net.conv(net.input("image", batch, 1, 4, 12), 1, width, out="first"), out="maps")
    columns = net.op("ReduceMean", x, net.ints(2), keepdims=0, out="columns")
    steps = net.op("Transpose", columns, perm=[2, 0, 1], out="steps")
    up = net.relu(net.matmul(steps, width, 24, out="up"))
    mixed = net.op("Add", steps, net.matmul(up, 24, width, out="down"), out="mixed")
    up = net.op("Tanh", net.matmul(mixed, width, 20, out="up2"))
    return net.proto(net.matmul(up, 20, 7, out="scores"))


def recurrent_recogniser(batch: int | str = "N") -> onnx.ModelProto:
    """An LSTM over the steps, whose output has its directions between steps and samples."""
    net = Net(4)
    x = net.input("image", batch, 6, 9)
    steps = net.op("Transpose", x, perm=[2, 0, 1], out="steps")
    lstm = net.op(
        "LSTM",
        steps,
        net.weight("w", 1, 64, 6),
        net.weight("r", 1, 64, 16),
        net.weight("b", 1, 128),
        out=["all", "last", "cell"],
        hidden_size=16,
    )
    return net.proto(net.matmul(net.op("Squeeze", lstm, net.ints(1)), 16, 5, out="scores"))


def axes(model: onnx.ModelProto, interface: Interface | None = None) -> dict[str, int]:
    copy = working_copy(loaded(model), interface)
    return {value.name or "": sample_axis(value) for node in copy.graph for value in node.outputs}


@pytest.mark.parametrize("batch", ["N", 1, 3])
def test_the_samples_are_followed_through_movements_whatever_the_batch(batch: int | str) -> None:
    found = axes(recogniser(batch))

    assert {found[name] for name in ("first", "columns")} == {0}
    assert {found[name] for name in ("steps", "up", "mixed", "scores")} == {1}
    assert axes(recurrent_recogniser(batch))["all"] == 2


def test_a_value_with_samples_and_windows_on_one_axis_is_no_boundary() -> None:
    found = axes(windows())

    assert found["windows"] == found["inner"] == NOWHERE
    assert found["together"] == 0
    copy = working_copy(loaded(windows()))
    ends = {value.name for n in partition(copy).distillable for value in (n.entry, n.exit) if value is not None}
    assert not ends & {"windows", "inner"}
    # One sample at a time, the whole value is of that sample.
    assert axes(windows(), Interface(batch=1))["inner"] == WHOLE


def test_an_input_may_have_its_samples_on_any_axis() -> None:
    net = Net(6)
    x, state = net.input("x", "N", 6), net.input("state", 2, "M", 6)
    first = net.op("Squeeze", net.op("Slice", state, net.ints(0), net.ints(1), net.ints(0)), net.ints(0), out="first")
    model = net.proto(net.op("Add", x, first, out="y"), net.op("Neg", state, out="next"))

    assert axes(model, Interface(axes={"state": 1})) | {"first": 0, "next": 1, "y": 0} == axes(
        model, Interface(axes={"state": 1})
    )


@given(st.integers(1, 4).flatmap(lambda rank: st.tuples(st.just(rank), st.integers(0, rank - 1))), st.booleans())
def test_turning_there_and_back_leaves_no_trace(place: tuple[int, int], old: bool) -> None:
    rank, axis = place
    for where in (axis, WHOLE):
        net = Net(1)
        model = net.proto(
            net.op("Neg", net.input("x", *(2 + i for i in range(rank))), out="y"), opset=11 if old else 18
        )
        slice_ = loaded(model)
        ends = {"x": slice_.graph.inputs[0], "y": slice_.graph.outputs[0]}
        shapes = {name: value.shape for name, value in ends.items()}
        turned = Interface({}, dict.fromkeys(ends, where)).applied(slice_)
        data = np.random.default_rng(0).standard_normal([2 + i for i in range(rank)]).astype(np.float32)
        moved = data[None] if where == WHOLE else np.moveaxis(data, where, 0)
        np.testing.assert_array_equal(run(turned, {"x": moved})["y"], -moved)

        back = samples_back(turned.clone(), {n: where for n in ends if where != 0}, shapes)

        np.testing.assert_array_equal(run(back, {"x": data})["y"], -data)
        assert [node.op_type for node in back.graph] == ["Neg"]


def test_every_slice_answers_with_the_samples_first_and_goes_back_as_it_was(tmp_path: Path) -> None:
    model = recogniser()
    teacher = loaded(model)
    parts = partition(working_copy(teacher))
    feed = inputs_of(model, 5)
    ends = [value for n in parts.distillable for value in (n.entry, n.exit) if value is not None]
    assert any(sample_axis(value) == 1 for value in ends), "the test needs a slice with its steps first"
    store = capture(
        parts.model,
        [value.name or "" for value in ends],
        lambda: [feed],
        tmp_path,
        samples=5,
        settings=CaptureSettings(half=False),
    )
    inner = run(model, feed, [value.name or "" for value in ends])
    for value in ends:
        np.testing.assert_array_equal(
            store.array(value.name or ""), np.moveaxis(inner[value.name or ""], sample_axis(value), 0)
        )
    for n in parts.distillable:
        assert n.entry is not None and n.exit is not None
        slice_ = parts.slice_of(n)
        given = {value.name or "": store.array(value.name or "") for value in slice_.graph.inputs}
        answer = run(slice_, given)[n.exit.name or ""]
        np.testing.assert_allclose(answer, store.array(n.exit.name or ""), atol=1e-5)
        # In a batch of its own each sample is answered the same.
        one = run(slice_, {name: array[2:3] for name, array in given.items()})[n.exit.name or ""]
        np.testing.assert_allclose(one, answer[2:3], atol=1e-5)

    same = splice(teacher, {n.name: parts.as_in_teacher(parts.slice_of(n)) for n in parts.distillable})

    assert sorted(node.op_type for node in same.graph) == sorted(node.op_type for node in teacher.graph)
    np.testing.assert_array_equal(run(same, feed)["scores"], run(model, feed)["scores"])


@pytest.mark.usefixtures("one_core")
@pytest.mark.parametrize("inputs", ["teacher", "student", "refit"])
def test_sequences_with_their_steps_first_are_distilled(tmp_path: Path, inputs: str) -> None:
    bench = Bench(tmp_path).put(recogniser())

    result = bench.compress(inputs=inputs, steps=20, lr=0.02)

    kept = [n for n in result.report.neighbourhoods if n.status == "kept"]
    assert list(statuses(result).values()).count("distilled") >= 2, kept
    assert result.report.student.parameters < 0.75 * result.report.teacher.parameters
    nmse = result.report.metrics["student"].nmse
    assert nmse is not None and nmse < 0.5
    student = onnx.load(bench.student)
    assert [node.op_type for node in student.graph.node].count("Transpose") == 1, "turns were left in the student"


@pytest.mark.usefixtures("one_core")
def test_an_lstm_over_steps_loses_hidden_units_and_is_fine_tuned(tmp_path: Path) -> None:
    bench = Bench(tmp_path).put(recurrent_recogniser())

    result = bench.compress(finetune_steps=8, steps=10)

    assert "distilled" in statuses(result).values(), [n.reason for n in result.report.neighbourhoods]
    assert result.report.finetune is not None and result.report.finetune.reason is None
    assert {w.name: list(w.dims) for w in onnx.load(bench.student).graph.initializer}["r"] == [1, 32, 8]


def test_samples_first_turns_only_what_is_elsewhere() -> None:
    model = loaded(recogniser())

    assert samples_first(model) is model
    assert [value.name for value in model.graph.inputs] == ["image"]
    assert open_branches(model) is model
