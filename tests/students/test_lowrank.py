"""Low rank: the factors are the best there are, ranks go where they are needed, and windows stay where they were."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ndonnx.assemble.splice import splice
from ndonnx.convert import write_back
from ndonnx.errors import ShrinkError
from ndonnx.graph import slice_cost
from ndonnx.graph.save import serialise
from ndonnx.students import TeacherSlice
from ndonnx.students.factors import Cut, Fit, Form, fit_of, forms_of
from ndonnx.students.features import LinearReader
from ndonnx.students.least_squares import Regression
from ndonnx.students.linear import every_reader
from ndonnx.students.methods import lowrank
from ndonnx.students.methods.lowrank import LowRank, Option, choose
from tests.helpers.models import Net, inputs_of, parted, residual_cnn, run
from tests.helpers.slices import answer, build, error, operators, teacher_of, weights

FIRST_WINDOWS = {(3, 3): "whole", (1, 1): "none", (3, 1): "rows", (1, 3): "columns"}


def matrix(samples: int = 200, seed: int = 0) -> TeacherSlice:
    """One MatMul whose inputs have very different energies."""
    net = Net(seed)
    teacher = teacher_of(net, net.matmul(net.input("x", "N", 12), 12, 10, out="y"), samples)
    teacher.samples["x"][:] *= np.logspace(-1, 1, 12, dtype=np.float32)
    return teacher


def convolution(**attributes: Any) -> TeacherSlice:
    net = Net(0)
    net.weight("w", 10, 6, 3, 3)
    net.weight("v", 10)
    return teacher_of(net, net.op("Conv", net.input("x", "N", 6, 9, 8), "w", "v", out="y", **attributes))


def fit(teacher: TeacherSlice, reader: LinearReader) -> Fit:
    """The problem of a slice that is one operator."""
    problem = Regression(reader.node, teacher.count)
    problem.add(range(teacher.count), teacher.samples["x"], answer(teacher, teacher.model))
    return fit_of(reader, problem)


def mlp(seed: int = 0) -> TeacherSlice:
    net = Net(seed)
    x = net.relu(net.gemm(net.input("x", "N", 16), 16, 24, out="a"))
    x = net.op("Tanh", net.op("Gemm", x, net.weight("w", 24, 20), net.weight("v", 20), out="b"))
    return teacher_of(net, net.op("Add", net.matmul(x, 20, 16, out="c"), net.weight("offset", 16)))


# The factors


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_matrix_gets_the_best_factors_for_the_data(rank: int) -> None:
    """Brute force: the singular value decomposition of the teacher's answers is the best of that rank."""
    teacher = matrix()
    keep = rank * (12 + 10) / 120 + 1e-3
    candidate = build(teacher, LowRank(keep))
    assert operators(candidate.model) == ["MatMul", "MatMul"]
    assert [array.shape for array in weights(candidate.model).values()] == [(12, rank), (rank, 10)]
    expected = answer(teacher, teacher.model).astype(np.float64)
    least = (np.linalg.svd(expected, compute_uv=False)[rank:] ** 2).sum()
    found = np.square(answer(teacher, candidate.model) - expected).sum()
    assert found == pytest.approx(least, rel=1e-3)
    plain = np.linalg.svd(weights(teacher.model)["y.weight"].astype(np.float64))
    cut = (plain.U[:, :rank] * plain.S[:rank]) @ plain.Vh[:rank]
    assert np.square(teacher.samples["x"] @ cut - expected).sum() > 1.1 * least


def test_an_operator_with_an_offset_is_fitted_about_the_means() -> None:
    net = Net(3)
    teacher = teacher_of(net, net.gemm(net.input("x", "N", 12), 12, 10, out="y"), 300)
    teacher.samples["x"][:] += 20
    expected = answer(teacher, teacher.model).astype(np.float64)
    least = (np.linalg.svd(expected - expected.mean(axis=0), compute_uv=False)[3:] ** 2).sum()
    found = np.square(answer(teacher, build(teacher, LowRank(0.56)).model) - expected).sum()
    assert found == pytest.approx(least, rel=2e-3)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("init", ["teacher", "least-squares"])
