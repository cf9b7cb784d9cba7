"""Width reduction: what is kept, what it costs, and that nothing but the width changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ndonnx.errors import ShrinkError
from ndonnx.graph import slice_cost
from ndonnx.graph.save import serialise
from ndonnx.graph.shapes.inference import infer_shapes
from ndonnx.partition import ChannelGroups, WeightAxis, find_groups
from ndonnx.partition.removable import kept_width
from ndonnx.students import Candidate, StudentMethod, TeacherSlice
from ndonnx.students import forward as forward_module
from ndonnx.students.cutting import choose_units
from ndonnx.students.forward import Forward, side_by_side
from ndonnx.students.methods.width import Width
from ndonnx.teacher import probe as probe_module
from tests.helpers.models import Array, Net, inputs_of, residual_cnn, run, transformer
from tests.helpers.models import mlp as small_mlp


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def teacher_of(net: Net, output: str, samples: int = 48, seed: int = 0) -> TeacherSlice:
    """A whole net as a slice, with random samples."""
    proto = net.proto(output)
    model = infer_shapes(ir.from_proto(proto))
    groups = find_groups(list(model.graph), model.graph.outputs[0])
    return TeacherSlice("n01", model, groups, inputs_of(proto, samples, seed))


def residual_unit(seed: int = 0) -> TeacherSlice:
    net = Net(seed)
    x = net.input("x", "N", 6, 5, 5)
    y = net.conv(net.relu(net.conv(x, 6, 8, out="a")), 8, 6, out="b")
    return teacher_of(net, net.relu(net.op("Add", y, x)))


def mlp(seed: int = 0) -> TeacherSlice:
    net = Net(seed)
    y = net.relu(net.gemm(net.input("x", "N", 10), 10, 16, out="a"))
    return teacher_of(net, net.gemm(y, 16, 6, out="b"))


def bottleneck(seed: int = 0) -> TeacherSlice:
    net = Net(seed)
    x = net.input("x", "N", 12, 5, 5)
    y = net.relu(net.norm(net.conv(x, 12, 8, 1, bias=False, out="a"), 8))
    y = net.relu(net.norm(net.conv(y, 8, 8, 3, bias=False, out="b"), 8))
    y = net.norm(net.conv(y, 8, 12, 1, bias=False, out="c"), 12)
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


def build(teacher: TeacherSlice, method: StudentMethod, seed: int = 0) -> Candidate:
    return method.build(teacher, np.random.default_rng(seed))


def weights(model: ir.Model) -> dict[str, Array]:
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}  # type: ignore[union-attr]


def answer(teacher: TeacherSlice, model: ir.Model) -> Array:
    return next(iter(run(model, teacher.samples).values()))


def error(teacher: TeacherSlice, model: ir.Model) -> float:
    """Squared error against the teacher on the samples, over the teacher's variance."""
    expected = answer(teacher, teacher.model)
    return float(np.square(answer(teacher, model) - expected).mean() / expected.var())


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


