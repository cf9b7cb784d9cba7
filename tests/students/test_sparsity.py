"""Zeros in weights: so many and no others, where the pattern says, held while trained, and well chosen."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ndonnx.config.recipe import Recipe
from ndonnx.convert import TorchSlice, to_torch, write_back
from ndonnx.distill.losses import NeighbourhoodLoss
from ndonnx.distill.plan import Plan
from ndonnx.distill.samples import SliceSamples, Source
from ndonnx.distill.trainer import train
from ndonnx.errors import ShrinkError
from ndonnx.graph import save
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.graph.storage.files import compressed_bytes
from ndonnx.partition import ChannelGroups
from ndonnx.students import Candidate, Constraint, TeacherSlice
from ndonnx.students.least_squares import Regression
from ndonnx.students.masks import FixedZeros, GrowingZeros, LinearWeight, Pattern, linear_weights, ramp, zeros_of
from ndonnx.students.methods.sparsity import Sparsity
from ndonnx.students.registry import method_of
from ndonnx.students.sparse_fit import fit, from_groups, to_groups
from ndonnx.teacher import ActivationStore
from tests.helpers.models import Array, Net

NO_GROUPS = ChannelGroups((), (), ())
PLAN = Plan(steps=40, batch_size=16, lr=0.1, warmup=0.05, seed=0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def correlated(*shape: int, seed: int = 0) -> Array:
    """Samples whose channels (second axis) say much of the same."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((3, shape[1]))
    rest = rng.standard_normal(shape)
    common = np.einsum("nk...,kc->nc...", rng.standard_normal((shape[0], 3, *shape[2:])), mixing)
    return (common + 0.3 * rest + 1).astype(np.float32)


def teacher_of(net: Net, output: str, x: Array) -> TeacherSlice:
    model = infer_shapes(ir.from_proto(net.proto(output)))
    return TeacherSlice("n01", model, NO_GROUPS, {"x": x})


def unit(seed: int = 0, samples: int = 40) -> TeacherSlice:
    net = Net(seed)
    x = net.input("x", "N", 8, 5, 5)
    y = net.conv(net.relu(net.conv(x, 8, 12, out="a")), 12, 8, out="b")
    return teacher_of(net, net.relu(net.op("Add", y, x)), correlated(samples, 8, 5, 5))


def dense(samples: int = 300) -> TeacherSlice:
    net = Net(1)
    y = net.relu(net.gemm(net.input("x", "N", 12), 12, 20, out="a"))
    return teacher_of(net, net.matmul(y, 20, 6, out="b"), correlated(samples, 12))


def build(teacher: TeacherSlice, sparsity: str, init: Any = "least-squares") -> Candidate:
    return Sparsity(sparsity, init).build(teacher, np.random.default_rng(0))


def numbers(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def zeros(model: ir.Model, name: str) -> int:
    return int((numbers(model, name) == 0).sum())


def error(teacher: TeacherSlice, student: ir.Model) -> float:
    exit_ = teacher.model.graph.outputs[0].name or ""
    ours, theirs = (teacher.run(model, [exit_])[exit_] for model in (student, teacher.model))
    return float(np.square(ours - theirs, dtype=np.float64).mean())


def imposed(candidate: Candidate) -> ir.Model:
    """The candidate with its constraint in force."""
    module = to_torch(candidate.model)
    assert candidate.constraint is not None
    impose(candidate.constraint, module, 1.0)
    return write_back(candidate.model, module.trained_weights())


def impose(constraint: Constraint, module: TorchSlice, done: float) -> None:
    with torch.no_grad():
        weights = {name: w.data for name, w in zip(module.weight_names, module.weights, strict=True)}
        constraint.impose(weights, done)


# The ramp


def test_the_ramp_is_the_published_polynomial() -> None:
    # s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3, by hand
    assert ramp(0.0, 0.8) == 0
    assert ramp(0.25, 0.8) == pytest.approx(0.8 - 0.8 * 0.421875)
    assert ramp(0.5, 0.8) == pytest.approx(0.7)
    assert ramp(1.0, 0.8) == 0.8
    assert ramp(0.5, 0.9, first=0.5, begin=0.2, end=0.8) == pytest.approx(0.9 - 0.4 * 0.125)
    assert ramp(0.1, 0.9, first=0.5, begin=0.2, end=0.8) == 0.5
    assert ramp(0.9, 0.9, first=0.5, begin=0.2, end=0.8) == 0.9


def test_zeros_grow_along_the_ramp_and_then_stay_the_same_ones() -> None:
    layout = LinearWeight("w", (10, 20), 1)
    constraint = GrowingZeros(Pattern(part=0.6), (layout,), settled=0.5)
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 20, generator=rng)
    counts = []
    for done in (0.125, 0.25, 0.375, 0.5):
        constraint.impose({"w": weight}, done)
        counts.append(int((weight == 0).sum()))
        weight += 1e-6 * torch.randn(10, 20, generator=rng)
    expected = [round((1 - (1 - part) ** 3) * 120) for part in (0.25, 0.5, 0.75, 1)]
    assert counts == expected
    held = weight.abs() < 1e-4
    weight[held] = 100.0  # a step that would bring them back
    constraint.impose({"w": weight}, 0.75)
    assert torch.equal(weight == 0, held)