def test_an_operator_of_low_rank_is_cut_without_loss(init: Any, transposed: int) -> None:
    net = Net(1)
    low = (net.rng.standard_normal((14, 4)) @ net.rng.standard_normal((4, 14))).astype(np.float32)
    y = net.op("Gemm", net.input("x", "N", 14), net.constant("w", low), net.weight("v", 14), transB=transposed)
    teacher = teacher_of(net, y, 100)
    assert error(teacher, build(teacher, LowRank(0.6, init)).model) < 1e-6
    assert error(teacher, build(teacher, LowRank(0.4, init)).model) > 1e-2


@pytest.mark.parametrize("form", forms_of((3, 3)), ids=lambda form: FIRST_WINDOWS[form.first])
@pytest.mark.parametrize(
    "attributes",
    [
        {"pads": [1, 1, 1, 1]},
        {"pads": [0, 1, 2, 1], "strides": [2, 1]},
        {"pads": [2, 1, 2, 1], "dilations": [2, 1], "strides": [1, 2]},
        {"auto_pad": "SAME_LOWER", "strides": [2, 2]},
        {},
    ],
    ids=["same", "rows strided", "dilated", "auto", "valid"],
)
def test_every_form_of_a_window_is_one_convolution_in_two(form: Form, attributes: dict[str, Any]) -> None:
    """The two answer as the product of their weights does in the teacher's place, with the error that was promised."""
    teacher = convolution(**attributes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowrank, "forms_of", lambda kernel: [form])
        student = build(teacher, LowRank(0.6)).model
    assert operators(student) == ["Conv", "Conv"]
    found = weights(student)
    assert found["w/a"].shape[2:] == form.first
    assert found["w/b"].shape[2:] == form.second
    whole = np.einsum("rcyx,orhw->ocyhxw", found["w/a"], found["w/b"]).reshape(10, 6, 3, 3)
    merged = write_back(teacher.model, {"w": whole, "v": found["v"]})
    np.testing.assert_allclose(answer(teacher, student), answer(teacher, merged), atol=1e-4)
    (reader,) = every_reader(teacher.model)
    promised = Cut(fit(teacher, reader).problem, form).errors()
    rank = len(found["w/a"])
    measured = np.square(answer(teacher, student) - answer(teacher, teacher.model)).mean() * 10
    assert measured == pytest.approx(promised[rank - 1], rel=1e-3)
    assert (np.diff(promised) <= 1e-9).all()


def test_a_convolution_with_its_window_in_one_factor_has_the_best_factors() -> None:
    teacher = convolution(pads=[1] * 4)
    (reader,) = every_reader(teacher.model)
    expected = answer(teacher, teacher.model).transpose(0, 2, 3, 1).reshape(-1, 10).astype(np.float64)
    problem = fit(teacher, reader).problem
    values = np.linalg.svd(expected - expected.mean(axis=0), compute_uv=False) ** 2 / len(expected)
    promised = Cut(problem, Form((3, 3), (1, 1))).errors()
    np.testing.assert_allclose(promised, [values[rank:].sum() for rank in range(1, len(promised) + 1)], rtol=1e-3)


def test_data_that_do_not_fill_a_rank_leave_factors_that_can_learn() -> None:
    """Inputs along two directions only: further ranks change nothing, but get a gradient."""
    net = Net(4)
    teacher = teacher_of(net, net.matmul(net.input("x", "N", 12), 12, 12, out="y"), 60)
    directions = net.rng.standard_normal((2, 12)).astype(np.float32)
    teacher.samples["x"][:] = teacher.samples["x"][:, :2] @ directions
    (reader,) = every_reader(teacher.model)
    cut = Cut(fit(teacher, reader).problem, forms_of((1, 1))[0])
    a, b = cut.factors(4)
    assert a.shape == (4, 12, 1, 1)
    assert np.linalg.matrix_rank(a[:, :, 0, 0]) == 4
    assert (b[:, 2:] == 0).all()
    expected = answer(teacher, teacher.model)
    np.testing.assert_allclose(teacher.samples["x"] @ (b[:, :, 0, 0] @ a[:, :, 0, 0]).T, expected, atol=1e-3)