def repeated(kernel: int, activation: str) -> TeacherSlice:
    """Eight inner channels of which the last four are copies of the first, in another order."""
    net = Net(5)
    order = [0, 1, 2, 3, 2, 0, 3, 1]
    inner, offset = net.rng.standard_normal((4, 6, *[kernel] * 2)), net.rng.standard_normal(4)
    net.constant("a.weight", inner[order].astype(np.float32))
    net.constant("a.bias", offset[order].astype(np.float32))
    pads = [kernel // 2] * 4
    y = net.op("Conv", net.input("x", "N", 6, 5, 5), "a.weight", "a.bias", pads=pads, out="a")
    return teacher_of(net, net.conv(net.op(activation, y), 8, 6, kernel, out="b"))


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


# Which channels


def test_a_large_mean_does_not_change_the_ranking() -> None:
    def kept(offset: float) -> list[int]:
        net = Net(1)
        y = net.gemm(net.input("x", "N", 10), 10, 24, out="a")
        net.weights["a.bias"][:] += np.float32(offset)
        teacher = teacher_of(net, net.gemm(net.relu(y), 24, 12, out="b"), samples=300)
        return np.flatnonzero(choose_units(teacher, 0.3, None)).tolist()

    assert kept(20) == kept(1000)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_the_ranking_finds_the_best_subset_of_independent_channels(seed: int, keep: int) -> None:
    """With orthogonal features elimination one by one is optimal, so all subsets can tell no better."""
    net = Net(seed)
    net.constant("a.weight", np.diag(net.rng.uniform(0.2, 3, 6)).astype(np.float32))
    y = net.op("MatMul", net.input("x", "N", 6), "a.weight", out="a")
    teacher = teacher_of(net, net.gemm(y, 6, 4, out="b"), seed=seed)
    centred = teacher.samples["x"] - teacher.samples["x"].mean(axis=0)
    orthogonal = (np.linalg.qr(centred)[0] * np.sqrt(48)).astype(np.float32)
    teacher = replace(teacher, samples={"x": orthogonal})
    hidden, target = run(teacher.model, teacher.samples, ["a"])["a"], answer(teacher, teacher.model)

    def loss(units: tuple[int, ...]) -> float:
        features = np.hstack([hidden[:, units], np.ones((48, 1))])
        solution, *_ = np.linalg.lstsq(features, target, rcond=None)
        return float(np.square(features @ solution - target).sum())

    best = min(itertools.combinations(range(6), keep), key=loss)
    kept = tuple(np.flatnonzero(choose_units(teacher, keep / 6, None)).tolist())
    assert loss(kept) <= loss(best) * (1 + 1e-3)


def test_the_ranking_keeps_one_of_each_pair() -> None:
    kept = choose_units(repeated(3, "Relu"), 0.5, None)
    assert sorted([0, 1, 2, 3, 2, 0, 3, 1][unit] for unit in np.flatnonzero(kept)) == [0, 1, 2, 3]


def test_channels_that_matter_to_nobody_go_first() -> None:
    net = Net(3)
    y = net.relu(net.gemm(net.input("x", "N", 6), 6, 8, out="a"))
    out = net.gemm(y, 8, 4, out="b")
    net.weights["b.weight"][:, [1, 4, 5, 6]] = 0
    teacher = teacher_of(net, out)
    assert np.flatnonzero(choose_units(teacher, 0.5, None)).tolist() == [0, 2, 3, 7]


def test_channels_that_several_operators_read_count_by_what_they_bring_to_all() -> None:
    net = Net(3)
    y = net.relu(net.gemm(net.input("x", "N", 6), 6, 8, out="a"))
    out = net.op("Add", net.gemm(y, 8, 4, out="b"), net.op("Tanh", net.gemm(y, 8, 4, out="c")))
    net.weights["b.weight"][:, [1, 4, 5, 6, 7]] = 0
    net.weights["c.weight"][:, [0, 1, 4, 5, 6]] = 0
    teacher = teacher_of(net, out)
    assert np.flatnonzero(choose_units(teacher, 0.5, None)).tolist() == [0, 2, 3, 7]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("init", ["teacher", "least-squares"])
def test_a_slice_whose_inner_channels_are_all_dead_still_shrinks(init: str) -> None:
    net = Net(4)
    y = net.relu(net.gemm(net.input("x", "N", 6), 6, 8, out="a"))
    out = net.gemm(y, 8, 4, out="b")
    net.weights["a.weight"][:], net.weights["a.bias"][:] = 0, -1
    teacher = teacher_of(net, out)
    candidate = build(teacher, Width(0.5, None, init))  # type: ignore[arg-type]
    np.testing.assert_allclose(answer(teacher, candidate.model), answer(teacher, teacher.model), rtol=1e-5)


# Random


def test_a_random_start_follows_its_seed() -> None:
    teacher = bottleneck()
    one, same, other = (serialise(build(teacher, Width(0.5, None, "random"), seed).model) for seed in (1, 1, 2))
    assert one == same != other


def test_a_random_start_draws_matrices_and_leaves_the_rest() -> None:
    net = Net(3)
    y = net.op("PRelu", net.gemm(net.input("x", "N", 64), 64, 128, out="a"), net.weight("slope", 1, 128))
    y = net.op("Add", net.matmul(y, 128, 32, out="b"), net.weight("offset", 1, 32))
    teacher = teacher_of(net, y)
    drawn = weights(build(teacher, Width(0.5, None, "random")).model)
    copied = weights(build(teacher, Width(0.5, None, "teacher")).model)
    assert {name for name in drawn if not np.array_equal(drawn[name], copied[name])} == {"a.weight", "b.weight"}
    assert drawn["a.weight"].std() == pytest.approx(np.sqrt(2 / 64), rel=0.05)  # (outputs, inputs)
    assert drawn["b.weight"].std() == pytest.approx(np.sqrt(2 / 64), rel=0.05)  # (inputs, outputs)


# Conditions


class Renaming(StudentMethod):
    """TeacherOutputs under another name."""

    def __init__(self, side: str) -> None:
        self.side = side

    def _build(self, teacher: TeacherSlice, rng: np.random.Generator) -> Candidate:
        model = teacher.model.clone()
        getattr(model.graph, self.side)[0].name = "stranger"
        return Candidate("renaming", model)


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_a_method_that_changes_the_boundary_fails_by_name(side: str) -> None:
    with pytest.raises(ShrinkError, match=f"n01: renaming changed the slice's {side} from .* to .*stranger"):
        build(mlp(), Renaming(side))


def test_a_slice_without_groups_has_no_width_to_shrink() -> None:
    teacher = replace(mlp(), groups=ChannelGroups((), (), ()))
    with pytest.raises(ShrinkError, match="n01: no width to shrink inside"):
        build(teacher, Width(0.5))


def wrong(teacher: TeacherSlice, change: Callable[[WeightAxis], WeightAxis]) -> TeacherSlice:
    groups = teacher.groups
    return replace(teacher, groups=ChannelGroups(groups.groups, tuple(map(change, groups.axes)), groups.edits))


def test_wrong_groups_do_not_pass_the_zeroing_check() -> None:
    def mixed_up(axis: WeightAxis) -> WeightAxis:
        return replace(axis, units=axis.units[::-1].copy()) if axis.initializer == "a.bias" else axis

    with pytest.raises(ShrinkError, match="without the removed channels the slice differs by"):
        build(wrong(mlp(), mixed_up), Width(0.5))


def test_groups_after_which_the_slice_does_not_run_are_this_slices_fault() -> None:
    teacher = mlp()
    fewer = tuple(axis for axis in teacher.groups.axes if axis.initializer != "b.weight")
    with pytest.raises(ShrinkError, match="n01"):
        build(replace(teacher, groups=ChannelGroups(teacher.groups.groups, fewer, ())), Width(0.5, None, "teacher"))


@pytest.mark.parametrize("init", ["teacher", "least-squares"])
def test_activations_that_overflow_when_squared_are_this_slices_fault(init: str) -> None:
    teacher = mlp()
    samples = {"x": teacher.samples["x"] * np.float32(1e25)}
    with pytest.raises(ShrinkError, match="overflow when they are squared"):
        build(replace(teacher, samples=samples), Width(0.5, None, init))  # type: ignore[arg-type]


def test_an_input_without_sample_axis_serves_all_samples() -> None:
    """As a store holds it once: longer than the check's few samples, or without any axis."""
    net = Net(7)
    x, table, scale = net.input("x", "N", 40, 6), net.input("table", 40, 8), net.input("scale")
    y = net.op("Add", net.matmul(x, 6, 8, out="a"), table)
    y = net.op("Mul", net.relu(y), scale)
    proto = net.proto(net.matmul(y, 8, 6, out="b"))
    model = infer_shapes(ir.from_proto(proto))
    rng = np.random.default_rng(0)
    samples = {
        "x": rng.standard_normal((20, 40, 6)).astype(np.float32),
        "table": rng.standard_normal((40, 8)).astype(np.float32),
        "scale": np.array(0.5, np.float32),
    }
    # The groups of the slice without its table: with it the rules freeze them all.
    net_ = Net(7)
    plain = net_.matmul(net_.relu(net_.matmul(net_.input("x", "N", 40, 6), 6, 8, out="a")), 8, 6, out="b")
    groups = teacher_of(net_, plain).groups
    teacher = TeacherSlice("n01", model, groups, samples, constants=frozenset({"table", "scale"}))
    assert teacher.first(3).samples["x"].shape == (3, 40, 6)
    assert teacher.first(3).samples["table"].shape == (40, 8)
    assert teacher.first(3).run(model, ["b"])["b"].shape == (3, 40, 6)


# Values one after the other


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([transformer, residual_cnn, small_mlp]), st.integers(2, 40), st.integers(1, 60_000), st.data())
def test_values_in_order_are_those_of_the_whole(make: Any, samples: int, limit: int, data: st.DataObject) -> None:
    """Each is computed from the one before, also where what lies between them has been changed by then."""
    model = infer_shapes(ir.from_proto(make()))
    teacher = TeacherSlice("n01", model, ChannelGroups((), (), ()), inputs_of(make(), samples))
    names = [value.name or "" for node in model.graph for value in node.outputs if value.type is not None]
    chosen = [names[place] for place in sorted(data.draw(st.lists(st.integers(0, len(names) - 1), min_size=1)))]
    changed = model.clone()
    theirs, ours = Forward(teacher, model), Forward(teacher, changed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe_module, "BATCH_BYTES", limit)
        patch.setattr(forward_module, "_KEPT_BYTES", 2 * limit)
        for name in chosen:
            expected = [run(each, teacher.samples, [name])[name] for each in (changed, model)]
            found = list(side_by_side((ours, name), (theirs, name)))
            assert [row for rows, _, _ in found for row in rows] == list(range(samples))
            for side, whole in enumerate(expected, start=1):
                pieces = [each[side] for each in found]
                if len(whole) == samples and whole.ndim:
                    np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=1e-3, atol=1e-4)
            for node in changed.graph:  # what reads it may change now
                if name in {value.name for value in node.inputs if value is not None}:
                    for weight in (
                        value for value in node.inputs if value is not None and value.const_value is not None
                    ):
                        if weight.dtype == ir.DataType.FLOAT:
                            weight.const_value = ir.tensor(
                                weight.const_value.numpy() * 0.9, weight.dtype, name=weight.name
                            )