def test_the_smallest_weights_go() -> None:
    weight = torch.arange(1.0, 13).reshape(3, 4) * torch.tensor([1.0, -1, 1, -1])
    GrowingZeros(Pattern(part=0.5), (LinearWeight("w", (3, 4), 1),), 0.5).impose({"w": weight}, 1.0)
    assert (weight == 0).flatten().tolist() == [True] * 6 + [False] * 6


def test_a_training_that_begins_anew_grows_its_zeros_anew() -> None:
    constraint = GrowingZeros(Pattern(part=0.5), (LinearWeight("w", (1, 8), 1),), settled=0.5)
    first, second = torch.arange(1.0, 9).reshape(1, 8), torch.arange(8.0, 0, -1).reshape(1, 8)
    constraint.impose({"w": first}, 1.0)
    constraint.impose({"w": second}, 0.01)
    assert (second == 0).sum() == 0
    constraint.impose({"w": second}, 0.6)
    assert (second == 0)[0].tolist() == [False] * 4 + [True] * 4


# Patterns


def in_groups(weight: Array, axis: int, group: int) -> Array:
    """Whole groups along an axis: (..., groups, group)."""
    rows = np.moveaxis(weight, axis, -1)
    whole = rows.shape[-1] // group * group
    return rows[..., :whole].reshape(*rows.shape[:-1], -1, group)


@given(
    st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 3)),
    st.integers(0, 1),
    st.sampled_from(["2:4", "1:2", "3:5", "1:4"]),
    st.floats(0.01, 1),
    st.integers(0, 5),
)
def test_every_whole_group_gets_its_zeros_and_what_is_left_over_gets_none(
    shape: tuple[int, int, int], axis: int, text: str, part: float, seed: int
) -> None:
    pattern, layout = Pattern.parse(text), LinearWeight("w", shape, axis)
    magnitude = np.random.default_rng(seed).integers(0, 3, shape).astype(np.float32)  # with many equal ones
    goes = ~pattern.mask(torch.from_numpy(magnitude), layout).numpy()
    whole = shape[axis] // pattern.group * pattern.group
    assert (in_groups(goes, axis, pattern.group).sum(axis=-1) == pattern.zeros).all()
    assert not np.take(goes, range(whole, shape[axis]), axis=axis).any()
    assert goes.sum() == pattern.count(layout)
    some = round(part * pattern.count(layout))
    early = ~pattern.mask(torch.from_numpy(magnitude), layout, some).numpy()
    assert early.sum() == some
    assert (in_groups(early, axis, pattern.group).sum(axis=-1) <= pattern.zeros).all()


@given(st.integers(1, 40), st.integers(1, 5), st.floats(0, 0.999), st.integers(0, 5))
def test_a_part_is_rounded_to_whole_weights(rows: int, columns: int, part: float, seed: int) -> None:
    layout = LinearWeight("w", (rows, columns), 1)
    magnitude = torch.from_numpy(np.random.default_rng(seed).integers(0, 3, (rows, columns)).astype(np.float32))
    mask = Pattern(part=part).mask(magnitude, layout)
    assert int((~mask).sum()) == round(part * rows * columns)
    if (~mask).any() and mask.any():
        assert magnitude[~mask].max() <= magnitude[mask].min()


def test_groups_of_a_transposed_convolution_are_not_mixed() -> None:
    layout = LinearWeight("w", (6, 1, 1, 1), 0, blocks=2)
    magnitude = torch.tensor([3.0, 1, 2, 3, 2, 1]).reshape(6, 1, 1, 1)
    goes = ~Pattern.parse("1:2").mask(magnitude, layout)
    assert goes.flatten().tolist() == [False, True, False, False, True, False]