# How ranks are shared out

MENUS = st.lists(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0, 10)), min_size=1, max_size=5), min_size=1, max_size=4
)


@settings(max_examples=60)
@given(MENUS, st.integers(1, 120))
def test_the_choice_is_the_best_of_all(menus: list[list[tuple[int, float]]], budget: int) -> None:
    options = [[Option(size, error) for size, error in menu] for menu in menus]
    chosen = choose(options, budget)
    fitting = [pick for pick in itertools.product(*options) if sum(o.parameters for o in pick) <= budget]
    if not fitting:
        assert [o.parameters for o in chosen] == [min(o.parameters for o in menu) for menu in options]
        return
    assert sum(o.parameters for o in chosen) <= budget
    least = min(sum(o.error for o in pick) for pick in fitting)
    assert sum(o.error for o in chosen) == pytest.approx(least)


def test_a_large_budget_is_met_but_for_a_small_part() -> None:
    options = [[Option(10**6 - 997 * i, i**2 * 1.0) for i in range(900)] for _ in range(5)]
    chosen = choose(options, 3 * 10**6)
    assert 0.99 * 3 * 10**6 < sum(o.parameters for o in chosen) <= 3 * 10**6


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("make", [mlp, lambda: convolution(pads=[1] * 4)], ids=["mlp", "convolution"])
def test_no_more_than_asked_for_is_kept(make: Callable[[], TeacherSlice], keep: float) -> None:
    teacher = make()
    candidate = build(teacher, LowRank(keep, round_to=1))
    assert candidate.spec == f"lowrank k={keep:g}"
    old, new = (sum(a.size for a in weights(m).values() if a.ndim > 1) for m in (teacher.model, candidate.model))
    assert 0.7 * keep * old < new <= keep * old
    assert slice_cost(candidate.model).macs < slice_cost(teacher.model).macs


def test_the_operator_that_needs_no_rank_gives_it_up() -> None:
    net = Net(2)
    low = (net.rng.standard_normal((16, 2)) @ net.rng.standard_normal((2, 16)) / 4).astype(np.float32)
    x = net.relu(net.op("MatMul", net.input("x", "N", 16), net.constant("w", low), out="a"))
    teacher = teacher_of(net, net.matmul(x, 16, 16, out="b"), 200)
    student = build(teacher, LowRank(0.65, round_to=1)).model
    assert operators(student) == ["MatMul", "MatMul", "Relu", "MatMul"]
    assert weights(student)["w/a"].shape[1] < 6
    assert error(teacher, student) < 1e-6


def test_an_error_that_does_not_reach_the_exit_does_not_count() -> None:
    """Two equal branches, one of them multiplied by almost nothing: that one gives up its ranks."""
    net = Net(2)
    x = net.input("x", "N", 16)
    weight = net.weight("w", 16, 16)
    net.constant("w2", net.weights["w"] * np.float32(1))
    small = net.constant("small", np.array(0.01, np.float32))
    y = net.op("Add", net.op("MatMul", x, weight), net.op("Mul", small, net.op("Tanh", net.op("MatMul", x, "w2"))))
    student = build(teacher_of(net, y, 200), LowRank(0.6, round_to=1)).model
    ranks = {name: array.shape[1] for name, array in weights(student).items() if name.endswith("/a")}
    assert ranks["w2/a"] <= 3
    assert ranks.get("w/a", 16) >= 6


def test_wide_operators_have_ranks_that_suit_the_hardware() -> None:
    net = Net(5)
    teacher = teacher_of(net, net.matmul(net.input("x", "N", 72), 72, 80, out="y"), 200)
    assert weights(build(teacher, LowRank(0.5)).model)["y.weight/a"].shape == (72, 16)
    assert weights(build(teacher, LowRank(0.5, round_to=1)).model)["y.weight/a"].shape == (72, 18)
    assert weights(build(teacher, LowRank(0.01)).model)["y.weight/a"].shape == (72, 8)
    narrow = Net(5)
    teacher = teacher_of(narrow, narrow.matmul(narrow.input("x", "N", 72), 72, 15, out="y"), 200)
    assert weights(build(teacher, LowRank(0.5)).model)["y.weight/a"].shape == (72, 6)


