"""Partial models answer as the whole spliced model does, and qualities equal their direct computation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from ndonnx.assemble.splice import splice
from ndonnx.errors import DataError, ModelError, ParityError
from ndonnx.metrics.partial import Judged, Losses, PartialModels, Quality
from ndonnx.partition import nodes_between, sort_nodes
from tests.helpers.models import (
    Array,
    Net,
    inputs_of,
    parted,
    residual_cnn,
    run,
    several_heads,
    shape_from_before,
    stack,
    transformer,
    unet,
    with_if,
)
from tests.helpers.partials import batches_of, half

SAMPLES = 70
MODELS = {
    "residual": residual_cnn(),
    "two inputs, context": transformer(),
    "long skips": unet(),
    "several heads": several_heads(),
    "shapes from before": shape_from_before(),
    "control flow": with_if(),
    "branches": stack(["plain", "squeeze_excite", "branches"]),
}


def partials(
    model: onnx.ModelProto, folder: Path, samples: int = SAMPLES, labels: Any = None, **options: Any
) -> tuple[PartialModels, dict[str, Array]]:
    _, parts = parted(model)
    data = inputs_of(model, samples)
    return PartialModels(parts, Judged(batches_of(data), samples, labels), folder, threads=2, **options), data


def assert_close(found: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5 * float(np.abs(value).max()))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_a_partial_model_answers_as_the_whole_spliced_one(tmp_path: Path, model: onnx.ModelProto) -> None:
    partial, data = partials(model, tmp_path)
    with partial:
        assert_close(partial.outputs, run(model, data))
        assert partial.names
        for name in partial.names:
            student = half(partial.parts, name, partial)
            spliced = splice(partial.parts.model, {name: student})
            expected = run(spliced, data)
            found = partial.replaced(name, student)
            assert_close(found, expected)
            assert_close(partial.whole(spliced), expected)
            assert any(not np.array_equal(found[output], partial.outputs[output]) for output in found)
    assert not list(tmp_path.rglob("*.npy"))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_the_teachers_own_values_and_slices_give_its_answers(tmp_path: Path, model: onnx.ModelProto) -> None:
    partial, _ = partials(model, tmp_path)
    with partial:
        for n in partial.parts.distillable:
            assert_close(partial.behind(n.name, partial.exit(n.name)), partial.outputs)
            assert_close(partial.replaced(n.name, partial.parts.slice_of(n)), partial.outputs)


def test_only_what_lies_behind_is_run(tmp_path: Path) -> None:
    """Long skips and shapes come from captured values: no later part begins at the model's inputs."""
    for model in (residual_cnn(), unet(), shape_from_before()):
        partial, _ = partials(model, tmp_path / str(len(list(tmp_path.iterdir()))))
        with partial:
            costs = []
            for n in partial.parts.distillable:
                after = partial._cuts.after(n)
                behind = partial._make_behind(n)
                assert "x" not in behind.inputs
                costs.append(len(after))
            assert costs == sorted(costs, reverse=True)


def test_a_fixed_batch_is_kept_and_its_filling_cut_off(tmp_path: Path) -> None:
    proto = residual_cnn(2)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 16
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 16
    _, parts = parted(proto)
    data = inputs_of(residual_cnn(2), 48)
    with PartialModels(parts, Judged(batches_of(data), 42), tmp_path, threads=1) as partial:
        assert partial.outputs["logits"].shape == (42, 5)
        name = partial.names[0]
        student = half(parts, name, partial)
        expected = run(splice(parted(residual_cnn(2))[1].model, {name: student}), data)["logits"][:42]
        np.testing.assert_allclose(partial.replaced(name, student)["logits"], expected, rtol=1e-4, atol=1e-5)


def test_a_budget_lowers_the_number_of_samples(tmp_path: Path) -> None:
    partial, _ = partials(residual_cnn(1), tmp_path, 64)
    per_sample = partial._store.nbytes // 64
    partial.close()
    fewer, data = partials(residual_cnn(1), tmp_path, 64, labels=np.arange(64) % 5, budget=10 * per_sample)
    with fewer:
        assert fewer.samples == 10
        assert fewer.labels is not None and len(fewer.labels) == 10
        assert_close(fewer.outputs, {name: value[:10] for name, value in run(residual_cnn(1), data).items()})