def test_the_axis_that_is_summed_over_is_that_of_the_operator() -> None:
    net = Net()
    x = net.input("x", "N", 6, 4, 4)
    y = net.conv(x, 6, 8, group=2, out="conv")
    y = net.op("ConvTranspose", y, net.weight("up.weight", 8, 3, 2, 2), out="up", group=2, strides=[2, 2])
    y = net.op("Flatten", net.op("GlobalAveragePool", y))
    y = net.gemm(y, 6, 7, out="wide")
    y = net.op("Gemm", y, net.weight("thin.weight", 7, 5), out="thin")
    y = net.op("Transpose", net.matmul(y, 5, 4, out="product"), perm=[1, 0])
    y = net.op("MatMul", net.weight("left.weight", 3, 4), y, out="y")
    model = infer_shapes(ir.from_proto(net.proto(y)))
    found = {weight.name: (weight.shape[weight.axis], weight.blocks) for weight in linear_weights(model.graph)}
    assert found == {
        "conv.weight": (3, 1),
        "up.weight": (8, 2),
        "wide.weight": (6, 1),
        "thin.weight": (7, 1),
        "product.weight": (5, 1),
        "left.weight": (4, 1),
    }


# Candidates


@pytest.mark.parametrize("init", ["teacher", "least-squares", "random"])
@pytest.mark.parametrize("sparsity", ["0.37", "0.8"])
def test_every_weight_of_its_own_gets_its_share(init: str, sparsity: str) -> None:
    teacher = unit()
    candidate = build(teacher, sparsity, init)
    student = imposed(candidate)
    assert candidate.spec == f"sparsity {sparsity}"
    for name in ("a.weight", "b.weight"):
        assert zeros(student, name) == round(float(sparsity) * numbers(student, name).size)
    for name in ("a.bias", "b.bias"):
        assert zeros(student, name) == 0


@pytest.mark.parametrize("init", ["teacher", "least-squares"])
def test_groups_lie_along_the_input_channels(init: str) -> None:
    student = imposed(build(unit(), "2:4", init))
    for name in ("a.weight", "b.weight"):
        assert ((in_groups(numbers(student, name), 1, 4) == 0).sum(axis=-1) == 2).all()
    student = imposed(build(dense(), "3:5", init))
    assert ((in_groups(numbers(student, "b.weight"), 0, 5) == 0).sum(axis=-1) == 3).all()
    a = numbers(student, "a.weight")  # 12 inputs: two groups, and two left over
    assert ((in_groups(a, 1, 5) == 0).sum(axis=-1) == 3).all()
    assert (a[:, 10:] != 0).all()


def test_nothing_is_changed_at_sparsity_0() -> None:
    teacher = unit()
    candidate = build(teacher, "0")
    assert candidate.constraint is None
    assert all(np.array_equal(numbers(candidate.model, n), numbers(teacher.model, n)) for n in ("a.weight", "b.bias"))


def test_a_slice_without_a_linear_operator_is_refused() -> None:
    net = Net()
    x = net.norm(net.input("x", "N", 6, 4, 4), 6)
    with pytest.raises(ShrinkError, match=r"n01: no weight of a linear operator is large enough for sparsity 0\.5"):
        build(teacher_of(net, net.relu(x), correlated(8, 6, 4, 4)), "0.5")


def test_axes_shorter_than_a_group_are_refused() -> None:
    net = Net()
    y = net.conv(net.input("x", "N", 3, 4, 4), 3, 8)
    with pytest.raises(ShrinkError, match="2:4"):
        build(teacher_of(net, y, correlated(8, 3, 4, 4)), "2:4")


def test_a_weight_that_two_operators_share_stays_one() -> None:
    net = Net()
    x = net.input("x", "N", 8)
    weight = net.weight("w", 8, 8)
    y = net.op("Gemm", net.relu(net.op("Gemm", x, weight, transB=1)), weight, transB=1)
    teacher = teacher_of(net, y, correlated(64, 8))
    candidate = build(teacher, "0.5")
    assert [value.name for value in candidate.model.graph.initializers.values()] == ["w"]
    before, after = numbers(teacher.model, "w"), numbers(candidate.model, "w")
    assert zeros(candidate.model, "w") == 32
    assert np.array_equal(after[after != 0], before[after != 0])
    assert np.abs(before[after == 0]).max() < np.abs(before[after != 0]).min()