# The whole slice


def test_later_operators_make_up_for_earlier_ones() -> None:
    teacher = mlp()
    assert error(teacher, build(teacher, LowRank(0.5)).model) < error(
        teacher, build(teacher, LowRank(0.5, "teacher")).model
    )


@pytest.mark.parametrize("init", ["teacher", "least-squares", "random"])
def test_all_of_the_weights_is_the_slice_itself(init: Any) -> None:
    teacher = mlp()
    assert serialise(build(teacher, LowRank(1.0, init)).model) == serialise(teacher.model)


def test_the_teacher_is_never_changed() -> None:
    for teacher in (mlp(), convolution(pads=[1] * 4)):
        before = serialise(teacher.model)
        build(teacher, LowRank(0.5))
        assert serialise(teacher.model) == before


def test_a_random_start_has_the_same_shapes_and_follows_its_seed() -> None:
    teacher = mlp()
    fitted = weights(build(teacher, LowRank(0.5)).model)
    one, same, other = (weights(build(teacher, LowRank(0.5, "random"), seed).model) for seed in (1, 1, 2))
    assert {n: a.shape for n, a in one.items()} == {n: a.shape for n, a in fitted.items()}
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not np.array_equal(one["w/a"], other["w/a"])


def test_what_cannot_be_cut_is_told() -> None:
    net = Net()
    x = net.conv(net.input("x", "N", 6, 5, 5), 6, 6, group=6, out="a")  # depthwise
    x = net.conv(net.relu(x), 6, 1, 1, out="b")  # one output: no rank below it
    with pytest.raises(ShrinkError, match="n01: no linear operator and no table gets smaller as two factors"):
        build(teacher_of(net, x), LowRank(0.5))


def test_a_shared_weight_stays() -> None:
    net = Net()
    x = net.input("x", "N", 12)
    net.weight("shared", 12, 12)
    for _ in range(2):
        x = net.op("Tanh", net.op("MatMul", x, "shared"))
    student = build(teacher_of(net, net.matmul(x, 12, 12, out="own")), LowRank(0.5)).model
    assert set(weights(student)) == {"shared", "own.weight/a", "own.weight/b"}


def test_values_that_overflow_are_this_slices_fault() -> None:
    teacher = mlp()
    teacher.samples["x"][:] *= 1e25
    with pytest.raises(ShrinkError, match="overflow"):
        build(teacher, LowRank(0.5))


def test_dead_inputs_are_no_problem() -> None:
    teacher = mlp()
    dead = {name: np.zeros_like(weights(teacher.model)[name]) for name in ("a.weight", "a.bias")}
    teacher = replace(teacher, model=write_back(teacher.model, dead))
    assert error(teacher, build(teacher, LowRank(0.5)).model) < 1e-6
    every = replace(teacher, samples={"x": np.zeros_like(teacher.samples["x"])})
    np.testing.assert_allclose(answer(every, build(every, LowRank(0.5)).model), answer(every, every.model), atol=1e-5)


def test_students_take_their_places_in_the_teacher() -> None:
    proto = residual_cnn(2, channels=12)
    teacher, parts = parted(proto)
    students = {}
    for part in parts.distillable:
        model = parts.slice_of(part)
        assert part.entry is not None
        assert part.groups is not None
        samples = run(proto, inputs_of(proto, 16), [part.entry.name or ""])
        students[part.name] = build(TeacherSlice(part.name, model, part.groups, samples), LowRank(0.95)).model
    whole = splice(teacher, students)
    expected, found = (next(iter(run(model, inputs_of(proto, 16)).values())) for model in (teacher, whole))
    assert slice_cost(whole).parameters < slice_cost(teacher).parameters
    assert np.abs(found - expected).max() < 0.2 * np.abs(expected).max()