def test_a_slice_that_does_not_fit_is_told_by_its_neighbourhood(tmp_path: Path) -> None:
    partial, _ = partials(residual_cnn(2), tmp_path)
    with partial:
        name = partial.names[0]
        with pytest.raises(ParityError, match=rf"{name}: expected .* found"):
            partial.behind(name, np.zeros((SAMPLES, 3), np.float32))
        student = half(partial.parts, name, partial)
        student.graph.node(0).op_type = "NoSuchOperator"
        with pytest.raises(ParityError, match=name):
            partial.replaced(name, student)


def test_labels_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a label for each of 70 samples"):
        partials(residual_cnn(1), tmp_path, labels=np.zeros(69, np.int64))
    scores = {"y": np.zeros((4, 3), np.float32)}
    with pytest.raises(DataError, match="expected a label for each of 4"):
        Quality(scores, np.zeros(3, np.int64))
    with pytest.raises(DataError, match="sample 2: label 3 is no class of the model, expected 0 to 2"):
        Quality(scores, np.array([0, 1, 3, 0]))
    with pytest.raises(ModelError, match="no float output"):
        Quality({"y": np.zeros(4, np.int64)})


def test_paths() -> None:
    net = Net()
    a = net.relu(net.input("x", "N", 4), out="a")
    b = net.op("Tanh", a, out="b")
    proto = net.proto(net.op("Add", net.op("Exp", b, out="e"), a, out="y"))
    _, parts = parted(proto)
    values = ir.convenience.create_value_mapping(parts.model.graph)
    nodes, read = nodes_between([values["y"]], {"a", "b"})
    assert [node.op_type for node in nodes] == ["Exp", "Add"]
    assert {value.name for value in read} == {"a", "b"}
    assert nodes_between([values["a"]], {"a"}) == ([], [values["a"]])
    assert [n.op_type for n in sort_nodes(list(parts.model.graph)[::-1])] == ["Relu", "Tanh", "Exp", "Add"]


# Quality


def scores_of(classes: list[int], count: int = 3) -> dict[str, Array]:
    return {"logits": np.eye(count, dtype=np.float32)[classes] * 4}


def test_accuracy_and_agreement_by_hand() -> None:
    teacher, student = scores_of([0, 1, 2, 0]), scores_of([0, 2, 2, 1])
    with_labels = Quality(teacher, np.array([0, 1, 1, 1]))
    assert with_labels.kind == "accuracy"
    assert with_labels.metric(teacher) == 0.5
    assert with_labels.drop(teacher) == 0
    assert with_labels.metric(student) == 0.5
    assert with_labels.drop(student) == 0
    assert with_labels.drop(scores_of([1, 0, 0, 0])) == 0.5
    assert with_labels.drop(scores_of([0, 1, 1, 1])) == -0.5
    without = Quality(teacher)
    assert without.kind == "agreement"
    assert without.metric(student) == 0.5
    assert without.drop(student) == 0.5
    assert without.drop(teacher) == 0


def test_divergence_by_hand() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    for form in (np.log, lambda x: np.log(x) + 7, lambda x: x):  # logits, shifted ones, probabilities
        teacher, student = ({"logits": np.stack([form(v), form(p)]).astype(np.float32)} for v in (p, q))
        quality = Quality(teacher)
        assert quality.divergence(student) == pytest.approx(expected / 2, rel=1e-5)
        assert quality.divergence(teacher) == 0
    broken = {"logits": np.full((2, 3), np.nan, np.float32)}
    assert Quality(teacher).divergence(broken) == math.inf
    assert Quality(teacher).drop(broken) == 1


def test_nmse_is_pooled_over_outputs_and_leaves_masks_out() -> None:
    teacher = {"a": np.array([[[1.0, 3.0]], [[5.0, -np.inf]]]), "b": np.array([[[2.0]], [[4.0]]])}
    student = {"a": np.array([[[1.5, 3.0]], [[5.0, 9.0]]]), "b": np.array([[[2.0]], [[3.0]]])}
    quality = Quality(teacher)
    spread = (1 - 3) ** 2 + 0 + (5 - 3) ** 2 + 2  # around the means 3 and 3
    assert quality.kind == "nmse"
    assert quality.drop(student) == pytest.approx((0.25 + 1) / spread)
    assert quality.divergence(student) == quality.drop(student) == quality.metric(student)
    assert quality.drop(teacher) == quality.bound(teacher) == 0
    assert quality.drop({"a": student["a"] * np.nan, "b": student["b"]}) == math.inf
    constant = Quality({"a": np.ones((2, 1, 1))})
    assert constant.drop({"a": np.ones((2, 1, 1))}) == 0
    assert constant.drop({"a": np.zeros((2, 1, 1))}) == math.inf


