"""Fine-tuning of the whole student: what it learns, what it may change, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper

from ndonnx.distill.finetune import finetune, why_not_converted
from ndonnx.distill.plan import Plan
from ndonnx.distill.trainer import Training
from ndonnx.distill.whole import Labels, WholeSettings, tasks_from
from ndonnx.errors import SliceError
from ndonnx.graph.dataflow import float_outputs
from ndonnx.graph.interface import Interface
from ndonnx.teacher import ActivationStore
from tests.helpers.models import Array, Net, floats, inputs_of, residual_cnn, run, with_if
from tests.helpers.training import silent, store_of

PLAN = Plan(steps=80, batch_size=16, lr=0.05, warmup=0.05, seed=0)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def perturbed(model: onnx.ModelProto, amount: float = 0.3) -> ir.Model:
    """The model with noise on all its weights: a bad student of it."""
    student = ir.from_proto(model)
    rng = np.random.default_rng(1)
    for name, value in student.graph.initializers.items():
        array = value.const_value.numpy()  # type: ignore[union-attr]
        if array.dtype == np.float32 and array.ndim > 1:
            noise = rng.standard_normal(array.shape).astype(np.float32)
            value.const_value = ir.tensor(array + amount * array.std() * noise, name=name)
    return student


def answers(folder: Path, model: onnx.ModelProto, samples: int = 120) -> ActivationStore:
    data = inputs_of(model, samples)
    return store_of(folder, {**data, **run(model, data)})


def divergence(student: Array, teacher: Array) -> float:
    p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (teacher, student))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return float((p * np.log(p / q)).sum(-1).mean())


def tune(
    student: ir.Model, store: ActivationStore, label_weight: float = 0.0, labels: Labels | None = None
) -> tuple[ir.Model, Training]:
    outputs = [name for name in float_outputs(student) if name in store.names]
    tasks = tasks_from(store, outputs, labelled=labels is not None, told=())
    settings = WholeSettings(PLAN, temperature=2.0, label_weight=label_weight, holdout=0.2, parity=1e-4, tasks=tasks)
    return finetune(student, store, settings, silent, labels=labels)


def test_a_fine_tuned_student_answers_more_like_its_teacher_on_new_inputs(tmp_path: Path) -> None:
    model = residual_cnn()
    student = perturbed(model)
    tuned, training = tune(student, answers(tmp_path, model))
    fresh = inputs_of(model, 50, seed=9)
    teacher = run(model, fresh)["logits"]
    before, after = (divergence(run(s, fresh)["logits"], teacher) for s in (student, tuned))
    assert after < 0.5 * before
    assert training.loss < training.loss_start and training.steps == PLAN.steps
    assert [n.op_type for n in tuned.graph] == [n.op_type for n in student.graph]


def squeezed_if_one() -> onnx.ModelProto:
    """A filter over an open length, and `squeeze` as TorchScript writes it: an `If` on whether the length is 1."""
    net = Net(3)
    x = net.relu(net.op("Conv", net.input("x", "N", 4, "length"), net.weight("w", 6, 4, 3), strides=[3]))
    length = net.op("Gather", net.op("Shape", x), net.constant("axis", np.array(2)))
    alone = net.op("Equal", length, net.constant("one", np.array(1)))
    axes = net.constant("axes", np.array([2]))
    squeezed = helper.make_node("Squeeze", [x, axes], ["squeezed"])
    largest = helper.make_node("ReduceMax", [x], ["largest"], axes=[2], keepdims=0)
    then, other = (
        helper.make_graph([node], node.op_type, [], [floats(node.output[0], "N", 6)]) for node in (squeezed, largest)
    )
    net.op("If", alone, out="either", then_branch=then, else_branch=other)
    return net.proto(net.gemm("either", 6, 5), opset=13)


def test_control_flow_that_asks_for_sizes_alone_does_not_keep_a_whole_from_training(tmp_path: Path) -> None:
    model = squeezed_if_one()
    loaded = ir.from_proto(model)
    data = {"x": np.random.default_rng(0).standard_normal((120, 4, 3)).astype(np.float32)}
    student = perturbed(model)
    tuned, training = tune(student, store_of(tmp_path, {**data, **run(model, data)}))
    assert training.loss < 0.5 * training.loss_start
    assert [n.op_type for n in tuned.graph] == [n.op_type for n in loaded.graph]
    longer = {"x": np.random.default_rng(1).standard_normal((7, 4, 9)).astype(np.float32)}
    (name,) = run(model, longer)
    error = [np.abs(run(m, longer)[name] - run(model, longer)[name]).mean() for m in (student, tuned)]
    assert error[1] < error[0]


def test_why_a_whole_does_not_convert_is_told_before_it_is_trained() -> None:
    decided, opened = (ir.from_proto(model) for model in (with_if(), squeezed_if_one()))
    image, line = np.zeros((2, 3, 6, 6), np.float32), np.zeros((2, 4, 3), np.float32)
    reason = why_not_converted(decided, Interface(), ["logits"], {"x": image})
    assert reason is not None and "If" in reason
    assert why_not_converted(opened, Interface(), [str(opened.graph.outputs[0].name)], {"x": line}) is None


def test_other_outputs_are_matched_by_the_squared_error(tmp_path: Path) -> None:
    net = Net()
    net.op("Tanh", net.gemm(net.relu(net.gemm(net.input("x", "N", 6), 6, 16)), 16, 1), out="y")
    model = net.proto("y")
    student = perturbed(model)
    tuned, _ = tune(student, answers(tmp_path, model))
    fresh = inputs_of(model, 50, seed=9)
    teacher = run(model, fresh)["y"]
    before, after = (np.square(run(s, fresh)["y"] - teacher).mean() for s in (student, tuned))
    assert after < 0.5 * before


def reader() -> onnx.ModelProto:
    """Probabilities of 5 characters at each of 7 positions, as a reader of text lines gives them."""
    net = Net()
    y = net.relu(net.matmul(net.input("x", "N", 7, 6), 6, 12))
    net.op("Softmax", net.op("Add", net.matmul(y, 12, 5), net.weight("b", 5)), axis=-1, out="y")
    return net.proto("y")


def test_probabilities_of_each_position_are_matched_as_classes(tmp_path: Path) -> None:
    model = reader()
    student = perturbed(model)
    tuned, training = tune(student, answers(tmp_path, model))
    fresh = inputs_of(model, 50, seed=9)
    teacher, before, after = (np.log(run(s, fresh)["y"]) for s in (model, student, tuned))
    assert divergence(after, teacher) < 0.5 * divergence(before, teacher)
    assert (after.argmax(-1) == teacher.argmax(-1)).mean() > (before.argmax(-1) == teacher.argmax(-1)).mean()
    assert training.loss < training.loss_start


def test_several_outputs_are_trained_together(tmp_path: Path) -> None:
    net = Net()
    x = net.relu(net.gemm(net.input("x", "N", 6), 6, 16))
    net.op("Softmax", net.gemm(x, 16, 4), axis=-1, out="classes")
    net.op("Reshape", net.gemm(x, 16, 6), net.ints(0, 2, 3), out="boxes")
    net.op("ArgMax", net.gemm(x, 16, 4), axis=1, out="first")
    model = net.proto("boxes", "classes", "first")
    student = perturbed(model)
    tuned, _ = tune(student, answers(tmp_path, model))
    fresh = inputs_of(model, 50, seed=9)
    teacher, before, after = (run(s, fresh) for s in (model, student, tuned))
    assert (
        np.square(after["boxes"] - teacher["boxes"]).mean() < 0.5 * np.square(before["boxes"] - teacher["boxes"]).mean()
    )
    scores = [np.log(values["classes"]) for values in (teacher, before, after)]
    assert divergence(scores[2], scores[0]) < 0.5 * divergence(scores[1], scores[0])
    assert [v.name for v in tuned.graph.outputs] == ["boxes", "classes", "first"]


def test_labels_pull_the_student_their_way(tmp_path: Path) -> None:
    model = residual_cnn()
    store = answers(tmp_path, model)
    labels = np.full(store.samples, 3, dtype=np.int64)
    tuned, _ = tune(perturbed(model), store, label_weight=1.0, labels=labels)
    fresh = inputs_of(model, 50, seed=9)
    assert (run(tuned, fresh)["logits"].argmax(-1) == 3).mean() > 0.9


def test_a_pattern_of_zeros_stays(tmp_path: Path) -> None:
    model = residual_cnn()
    student = perturbed(model)
    rng = np.random.default_rng(0)
    masks: dict[str, Array] = {}
    for name, value in student.graph.initializers.items():
        array = np.array(value.const_value.numpy())  # type: ignore[union-attr]
        if array.ndim == 4:
            array[rng.random(array.shape) < 0.5] = 0
            masks[name] = array == 0
            value.const_value = ir.tensor(array, name=name)
    tuned, training = tune(student, answers(tmp_path, model))
    assert training.loss < training.loss_start
    for name, zero in masks.items():
        assert not tuned.graph.initializers[name].const_value.numpy()[zero].any()  # type: ignore[union-attr]


def test_the_student_itself_is_not_changed(tmp_path: Path) -> None:
    model = residual_cnn()
    student = perturbed(model)
    before = _weights(student)
    tuned, _ = tune(student, answers(tmp_path, model))
    assert all(np.array_equal(before[name], array) for name, array in _weights(student).items())
    assert any(not np.array_equal(before[name], array) for name, array in _weights(tuned).items())


def _weights(model: ir.Model) -> Mapping[str, Array]:
    return {name: np.array(v.const_value.numpy()) for name, v in model.graph.initializers.items()}  # type: ignore[union-attr]


def test_what_cannot_be_trained_as_a_whole_says_so(tmp_path: Path) -> None:
    net = Net()
    net.op("Bernoulli", net.op("Sigmoid", net.gemm(net.input("x", "N", 6), 6, 4)), out="y", dtype=1)
    model = net.proto("y")
    with pytest.raises(SliceError, match="Bernoulli"):
        tune(ir.from_proto(model), answers(tmp_path, model))