def test_embeddings_and_norms_stay_whole() -> None:
    net = Net()
    table = net.weight("table", 11, 8)
    ids = net.op("Cast", net.input("x", "N", 4), to=7)
    y = net.op("LayerNormalization", net.op("Gather", table, ids), net.weight("s", 8), net.weight("b", 8), axis=-1)
    teacher = teacher_of(
        net, net.matmul(y, 8, 6, out="m"), np.random.default_rng(0).integers(0, 11, (30, 4)).astype("f")
    )
    student = build(teacher, "0.5").model
    assert {name: zeros(student, name) for name in ("table", "s", "b", "m.weight")} == {
        "table": 0,
        "s": 0,
        "b": 0,
        "m.weight": 24,
    }


def test_the_recipe_asks_for_it() -> None:
    assert method_of(Recipe(method="sparsity", sparsity="2:4", init="teacher")) == Sparsity("2:4", "teacher")


# The closed form


@pytest.mark.parametrize("sparsity", ["0.5", "0.8", "2:4"])
def test_on_correlated_inputs_the_closed_form_is_far_better_than_taking_the_smallest(sparsity: str) -> None:
    for teacher in (unit(), dense()):
        smallest = error(teacher, imposed(build(teacher, sparsity, "teacher")))
        assert error(teacher, build(teacher, sparsity).model) < 0.25 * smallest


def test_a_problem_with_a_sparse_answer_gets_it() -> None:
    """Outputs that a sparse weight explains exactly: its zeros are found, though the dense weight hides them."""
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((4000, 16)) @ (np.eye(16) + 0.3 * rng.standard_normal((16, 16)))).astype(np.float32)
    truth = rng.standard_normal((16, 6)) * (rng.random((16, 6)) < 0.4)
    y = (x @ truth).astype(np.float32)
    net = Net()
    net.matmul(net.input("x", "N", 16), 16, 6, out="y")
    node = next(iter(infer_shapes(ir.from_proto(net.proto("y"))).graph))
    layout = LinearWeight("w", (16, 6), 0)
    zeros_wanted = int((truth == 0).sum())

    def choose(counts: torch.Tensor, part: float) -> torch.Tensor:
        return Pattern(part=0.5).mask(counts[0], layout, round(part * zeros_wanted))[None]

    problem = Regression(node, len(x))
    problem.add(range(len(x)), x, y)
    solution, mask = fit(problem.moments().about_zero(), torch.zeros(1, 16, 6, dtype=torch.float64), choose)
    assert np.array_equal(mask[0].numpy(), truth != 0)
    np.testing.assert_allclose(solution[0].numpy(), truth, atol=2e-3)


def test_weights_come_back_from_their_groups() -> None:
    net = Net()
    net.conv(net.input("x", "N", 6, 5, 5), 6, 4, group=2, out="y")
    model = infer_shapes(ir.from_proto(net.proto("y")))
    node = next(iter(model.graph))
    weight = torch.tensor(numbers(model, "y.weight"), dtype=torch.float64)
    for group in range(2):
        assert torch.equal(to_groups(node, weight)[group], weight[2 * group :][:2].reshape(2, 27).T)
    assert torch.equal(from_groups(node, to_groups(node, weight), tuple(weight.shape)), weight)


@pytest.mark.parametrize("group", [1, 2, 8])
def test_grouped_and_depthwise_convolutions_have_a_closed_form_too(group: int) -> None:
    net = Net()
    y = net.conv(net.input("x", "N", 8, 6, 6), 8, 8, group=group, out="y")
    teacher = teacher_of(net, y, correlated(60, 8, 6, 6))
    smallest = error(teacher, imposed(build(teacher, "0.5", "teacher")))
    assert error(teacher, build(teacher, "0.5").model) < 0.7 * smallest


def test_channels_that_are_always_zero_do_no_harm() -> None:
    teacher = dense()
    x = teacher.samples["x"].copy()
    x[:, 3:7] = 0
    teacher = replace(teacher, samples={"x": x})
    student = build(teacher, "0.5").model
    assert np.isfinite(numbers(student, "a.weight")).all()
    assert np.abs(numbers(student, "a.weight")).max() < 100


# Training


def samples_of(teacher: TeacherSlice, folder: Path) -> SliceSamples:
    exit_ = teacher.model.graph.outputs[0].name or ""
    values = {"x": teacher.samples["x"], exit_: teacher.run(teacher.model, [exit_])[exit_]}
    writer = ActivationStore.create(
        folder, {name: (array.dtype, array.shape[1:]) for name, array in values.items()}, len(values["x"])
    )
    for name, array in values.items():
        writer.append(name, np.asarray(array))
    store = writer.finish()
    return SliceSamples({name: Source(store, name) for name in values}, ["x"], 0.1)