def test_the_bound_with_no_differences_is_the_exact_one() -> None:
    teacher = scores_of([0] * 500)
    assert Quality(teacher).bound(teacher) == pytest.approx(-math.log(0.05) / 500)
    assert Quality(teacher, np.zeros(500, np.int64)).bound(teacher, 0.99) == pytest.approx(-math.log(0.01) / 500)


@pytest.mark.parametrize("part", [0.002, 0.01, 0.05])
def test_the_bound_covers_the_true_drop_as_often_as_it_says(part: float) -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        student = np.where(rng.random(1000) < part, 1, 0)
        covered += Quality(scores_of([0] * 1000)).bound(scores_of(student.tolist())) >= part
    assert covered >= 0.92 * 400  # 95% but for chance and the normal approximation


@pytest.mark.parametrize("kind", ["accuracy", "agreement", "nmse"])
@pytest.mark.parametrize("size", [1, 7, 40])
def test_losses_of_batches_add_up_to_those_of_all(kind: str, size: int) -> None:
    rng = np.random.default_rng(3)
    names = {"boxes": (40, 3, 2), "other": (40, 5)} if kind == "nmse" else {"logits": (40, 3)}
    teacher, student = ({name: 3 + rng.normal(size=shape) for name, shape in names.items()} for _ in range(2))
    labels = rng.integers(0, 3, 40) if kind == "accuracy" else None
    whole, first = Quality(teacher, labels), None
    losses = Losses(whole.kind)
    for start in range(0, 40, size):
        rows = slice(start, start + size)
        theirs, ours = ({name: values[rows] for name, values in one.items()} for one in (teacher, student))
        count = len(next(iter(ours.values())))
        quality = Quality(theirs, None if labels is None else labels[rows], count, like=first)
        first = first or quality
        losses.add(quality, ours)
    assert losses.kind == whole.kind == kind and losses.samples == 40
    assert losses.drop == pytest.approx(whole.drop(student)) and losses.metric == pytest.approx(whole.metric(student))
    assert losses.divergence == pytest.approx(whole.divergence(student))
    assert losses.bound(0.9) == pytest.approx(whole.bound(student, 0.9))


def test_no_more_than_everything_can_be_lost() -> None:
    quality = Quality(scores_of([0] * 2))
    assert quality.bound(scores_of([0, 0])) == quality.bound(scores_of([1, 1])) == 1


def test_the_bound_to_expect_of_other_samples_is_theirs() -> None:
    """As many times over as good as these: what is known of few answers says what many of the kind would give."""
    answers = [0] * 95 + [1] * 5
    few, many = (Quality(scores_of([0] * 100 * k)) for k in (1, 30))
    expected = few.bound(scores_of(answers), 0.96, 3000)
    assert expected == pytest.approx(many.bound(scores_of(answers * 30), 0.96), rel=1e-3)
    assert expected < few.bound(scores_of(answers), 0.96)


def test_a_bound_shrinks_with_samples_and_grows_with_confidence() -> None:
    answers = [0] * 95 + [1] * 5
    few, many = (Quality(scores_of([0] * 100 * k)).bound(scores_of(answers * k)) for k in (1, 10))
    assert 0.05 < many < few
    quality = Quality(scores_of([0] * 100))
    assert quality.bound(scores_of(answers), 0.99) > quality.bound(scores_of(answers), 0.9)


def test_an_output_without_samples_is_left_as_it_is(tmp_path: Path) -> None:
    net = Net()
    x = net.input("x", "N", 6)
    h = net.gemm(net.relu(net.gemm(x, 6, 8)), 8, 4, out="y")
    size = net.op("Cast", net.op("Shape", h), to=onnx.TensorProto.FLOAT, out="size")
    proto = net.proto(h, size, types={"size": helper.make_tensor_value_info("size", onnx.TensorProto.FLOAT, [2])})
    _, parts = parted(proto)
    data = inputs_of(proto, 32)
    with PartialModels(parts, Judged(batches_of(data), 32), tmp_path, threads=1) as partial:
        name = partial.names[0]
        assert set(partial.outputs) >= {"y"}
        found = partial.replaced(name, half(parts, name, partial))
        assert found["y"].shape == (32, 4)
