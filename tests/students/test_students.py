"""Width reduction: what is kept, what it costs, and that nothing but the width changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ndonnx.graph import slice_cost
from ndonnx.graph.save import serialise
from ndonnx.partition.removable import kept_width
from ndonnx.students import TeacherSlice
from ndonnx.students.cutting import choose_units
from ndonnx.students.methods.width import Width
from tests.helpers.models import Array, Net, run
from tests.helpers.widths import answer, bottleneck, build, error, mlp, repeated, teacher_of, weights


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def residual_unit(seed: int = 0) -> TeacherSlice:
    net = Net(seed)
    x = net.input("x", "N", 6, 5, 5)
    y = net.conv(net.relu(net.conv(x, 6, 8, out="a")), 8, 6, out="b")
    return teacher_of(net, net.relu(net.op("Add", y, x)))


def depthwise(seed: int = 0) -> TeacherSlice:
    net = Net(seed)
    x = net.input("x", "N", 6, 5, 5)
    y = net.relu(net.conv(x, 6, 12, 1, out="a"))
    y = net.relu(net.conv(y, 12, 12, 3, group=12, out="b"))
    return teacher_of(net, net.op("Add", net.conv(y, 12, 6, 1, out="c"), x))


def grouped(seed: int = 0) -> TeacherSlice:
    """Four groups of three channels each."""
    net = Net(seed)
    y = net.relu(net.conv(net.input("x", "N", 6, 5, 5), 6, 12, 1, out="a"))
    y = net.relu(net.conv(y, 12, 8, 3, group=4, out="b"))
    return teacher_of(net, net.conv(y, 8, 6, 1, out="c"))


def shared(seed: int = 0) -> TeacherSlice:
    """Two inner layers with one weight between them."""
    net = Net(seed)
    y = net.relu(net.gemm(net.input("x", "N", 6), 6, 12, out="a"))
    weight, bias = net.weight("shared", 12, 12), net.weight("offset", 12)
    for _ in range(2):
        y = net.op("Tanh", net.op("Gemm", y, weight, bias, transB=1))
    return teacher_of(net, net.gemm(y, 12, 6, out="b"))


SLICES: dict[str, Callable[[int], TeacherSlice]] = {
    f.__name__: f for f in (residual_unit, mlp, bottleneck, depthwise, grouped, shared)
}
# How much is kept


@given(st.integers(1, 3000), st.floats(0, 1, exclude_min=True), st.none() | st.integers(1, 200))
def test_a_kept_width_is_within_bounds_and_a_multiple_where_possible(width: int, keep: float, to: int | None) -> None:
    kept = kept_width(width, keep, to)
    multiple = to if to is not None else (8 if width >= 64 else 1)
    assert 1 <= kept <= width
    assert kept % multiple == 0 or kept == width
    assert abs(kept - keep * width) <= multiple / 2 or kept == min(multiple, width) or kept == width


@given(st.integers(1, 500), st.none() | st.integers(1, 50), st.lists(st.floats(0.001, 1), min_size=2, max_size=5))
def test_a_kept_width_grows_with_keep(width: int, to: int | None, keeps: list[float]) -> None:
    kept = [kept_width(width, keep, to) for keep in sorted(keeps)]
    assert kept == sorted(kept)


@pytest.mark.parametrize(
    ("width", "keep", "to", "kept"),
    [
        (64, 0.5, None, 32),
        (64, 0.45, None, 32),
        (63, 0.45, None, 28),
        (10, 0.5, 4, 4),
        (10, 0.01, 4, 4),
        (3, 0.5, 8, 3),
        (1, 0.1, None, 1),
        (100, 0.99, 64, 100),
    ],
)
def test_kept_widths(width: int, keep: float, to: int | None, kept: int) -> None:
    assert kept_width(width, keep, to) == kept


@pytest.mark.parametrize("to", [None, 4])
@pytest.mark.parametrize("init", ["teacher", "least-squares", "random"])
@pytest.mark.parametrize("name", SLICES)
def test_every_group_keeps_its_part_and_the_student_runs(name: str, init: str, to: int | None) -> None:
    teacher = SLICES[name](0)
    candidate = build(teacher, Width(0.5, to, init))  # type: ignore[arg-type]
    assert candidate.spec == "width k=0.5"
    old, new = weights(teacher.model), weights(candidate.model)
    assert old.keys() == new.keys()
    axes = {(axis.initializer, axis.axis): axis for axis in teacher.groups.axes}
    assert axes
    for weight in old:
        for axis, length in enumerate(old[weight].shape):
            expected = length
            if (found := axes.get((weight, axis))) is not None:
                group = next(g for g in teacher.groups.groups if g.start <= found.units.max() < g.stop)
                expected = length * kept_width(group.width, 0.5, to) // group.width
            assert new[weight].shape[axis] == expected, (weight, axis)
    smaller = any(kept_width(group.width, 0.5, to) < group.width for group in teacher.groups.groups)
    assert (slice_cost(candidate.model).parameters < slice_cost(teacher.model).parameters) == smaller
    assert answer(teacher, candidate.model).shape == answer(teacher, teacher.model).shape
    onnx.checker.check_model(ir.to_proto(candidate.model), full_check=True)


@pytest.mark.parametrize("init", ["teacher", "least-squares", "random"])
def test_all_of_the_width_is_the_slice_itself(init: str) -> None:
    teacher = bottleneck()
    candidate = build(teacher, Width(1.0, 4, init))  # type: ignore[arg-type]
    assert serialise(candidate.model) == serialise(teacher.model)
    assert candidate.model is not teacher.model
    assert answer(teacher, candidate.model).tobytes() == answer(teacher, teacher.model).tobytes()


@pytest.mark.parametrize("name", SLICES)
def test_the_teacher_is_never_changed(name: str) -> None:
    teacher = SLICES[name](0)
    before = serialise(teacher.model)
    for init in ("teacher", "least-squares", "random"):
        build(teacher, Width(0.5, None, init))
    assert serialise(teacher.model) == before


@pytest.mark.parametrize(("make", "node", "group"), [(depthwise, "b", 6), (grouped, "b", 2)])
def test_the_group_of_a_convolution_follows(make: Callable[[], TeacherSlice], node: str, group: int) -> None:
    candidate = build(make(), Width(0.5))
    (convolution,) = (n for n in candidate.model.graph if n.outputs[0].name == node)
    assert convolution.attributes["group"].as_int() == group


# Least squares


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("name", SLICES)
def test_least_squares_begins_no_worse_than_the_teachers_weights(name: str, keep: float, seed: int) -> None:
    teacher = SLICES[name](seed)
    refitted, cut = (
        error(teacher, build(teacher, Width(keep, None, init)).model) for init in ("least-squares", "teacher")
    )
    assert refitted <= cut * (1 + 1e-5) + 1e-9


@pytest.mark.parametrize("activation", ["Relu", "Tanh"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_channels_that_repeat_others_go_without_loss(kernel: int, activation: str) -> None:
    teacher = repeated(kernel, activation)
    assert error(teacher, build(teacher, Width(0.5)).model) < 1e-6
    assert error(teacher, build(teacher, Width(0.5, None, "teacher")).model) > 1e-2
    assert error(teacher, build(teacher, Width(0.375)).model) > 1e-3


def test_channels_that_combine_others_go_without_loss() -> None:
    net = Net(6)
    basis, mixture = net.rng.standard_normal((4, 10)), net.rng.standard_normal((8, 4))
    net.constant("a.weight", (mixture @ basis).astype(np.float32))
    y = net.op("Gemm", net.input("x", "N", 10), "a.weight", transB=1, out="a")
    teacher = teacher_of(net, net.gemm(y, 8, 6, out="b"))
    assert error(teacher, build(teacher, Width(0.5)).model) < 1e-6


def test_a_refit_is_the_least_squares_solution() -> None:
    teacher = mlp()
    candidate = build(teacher, Width(0.5))
    kept = choose_units(teacher, 0.5, None)
    hidden = run(teacher.model, teacher.samples, [teacher.model.graph[1].outputs[0].name or ""])
    features = np.hstack([next(iter(hidden.values()))[:, kept], np.ones((48, 1))]).astype(np.float64)
    solution, *_ = np.linalg.lstsq(features, answer(teacher, teacher.model).astype(np.float64), rcond=None)
    found = weights(candidate.model)
    np.testing.assert_allclose(found["b.weight"].T, solution[:-1], atol=2e-4)
    np.testing.assert_allclose(found["b.bias"], solution[-1], atol=2e-4)
    old = weights(teacher.model)
    assert np.array_equal(found["a.weight"], old["a.weight"][kept])
    assert np.array_equal(found["a.bias"], old["a.bias"][kept])


def test_a_refit_without_an_offset_is_the_least_squares_solution_through_zero() -> None:
    net = Net(2)
    y = net.op("Sigmoid", net.matmul(net.input("x", "N", 6), 6, 8, out="a"))
    teacher = teacher_of(net, net.matmul(y, 8, 4, out="b"))
    kept = choose_units(teacher, 0.5, None)
    hidden = run(teacher.model, teacher.samples, [y])[y][:, kept].astype(np.float64)
    solution, *_ = np.linalg.lstsq(hidden, answer(teacher, teacher.model).astype(np.float64), rcond=None)
    np.testing.assert_allclose(weights(build(teacher, Width(0.5)).model)["b.weight"], solution, atol=5e-3)


def test_a_weight_that_two_operators_share_is_refitted_for_both() -> None:
    teacher = shared()
    refitted, cut = (weights(build(teacher, Width(0.5, None, init)).model) for init in ("least-squares", "teacher"))
    changed = {name for name in cut if not np.array_equal(refitted[name], cut[name])}
    assert changed == {"shared", "offset", "b.weight", "b.bias"}


def test_no_other_weight_suits_two_operators_better() -> None:
    """Two convolutions with one weight, each on features of its own: the sum of their errors is the least."""
    net = Net(3)
    x, same = net.input("x", "N", 3, 6, 6), net.weight("same", 5, 8, 3, 3)
    first = [net.relu(net.conv(x, 3, 8, out=f"own{i}")) for i in range(2)]
    ends = [
        net.op("Conv", y, same, net.weight(f"bias{i}", 5), out=f"end{i}", pads=[1] * 4) for i, y in enumerate(first)
    ]
    teacher = teacher_of(net, net.op("Add", *ends, out="y"), samples=60)
    student = build(teacher, Width(0.5, 1)).model
    data = [next(n.inputs[0].name or "" for n in student.graph if n.outputs[0].name == f"end{i}") for i in range(2)]
    given = run(student, teacher.samples, data)
    wanted = run(teacher.model, teacher.samples, ["end0", "end1"])
    held = weights(student)

    def error(weight: Array) -> float:
        total = 0.0
        for i, name in enumerate(data):
            answer = torch.nn.functional.conv2d(
                torch.from_numpy(given[name]).double(), torch.from_numpy(weight).double(), padding=1
            )
            target = torch.from_numpy(wanted[f"end{i}"] - held[f"bias{i}"].reshape(-1, 1, 1)).double()
            total += float((answer - target).square().sum())
        return total

    best = error(held["same"])
    rng = np.random.default_rng(0)
    for _ in range(20):
        other = held["same"] + 0.01 * rng.standard_normal(held["same"].shape).astype(np.float32)
        assert error(other) > best