@pytest.mark.parametrize("init", ["teacher", "least-squares", "random"])
@pytest.mark.parametrize("sparsity", ["0.7", "2:4"])
def test_zeros_are_zeros_in_the_trained_student(init: str, sparsity: str, tmp_path: Path) -> None:
    teacher = unit(samples=400)
    candidate = build(teacher, sparsity, init)
    module, samples = to_torch(candidate.model), samples_of(teacher, tmp_path)
    objective = NeighbourhoodLoss(teacher.model.graph.outputs[0].name or "")
    training = train(module, samples, objective, PLAN, lambda step, steps, error: None, candidate.constraint)
    student = write_back(candidate.model, module.trained_weights())
    assert training.best_step > 0
    assert candidate.constraint is not None
    assert training.best_step >= candidate.constraint.settled * PLAN.steps
    for name in ("a.weight", "b.weight"):
        array = numbers(student, name)
        if sparsity == "2:4":
            assert ((in_groups(array, 1, 4) == 0).sum(axis=-1) == 2).all()
        else:
            assert zeros(student, name) == round(0.7 * array.size)


def test_zeros_of_the_closed_form_may_come_back_early_but_not_late() -> None:
    candidate = build(unit(), "0.8")
    start = numbers(candidate.model, "a.weight")
    weight = torch.tensor(start)
    total = round(0.8 * start.size)
    assert candidate.constraint is not None

    def step() -> None:
        candidate.constraint.impose({"a.weight": weight, "b.weight": torch.ones(8, 12, 3, 3)}, done)

    done = 0.01
    step()
    assert int((weight == 0).sum()) == total  # nothing has moved as yet
    weight[weight == 0] = 100.0
    done = 0.02
    step()
    assert round(0.8 * total) <= int((weight == 0).sum()) < total
    done = 1.0
    step()
    held = weight == 0
    assert int(held.sum()) == total
    weight[held] = 100.0
    step()
    assert torch.equal(weight == 0, held)


def test_a_student_whose_zeros_have_not_all_come_is_never_kept(tmp_path: Path) -> None:
    """Before it settles, a dense student is the teacher without error; the best state must be a sparse one."""
    teacher = unit(samples=200)
    candidate = build(teacher, "0.9", "teacher")
    module, samples = to_torch(candidate.model), samples_of(teacher, tmp_path)
    objective = NeighbourhoodLoss(teacher.model.graph.outputs[0].name or "")
    training = train(module, samples, objective, PLAN, lambda step, steps, error: None, candidate.constraint)
    assert training.nmse > 1e-3
    weights = module.trained_weights()
    assert (weights["a.weight"] == 0).sum() == round(0.9 * weights["a.weight"].size)


def test_the_zeros_of_a_student_can_be_imposed_again() -> None:
    student = build(unit(), "0.7").model
    held = zeros_of(student)
    assert set(held.masks) == {"a.weight", "b.weight"}
    module = to_torch(student)
    with torch.no_grad():
        for weight in module.weights:
            weight.add_(1)
    impose(held, module, 0.5)
    after = write_back(student, module.trained_weights())
    for name in ("a.weight", "b.weight"):
        assert np.array_equal(numbers(after, name) == 0, numbers(student, name) == 0)
    assert (numbers(after, "a.bias") != 0).all()


def test_weights_without_zeros_are_not_held() -> None:
    assert zeros_of(unit().model) == FixedZeros({})


# What it is worth


def test_the_compressed_size_counts_the_weights_beside_the_file(tmp_path: Path) -> None:
    dense_model, sparse_model = unit().model, build(unit(), "0.8").model
    for name, model in (("dense", dense_model), ("sparse", sparse_model)):
        save(model, tmp_path / f"{name}.onnx")
    sizes = {name: compressed_bytes(tmp_path / f"{name}.onnx") for name in ("dense", "sparse")}
    assert sizes["dense"] == len(zlib.compress((tmp_path / "dense.onnx").read_bytes()))
    assert sizes["sparse"] < 0.6 * sizes["dense"]
    path = tmp_path / "outside.onnx"
    model = onnx.load(tmp_path / "dense.onnx")
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert compressed_bytes(path) > 0.9 * sizes["dense"] > path.stat().st_size


def test_a_zero_by_chance_does_not_make_a_weight_sparse() -> None:
    mask = np.ones((10, 10), dtype=bool)
    mask[0, 0] = False
    half = np.arange(100).reshape(10, 10) % 2 == 0
    assert list(FixedZeros({"chance": mask, "sparse": half}).held()) == ["sparse"]
